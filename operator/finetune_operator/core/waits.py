"""Why an attempt does not run yet: one word for programs, and one sentence with the remedy for people.

What stands in the way nearest to the trainer is told: a pod that is there says more than a cluster that could not make
one, and that more than KubeRay, which has not looked yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import ErrorClass, FineTuneJobSpec
from finetune_operator.core import failures
from finetune_operator.core.attempts import Ending
from finetune_operator.core.facts import Observed, PodFacts, RayJobFacts
from finetune_operator.core.policies import CHECK

# KubeRay looks at a new RayJob within this time if it runs; it has taken 10 after its own start.
HEED_SECONDS = 12.0
SLOW_SECONDS = 10.0  # less is ordinary
RAY_SECONDS = 120.0  # from a pod's node to a Ray that is ready; less is ordinary, with the image there
PULL_GRACE = timedelta(minutes=10)  # registries have outages; an image that does not exist stays away longer
NEVER_PULLED = frozenset({"InvalidImageName", "ErrImageNeverPull"})
NOT_PULLED = NEVER_PULLED | {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable"}
CRASHING = frozenset({"CrashLoopBackOff"})
CONFIG_ERRORS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
NO_VOLUME = (
    "unbound immediate PersistentVolumeClaims",
    "binding volumes: ",
    "available persistent volumes to bind",
)
VOLUME_ELSEWHERE = (
    "PersistentVolume's node affinity",
    "volume node affinity conflict",
    "no available volume zone",
)
LONGEST = 700  # characters that are quoted of other programs' messages


@dataclass(frozen=True)
class Wait:
    """What is waited for."""

    reason: str
    message: str


def next_look(seen: Observed, rayjob: RayJobFacts, *, now: datetime, soon: float, late: float) -> float:
    """Seconds until the reason may be another one though no watch tells of a change. Only a pod's age and events are
    like that, which are looked at `soon`, and what keeps KubeRay from making a pod, once and then `soon` where there is
    something; all else comes by itself, and is looked at `late` in case that it was missed."""
    podless = rayjob.deployment_status == "Initializing" and not seen.pods
    if any(not pod.running and not pod.gone for pod in seen.pods) or (podless and rayjob.cluster_problem):
        return soon
    if (rayjob.known_to_kuberay and not podless) or rayjob.created is None:
        return late
    due = HEED_SECONDS - (now - rayjob.created).total_seconds()
    return min(late, due) if due > 0 else late


def is_podless(rayjob: RayJobFacts, pods: Sequence[PodFacts], *, now: datetime) -> bool:
    """Whether KubeRay should have made a pod by now, and its statuses do not tell why it has not."""
    if pods or rayjob.cluster_problem or rayjob.created is None or rayjob.deployment_status != "Initializing":
        return False
    return (now - rayjob.created).total_seconds() >= HEED_SECONDS


def why(seen: Observed, rayjob: RayJobFacts, *, now: datetime) -> Wait:
    """Why the trainer of this attempt does not run yet."""
    waiting = next((pod for pod in seen.pods if pod.waiting_reason), None)
    if waiting is not None:
        return of_pod(waiting, _spec_of_attempt(seen))
    if rayjob.cluster_problem:
        return of_cluster(rayjob)
    old = rayjob.created is not None and (now - rayjob.created).total_seconds() >= HEED_SECONDS
    if not rayjob.deployment_status and not rayjob.known_to_kuberay and not rayjob.managed_elsewhere and old:
        message = (
            f"KubeRay does not look at RayJob {rayjob.name}: see that its operator runs (kubectl get pods -A "
            "-l app.kubernetes.io/component=kuberay-operator) and watches this namespace"
        )
        return Wait("KubeRayUnavailable", message)
    if rayjob.deployment_status in ("Retrying", "Waiting"):
        message = f"KubeRay starts RayJob {rayjob.name} again by itself: its backoffLimit was changed"
        if rayjob.reason:  # wiped as it starts
            message += f"; it had ended: {_quoted(failures.message_of(rayjob))}"
        return Wait("RayJobRetrying", message)
    again = next((pod for pod in seen.pods if pod.restarted and not pod.gone), None)
    if again is not None:
        ended = f"its container ended ({again.restarted}); kubectl logs --previous {again.name}"
        return Wait("Provisioning", f"pod {again.name} starts again: {ended}")
    lost = next((pod for pod in seen.pods if _is_unscheduled(pod, now=now)), None)
    if lost is not None:
        text = (
            f"pod {lost.name} has no node, and the scheduler does not say why: see that the scheduler that it names "
            "runs, and that its PersistentVolumeClaims get their volumes (kubectl get pvc; kubectl describe pod "
            f"{lost.name})"
        )
        return Wait("NotScheduled", text)
    slow = next((pod for pod in seen.pods if not pod.running and _has_had(pod, SLOW_SECONDS, now=now)), None)
    if slow is not None:
        where = f"pod {slow.name} starts on node {slow.node}"
        return Wait("Provisioning", f"{where}; where its image is large and new there, that takes minutes")
    unready = next((pod for pod in seen.pods if pod.running and _has_had(pod, RAY_SECONDS, now=now)), None)
    if unready is not None and rayjob.deployment_status == "Initializing":
        ray = f"pod {unready.name} runs on node {unready.node}, and Ray in it is not ready"
        return Wait("Provisioning", f"{ray}; kubectl logs {unready.name} and kubectl describe pod say more")
    return Wait("Provisioning", f"RayJob {rayjob.name} starts")


def _spec_of_attempt(seen: Observed) -> FineTuneJobSpec | None:
    """The spec with what the attempt was given instead. A check has no GPU."""
    spec, attempts = seen.job.spec, seen.job.status.attempts
    if spec is not None and attempts and attempts[-1].number == CHECK:
        less = {"gpus_per_worker": 0, "accelerator_type": None}
        return spec.model_copy(update={"resources": spec.resources.model_copy(update=less)})
    given = attempts[-1].overrides if attempts else None
    if spec is None or given is None or given.memory is None:
        return spec
    resources = spec.resources.model_copy(update={"memory": given.memory})
    return spec.model_copy(update={"resources": resources})


def submission(seen: Observed, rayjob: RayJobFacts) -> Wait:
    """Why nothing is submitted yet to the cluster, which is ready."""
    if seen.submitter is not None and seen.submitter.waiting_reason:
        return of_pod(seen.submitter, None)
    if seen.submitter_problem:
        what = f"the pod that submits the job of RayJob {rayjob.name} to its cluster, which is ready,"
        reason = reason_of_refusal(seen.submitter_problem, otherwise="SubmitterNotCreated")
        return Wait(reason, refusal(what, seen.submitter_problem))
    return Wait("Submitting", f"the pods run; KubeRay submits the job of RayJob {rayjob.name}")


def _has_had(pod: PodFacts, seconds: float, *, now: datetime) -> bool:
    """Whether a pod has had its node for so long. The first seconds are worth no status of their own."""
    if pod.gone or pod.scheduled_at is None:
        return False
    return (now - pod.scheduled_at).total_seconds() >= seconds


def _is_unscheduled(pod: PodFacts, *, now: datetime) -> bool:
    """Whether nobody has looked for a node, or found one and waits for a volume that is only then made."""
    if pod.running or pod.gone or pod.node is not None or pod.created is None:
        return False
    return (now - pod.created).total_seconds() >= HEED_SECONDS


def hopeless(seen: Observed, *, now: datetime) -> Ending | None:
    """How the attempt ends where waiting does not help any more; None: it may."""
    for pod in seen.pods:
        reason = pod.waiting_reason or ""
        waited = pod.scheduled_at is not None and now - pod.scheduled_at >= PULL_GRACE
        told = f"pod {pod.name}: {reason}: {pod.waiting_message}".rstrip(": ")
        if reason in NEVER_PULLED or (reason in NOT_PULLED and waited):
            text = f"the image cannot be had ({told}): correct spec.resources.image or the pull secret"
            return Ending(ErrorClass.BAD_CONFIG, text, final=True)
        if reason in CRASHING and (waited or pod.out_of_memory):
            cause = ErrorClass.HOST_OUT_OF_MEMORY if pod.out_of_memory else ErrorClass.INTERNAL
            return Ending(cause, f"the container ends again and again ({told})")
    return None


# ---------------------------------------------------------------- a pod that cannot run


def of_pod(pod: PodFacts, spec: FineTuneJobSpec | None) -> Wait:
    """Why a pod that exists does not run, by its scheduler's or its kubelet's words."""
    reason = pod.waiting_reason or ""
    told = _quoted(pod.waiting_message) or reason
    whose = (
        f"container {pod.waiting_container} of pod {pod.name}" if pod.waiting_container else f"pod {pod.name}"
    )
    if reason in ("Unschedulable", "SchedulerError"):
        return _unscheduled(pod, told, spec)
    if reason == "SchedulingGated":
        gated = f"pod {pod.name} is held back by a scheduling gate: see who set it (kubectl get pod {pod.name} -o yaml)"
        return Wait(reason, gated)
    if reason in NOT_PULLED:
        text = (
            f"the image of {whose} cannot be pulled: {told}; correct spec.resources.image, or see that the registry "
            f"answers and the pull secret is right (after {int(PULL_GRACE.total_seconds() // 60)} minutes the job "
            "fails)"
        )
        return Wait(reason, text)
    if missing := _missing_object(pod.waiting_message):
        return missing(pod.name)
    if reason in CRASHING:
        which = f" -c {pod.waiting_container}" if pod.waiting_container else ""
        return Wait(reason, f"{whose} ends again and again: {told}; kubectl logs {pod.name}{which}")
    if reason in CONFIG_ERRORS:
        remedy = "correct spec.resources, or have the platform's pod defaults corrected"
        return Wait(reason, f"{whose} cannot be made: {told}; {remedy}")
    return Wait(reason, f"pod {pod.name} cannot start: {told}; kubectl describe pod {pod.name} says more")


def _unscheduled(pod: PodFacts, told: str, spec: FineTuneJobSpec | None) -> Wait:
    if missing := _missing_object(pod.waiting_message):
        return missing(pod.name)
    if any(words in pod.waiting_message for words in NO_VOLUME):
        text = (
            f"a PersistentVolumeClaim of pod {pod.name} has no volume yet: {told}; see kubectl get pvc, its storage "
            "class must be able to make one"
        )
        return Wait("VolumeClaimUnbound", text)
    asked = _asked(spec)
    if "Insufficient" in told:
        more = f"; {pod.beside}" if pod.beside else ""
        text = (
            f"no node has room for pod {pod.name}{asked}: {told}{more}; wait, add nodes, or ask for less in "
            "spec.resources"
        )
        return Wait("Unschedulable", text)
    if any(words in told for words in VOLUME_ELSEWHERE):
        text = (
            f"no node that pod {pod.name} may use reaches the volume of its PersistentVolumeClaim: {told}; see "
            "kubectl get pvc,pv, and use a claim whose volume is where the job's nodes are"
        )
        return Wait("VolumeElsewhere", text)
    if "node affinity" in told or "node selector" in told:
        wanted = f" {spec.resources.accelerator_type}" if spec and spec.resources.accelerator_type else ""
        text = (
            f"no node is of the kind that pod {pod.name} asks for: {told}; add nodes with accelerator{wanted}, or "
            "change spec.resources.acceleratorType"
            if wanted
            else f"no node is of the kind that pod {pod.name} asks for: {told}; see the pod's nodeSelector and affinity"
        )
        return Wait("NoMatchingNode", text)
    if "untolerated taint" in told:
        text = f"every node that could take pod {pod.name} is tainted: {told}; add nodes, or tolerations to the pods"
        return Wait("NodesTainted", text)
    return Wait("Unschedulable", f"the scheduler finds no node for pod {pod.name}{asked}: {told}")


def _asked(spec: FineTuneJobSpec | None) -> str:
    if spec is None:
        return ""
    resources = spec.resources
    gpus = f", {resources.gpus_per_worker} GPU" if resources.gpus_per_worker else ""
    return f" ({resources.cpu} CPU, {resources.memory} memory{gpus})"


_SECRET = re.compile(r"""secrets? "?([^"\s]+?)"? not found""")
_KEY = re.compile(r"couldn't find key (\S+) in (Secret|ConfigMap) (\S+)")
_CONFIG_MAP = re.compile(r"""configmaps? "?([^"\s]+?)"? not found""")
_CLAIM = re.compile(r"""persistentvolumeclaims? "?([^"\s]+?)"? (not found|is being deleted)""", re.IGNORECASE)


def _missing_object(message: str) -> Callable[[str], Wait] | None:
    """What to say of an object that the pod refers to and that is not there, or None."""
    if found := _SECRET.search(message):
        name = found.group(1).rpartition("/")[2]
        text = f"Secret {name} is missing: create it, or correct the secretRef in the spec that names it"
        return lambda pod: Wait("SecretMissing", f"pod {pod} cannot start: {text}")
    if found := _KEY.search(message):
        key, kind, name = found.group(1), found.group(2), found.group(3).rpartition("/")[2]
        text = f"{kind} {name} has no key {key}: add it, or have the platform's pod defaults name another one"
        return lambda pod: Wait(f"{kind}Missing", f"pod {pod} cannot start: {text}")
    if found := _CONFIG_MAP.search(message):
        name = found.group(1).rpartition("/")[2]
        text = f"ConfigMap {name} is missing: a run file is written again by itself, any other is yours to create"
        return lambda pod: Wait("ConfigMapMissing", f"pod {pod} cannot start: {text}")
    if found := _CLAIM.search(message):
        name = found.group(1).rpartition("/")[2]
        text = f"PersistentVolumeClaim {name} is missing: create it, or correct the pvc:// URI that names it"
        return lambda pod: Wait("VolumeClaimMissing", f"pod {pod} cannot start: {text}")
    return None


# ---------------------------------------------------------------- pods that cannot be made


def of_cluster(rayjob: RayJobFacts) -> Wait:
    """Why KubeRay's pods are refused, by the API server's words."""
    problem = rayjob.cluster_problem
    return Wait(
        reason_of_refusal(problem, otherwise="PodsNotCreated"),
        refusal(f"the pods of RayJob {rayjob.name}", problem),
    )


def reason_of_refusal(problem: str, *, otherwise: str) -> str:
    """One word for why the API server does not take an object."""
    if any(words in problem for words in ("exceeded quota", "failed quota", "status unknown for quota")):
        return "QuotaExceeded"
    if "violates PodSecurity" in problem:
        return "PodSecurity"
    if "LimitRange" in problem or "usage per Container" in problem or "usage per Pod" in problem:
        return "LimitRangeExceeded"
    return otherwise


# Of a quota on the number of objects, as the API server names it.
_COUNTED = re.compile(r"requested: (?:count/|(?:pods|services|configmaps|secrets)=)")
REMEDIES = {
    "QuotaExceeded": "wait until others have finished, ask for less in spec.resources, or have the ResourceQuota of "
    "the namespace raised",
    "CountExceeded": "wait until others have finished, delete objects that nobody needs, or have the ResourceQuota of "
    "the namespace raised",
    "PodSecurity": "have the platform's pod defaults corrected, or use a namespace that allows such pods",
    "Denied": "do what the policy asks for, in the spec or in the platform's pod defaults, or have such objects "
    "exempted",
    "WebhookAway": "have the webhook repaired, or the object exempted from it",
    "LimitRangeExceeded": "ask in spec.resources for what the LimitRange of the namespace allows, or have it changed",
}


def is_denied(problem: str) -> bool:
    """Whether a policy or a webhook says no, which is mostly about the platform's rules and not about the spec."""
    return "denied request: " in problem or "denied the request: " in problem


def refusal(what: str, problem: str) -> str:
    """The sentence for it. `what` cannot be created."""
    reason = "CountExceeded" if _COUNTED.search(problem) else reason_of_refusal(problem, otherwise="")
    if not reason:
        reason = (
            "Denied" if is_denied(problem) else "WebhookAway" if "failed calling webhook" in problem else ""
        )
    remedy = REMEDIES.get(reason, "correct what the message names")
    # What stands before it names a pod, another one at each try.
    _, _, why_not = problem.rpartition(" is forbidden: ")
    return f"{what} cannot be created: {_quoted(why_not)}; {remedy}"


def _quoted(message: str) -> str:
    """Another program's message as a part of a sentence of ours."""
    line = " ".join(message.split()).rstrip(".; ")
    # The scheduler repeats every node in the part on preemption, which helps nobody.
    for noise in (". no new claims to deallocate", ". preemption:", ", preemption:"):
        line = line.partition(noise)[0]
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
