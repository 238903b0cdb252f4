"""Why a job waits: one word, one sentence with a remedy, for everything that can stand in the way."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core import waits
from finetune_operator.core.facts import Observed, PodFacts
from finetune_operator.reconcile import pod_facts
from tests.unit.operator.stories import START, Story, rayjob

QUOTA = (
    'pods "triage-a1-head" is forbidden: exceeded quota: small, requested: cpu=4, used: cpu=8, limited: cpu=8'
)
NODES = "0/3 nodes are available: "
PREEMPTION = (
    " no new claims to deallocate, preemption: 0/3 nodes are available: "
    "3 No preemption victims found for incoming pod."
)
SECURITY = (
    'pods "x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'
)


def told(pod: PodFacts | None = None, spec: dict[str, Any] | None = None, **more: Any) -> tuple[str, str]:
    """Reason and message of a job whose attempt was created and does not run."""
    story = Story(spec).started()
    pods = [pod] if pod else []
    plan = story.step(rayjob=rayjob(**({"deployment": "Initializing"} | more)), pods=pods)
    assert plan.status.phase is Phase.PROVISIONING
    assert plan.requeue_after is not None
    assert plan.requeue_after <= (15 if pods else 60), "a pod's events are asked for, a RayJob's status comes"
    ready = {c.type: c for c in plan.status.conditions}["ResourcesReady"]
    assert (ready.status, ready.reason, ready.message) == ("False", plan.status.reason, plan.status.message)
    return plan.status.reason or "", plan.status.message or ""


def pod(reason: str, message: str, **more: Any) -> PodFacts:
    return PodFacts("triage-a1-head", False, reason, message, scheduled_at=START, **more)


GPU = {"resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4", "fitCheck": "Skip"}}


@pytest.mark.parametrize(
    ("reason", "message", "word", "parts"),
    [
        (
            "Unschedulable", NODES + "3 Insufficient nvidia.com/gpu." + PREEMPTION,
            "Unschedulable",
            ("no node has room", "1 CPU, 4Gi memory, 1 GPU", "3 Insufficient nvidia.com/gpu;", "ask for less"),
        ),
        (
            "Unschedulable", NODES + "3 node(s) didn't match Pod's node affinity/selector." + PREEMPTION,
            "NoMatchingNode", ("NVIDIA-L4", "spec.resources.acceleratorType"),
        ),
        (
            "Unschedulable", NODES + "3 node(s) had untolerated taint {gpu: only}.",
            "NodesTainted", ("tainted", "tolerations"),
        ),
        (
            "Unschedulable", NODES + 'persistentvolumeclaim "files" not found. not found',
            "VolumeClaimMissing", ("PersistentVolumeClaim files is missing", "create it", "pvc://"),
        ),
        (
            "Unschedulable", NODES + "pod has unbound immediate PersistentVolumeClaims.",
            "VolumeClaimUnbound", ("no volume yet", "storage class"),
        ),
        (
            "SchedulerError", 'running PreBind plugin "VolumeBinding": binding volumes: context deadline exceeded',
            "VolumeClaimUnbound", ("no volume yet", "kubectl get pvc"),
        ),
        (
            "Unschedulable", NODES + "2 node(s) didn't find available persistent volumes to bind.",
            "VolumeClaimUnbound", ("no volume yet",),
        ),
        (
            "Unschedulable", NODES + "1 node(s) didn't match PersistentVolume's node affinity.",
            "VolumeElsewhere", ("reaches the volume", "kubectl get pvc,pv"),
        ),
        (
            "Unschedulable", NODES + "3 node(s) had volume node affinity conflict.",
            "VolumeElsewhere", ("reaches the volume",),
        ),
        ("SchedulingGated", "", "SchedulingGated", ("scheduling gate",)),
        (
            "ImagePullBackOff", 'Back-off pulling image "trainer:2"',
            "ImagePullBackOff", ("cannot be pulled", "trainer:2", "pull secret", "10 minutes"),
        ),
        (
            "CreateContainerConfigError", 'secret "hf-token" not found',
            "SecretMissing", ("Secret hf-token is missing", "secretRef"),
        ),
        (
            "CreateContainerConfigError", "couldn't find key token in Secret team/hf",
            "SecretMissing", ("Secret hf has no key token: add it", "pod defaults"),
        ),
        (
            "CreateContainerConfigError", "couldn't find key region in ConfigMap team/site",
            "ConfigMapMissing", ("ConfigMap site has no key region",),
        ),
        (
            "CreateContainerConfigError", "container has runAsNonRoot and image will run as root",
            "CreateContainerConfigError", ("will run as root", "spec.resources", "pod defaults"),
        ),
        (
            "FailedMount", 'MountVolume.SetUp failed for volume "run-file" : configmap "triage-a1" not found',
            "ConfigMapMissing", ("ConfigMap triage-a1 is missing",),
        ),
        (
            "FailedMount", 'MountVolume.SetUp failed for volume "s" : secret "team/store" not found',
            "SecretMissing", ("Secret store is missing",),
        ),
        ("CrashLoopBackOff", "back-off 10s restarting", "CrashLoopBackOff", ("again and again", "kubectl logs")),
        ("CrashLoopBackOff", "", "CrashLoopBackOff", ("again and again: CrashLoopBackOff; kubectl logs",)),
        ("RunContainerError", "no such device", "RunContainerError", ("no such device", "spec.resources")),
        ("FailedCreatePodSandBox", "no network", "FailedCreatePodSandBox", ("no network", "kubectl describe pod")),
    ],
)  # fmt: skip
def test_a_pod_that_does_not_start_says_why_and_what_to_do(
    reason: str, message: str, word: str, parts: tuple[str, ...]
) -> None:
    found, text = told(pod(reason, message), GPU)
    assert found == word
    for part in parts:
        assert part in text
    assert "preemption:" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("problem", "word", "remedy"),
    [
        (QUOTA, "QuotaExceeded", "ask for less in spec.resources"),
        (
            'services "x" is forbidden: exceeded quota: small, requested: services=1, used: services=5',
            "QuotaExceeded",
            "; wait until others have finished, delete objects that nobody needs",
        ),
        (
            'pods "x" is forbidden: exceeded quota: small, requested: count/pods=1, used: count/pods=5',
            "QuotaExceeded",
            "delete objects that nobody needs",
        ),
        ('pods "x" is forbidden: status unknown for quota: small, resources: cpu', "QuotaExceeded", "wait"),
        (SECURITY, "PodSecurity", "platform's pod defaults"),
        ("maximum memory usage per Container is 1Gi, but limit is 4Gi", "LimitRangeExceeded", "LimitRange"),
        (
            "minimum memory usage per Container is 8Gi, but request is 4Gi",
            "LimitRangeExceeded",
            "; ask in spec.resources for what the LimitRange of the namespace allows",
        ),
        (
            "ValidatingAdmissionPolicy 'costs' with binding 'costs' denied request: every pod needs a label",
            "PodsNotCreated",
            "; do what the policy asks for, in the spec or in the platform's pod defaults",
        ),
        (
            'admission webhook "validate.example.com" denied the request: no label',
            "PodsNotCreated",
            "; do what the policy asks for",
        ),
        ('failed calling webhook "x": connection refused', "PodsNotCreated", "; have the webhook repaired"),
        ('serviceaccount "x" not found', "PodsNotCreated", "correct what the message names"),
    ],
)
def test_pods_that_cannot_be_made_say_why(problem: str, word: str, remedy: str) -> None:
    found, text = told(cluster_problem=problem)
    assert found == word
    assert remedy in text
    assert problem.rpartition(" is forbidden: ")[2] in text
    assert " is forbidden: " not in text, "it names a pod, another one at each try"


def test_a_rayjob_that_nobody_looks_at_names_kuberay_within_15_seconds() -> None:
    story = Story().started()
    unseen = rayjob("", known_to_kuberay=False, created=story.now)
    plan = story.step(rayjob=unseen, after=12)
    assert plan.status.reason == "Provisioning"
    assert plan.requeue_after == 12
    plan = story.step(rayjob=unseen)
    assert plan.status.reason == "KubeRayUnavailable"
    assert "see that its operator runs" in (plan.status.message or "")
    label = "app.kubernetes.io/component=kuberay-operator"  # the same with Helm and with kustomize
    assert label in (plan.status.message or "")


def test_kuberays_own_retry_is_told_with_the_failure_that_it_is_for() -> None:
    log = "Job entrypoint command failed with exit code 74, last available logs:\ns3://bucket: timed out"
    reason, message = told(deployment="Retrying", job="FAILED", reason="AppFailed", message=log)
    text = "KubeRay starts RayJob triage-a1 again by itself: its backoffLimit was changed"
    assert reason == "RayJobRetrying"
    assert message == f"{text}; it had ended: the trainer ended with exit code 74: s3://bucket: timed out"
    assert told(deployment="Retrying")[1] == text


def test_a_job_is_looked_at_only_as_often_as_time_alone_can_change_why_it_waits() -> None:
    story = Story().started()
    quiet = story.step(rayjob=rayjob("Initializing", created=story.now), after=12)
    assert quiet.requeue_after == 12, "by then there ought to be a pod"
    quiet = story.step(rayjob=rayjob("Initializing", created=START))
    assert quiet.requeue_after == 60, "the next status of the RayJob comes by itself"
    refused = rayjob("Initializing", created=START, cluster_problem=QUOTA)
    assert story.step(rayjob=refused).requeue_after == 10, "of the end of that no watch may tell"
    runs = PodFacts("triage-a1-head", True)
    assert story.step(rayjob=rayjob("Initializing", created=START), pods=[runs]).requeue_after == 60


POD = PodFacts("triage-a1-head", False, scheduled_at=START, node="n1")
CRASHES = replace(POD, waiting_reason="CrashLoopBackOff")


@pytest.mark.parametrize(
    ("pod", "minutes", "end"),
    [
        (replace(POD, waiting_reason="InvalidImageName"), 0, (ErrorClass.BAD_CONFIG, True)),
        (replace(POD, waiting_reason="ErrImagePull"), 9, None),
        (replace(POD, waiting_reason="ErrImagePull"), 10, (ErrorClass.BAD_CONFIG, True)),
        (CRASHES, 9, None),
        (CRASHES, 10, (ErrorClass.INTERNAL, False)),
        (replace(CRASHES, out_of_memory=True), 0, (ErrorClass.HOST_OUT_OF_MEMORY, False)),
        (replace(POD, waiting_reason="ContainerCreating"), 99, None),
        (replace(POD, out_of_memory=True), 99, None),
    ],
)  # fmt: skip
def test_what_is_not_waited_for_any_longer(
    pod: PodFacts, minutes: int, end: tuple[ErrorClass, bool] | None
) -> None:
    now = START + timedelta(minutes=minutes)
    found = waits.hopeless(Observed(job=Story().job, pods=[pod]), now=now)
    assert (None if found is None else (found.error_class, found.final)) == end
    assert found is None or f"(pod triage-a1-head: {pod.waiting_reason})" in found.message


@pytest.mark.parametrize(
    ("facts", "pods", "age", "podless"),
    [
        ({}, [], 12, True),
        ({}, [], 11, False),
        ({}, [POD], 99, False),
        ({"cluster_problem": QUOTA}, [], 99, False),
        ({"deployment": "Running"}, [], 99, False),
        ({"created": None}, [], 99, False),
    ],
)
def test_kubernetes_is_asked_why_there_is_no_pod_where_there_should_be_one(
    facts: dict[str, Any], pods: list[PodFacts], age: int, podless: bool
) -> None:
    known: dict[str, Any] = {"deployment": "Initializing", "created": START}
    assert waits.is_podless(rayjob(**known | facts), pods, now=START + timedelta(seconds=age)) is podless


def test_a_pod_that_is_quick_costs_no_status_of_its_own() -> None:
    story = Story().started()
    slow = PodFacts("triage-a1-head", False, scheduled_at=story.now, node="n1")
    before = story.step(rayjob=rayjob("Initializing"), after=9).status
    assert story.step(rayjob=rayjob("Initializing"), pods=[slow], after=1).status == before
    assert "starts on node n1" in (
        story.step(rayjob=rayjob("Initializing"), pods=[slow]).status.message or ""
    )
    for quick in (replace(slow, running=True), replace(slow, gone=True), replace(slow, scheduled_at=None)):
        assert "starts on node" not in (
            story.step(rayjob=rayjob("Initializing"), pods=[quick]).status.message or ""
        )


def test_what_other_containers_of_the_pod_ask_for_is_told_where_there_is_no_room() -> None:
    submitter = {"name": "ray-job-submitter", "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}}}
    proxy = {"name": "proxy", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}}
    setup = {"name": "setup", "resources": {"requests": {"cpu": "1"}}}
    head = {"name": "ray-head", "resources": {"requests": {"cpu": "1"}}}
    scheduled = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient cpu",
    }
    pending = body({"conditions": [scheduled]}) | {
        "spec": {
            "containers": [head, submitter, {"name": "idle"}],
            "initContainers": [setup, proxy],
        }
    }
    _, text = told(pod_facts.pod_facts(pending))
    asked = (
        "its container ray-job-submitter asks for 500m cpu, 200Mi memory more; its container proxy asks for 100m cpu "
        "more; wait"
    )
    assert asked in text


@pytest.mark.parametrize(
    ("waiting", "part"),
    [
        ({"reason": "CrashLoopBackOff"}, "container proxy of pod p ends again and again"),
        ({"reason": "CrashLoopBackOff"}, "kubectl logs p -c proxy"),
        ({"reason": "ErrImagePull", "message": "no proxy:1"}, "the image of container proxy of pod p cannot"),
    ],
)
def test_the_container_that_does_not_run_is_named(waiting: dict[str, str], part: str) -> None:
    statuses = [
        {"name": "ray-head", "state": {"running": {}}},
        {"name": "proxy", "state": {"waiting": waiting}},
    ]
    assert part in told(pod_facts.pod_facts(body({"containerStatuses": statuses})))[1]


def test_a_pod_that_no_scheduler_speaks_of_says_what_to_look_at() -> None:
    """Its scheduler does not run, or it found a node and waits for a volume that is made for it only then."""
    story = Story().started()
    silent = PodFacts("triage-a1-head", False, created=story.now)
    assert story.step(rayjob=rayjob("Initializing"), pods=[silent], after=12).status.reason == "Provisioning"
    status = story.step(rayjob=rayjob("Initializing"), pods=[silent]).status
    assert status.reason == "NotScheduled"
    assert "kubectl get pvc; kubectl describe pod triage-a1-head" in (status.message or "")
    placed = replace(silent, node="n1")
    assert story.step(rayjob=rayjob("Initializing"), pods=[placed]).status.reason == "Provisioning"


def test_a_pod_in_which_ray_does_not_become_ready_is_named() -> None:
    story = Story().started()
    runs = PodFacts("triage-a1-head", True, scheduled_at=story.now, node="n1")
    early = story.step(rayjob=rayjob("Initializing"), pods=[runs], after=120).status
    assert early.message == "RayJob triage-a1 starts"
    late = story.step(rayjob=rayjob("Initializing"), pods=[runs]).status
    assert "pod triage-a1-head runs on node n1, and Ray in it is not ready" in (late.message or "")


def test_a_pod_whose_container_was_started_again_says_how_it_ended() -> None:
    """In between, the kubelet says CrashLoopBackOff; as Ray starts for the second time, the pod is as any other."""
    pod = PodFacts("triage-a1-head", running=True, restarted="Error, exit code 1")
    status = Story().started().step(rayjob=rayjob("Initializing"), pods=[pod]).status
    assert status.phase is Phase.PROVISIONING
    assert "its container ended (Error, exit code 1); kubectl logs --previous" in (status.message or "")


def test_a_very_long_message_is_cut() -> None:
    _, text = told(pod("Unschedulable", NODES + "Insufficient cpu " * 5000))
    assert len(text) < 1200


# ---------------------------------------------------------------- from the wire


def body(status: dict[str, Any]) -> dict[str, Any]:
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}
    return {
        "metadata": {"name": "p", "namespace": "n", "uid": "u"},
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Pending", "conditions": [scheduled], **status},
    }


CREATING = {
    "containerStatuses": [{"name": "ray-head", "state": {"waiting": {"reason": "ContainerCreating"}}}]
}


def test_only_a_pod_that_has_a_node_and_says_nothing_is_stuck() -> None:
    later = START + timedelta(seconds=6)
    assert pod_facts.is_stuck(pod_facts.pod_facts(body(CREATING)), now=later)
    assert not pod_facts.is_stuck(pod_facts.pod_facts(body(CREATING)), now=START + timedelta(seconds=4))
    assert not pod_facts.is_stuck(pod_facts.pod_facts(body({"conditions": []})), now=later)
    assert not pod_facts.is_stuck(pod_facts.pod_facts(body({"phase": "Running"})), now=later)
    pulling = {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
    assert not pod_facts.is_stuck(pod_facts.pod_facts(body(pulling)), now=later)


def test_the_newest_warning_tells_why_a_volume_is_not_there() -> None:
    events: list[dict[str, Any]] = [
        {
            "type": "Warning",
            "reason": "FailedMount",
            "message": "old",
            "lastTimestamp": "2026-01-01T12:00:00Z",
        },
        {"type": "Normal", "reason": "Pulling", "message": "x", "lastTimestamp": "2026-01-01T12:09:00Z"},
        {
            "type": "Warning",
            "reason": "FailedMount",
            "message": "new",
            "eventTime": "2026-01-01T12:00:01.000001Z",
            "series": {"lastObservedTime": "2026-01-01T12:05:00Z"},
        },
    ]
    pod = pod_facts.pod_facts(body(CREATING), warning=pod_facts.newest_warning(events))
    assert (pod.waiting_reason, pod.waiting_message) == ("FailedMount", "new")
    assert pod_facts.newest_warning([events[1]]) is None


def test_a_pod_that_found_no_node_at_first_and_has_one_now_does_not_wait_for_one() -> None:
    """A cluster that grows: the node comes, and what takes minutes from then on is the image."""
    event = {"type": "Warning", "reason": "FailedScheduling", "message": NODES + "1 Insufficient cpu."}
    pod = pod_facts.pod_facts(body(CREATING), warning=pod_facts.newest_warning([event]))
    assert pod.waiting_reason is None


def test_an_init_container_counts_too() -> None:
    waiting = {"initContainerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "m"}}}]}
    assert pod_facts.pod_facts(body(waiting)).waiting_reason == "ErrImagePull"
