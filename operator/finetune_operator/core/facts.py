"""What is known of a job, and what is planned for it: the input and the output of `core.jobs.decide`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeAlias

from finetune_fit.prices import PriceTable
from finetune_operator.api.finetunejob import Artifact, FineTuneJobSpec, FineTuneJobStatus, Phase
from finetune_operator.core import reports

OVER = frozenset({"Complete", "Failed", "ValidationFailed"})  # KubeRay does nothing more with such a RayJob
RELEASED = frozenset({"Complete", "Failed"})  # ... and has deleted, or is deleting, its cluster


@dataclass(frozen=True)
class JobFacts:
    namespace: str
    name: str
    uid: str
    generation: int
    spec: FineTuneJobSpec | None
    """None where the stored spec cannot be read; without the fields that only a newer CRD has."""
    problem: str | None
    """Why not all of the spec could be read: no attempt begins then, and one that runs goes on."""
    status: FineTuneJobStatus
    deleting: bool = False
    orphans: bool = False
    """Whether its deletion is to leave what it owns (kubectl delete --cascade=orphan)."""
    action: str | None = None
    """Value of the annotation finetune.dev/action."""


@dataclass(frozen=True)
class RayJobFacts:
    name: str
    uid: str
    ours: bool
    """Whether our job owns it."""
    deployment_status: str = ""
    job_status: str = ""
    reason: str = ""
    message: str = ""
    of_a_namesake: bool = False
    """Whether an earlier FineTuneJob of the same name owns it; garbage collection is about to delete it."""
    created: datetime | None = None
    ended: datetime | None = None
    """When KubeRay saw its job end."""
    deleting_since: datetime | None = None
    suspended: bool = False
    """spec.suspend, which only Kueue or a person sets: we never do."""
    queue: str | None = None
    """Queue of Kueue that admits it."""
    managed_elsewhere: bool = False
    """Whether another controller than KubeRay runs it (spec.managedBy: MultiKueue)."""
    known_to_kuberay: bool = True
    """Whether KubeRay has looked at it: its finalizer is there."""
    cluster: str = ""
    """Name of its RayCluster, which may not be there yet."""
    cluster_problem: str = ""
    """Why the RayCluster cannot be made, or have its pods, for example a quota."""

    @property
    def is_over(self) -> bool:
        return self.deployment_status in OVER

    @property
    def is_held_back(self) -> bool:
        return not self.is_over and (self.suspended or self.deployment_status in ("Suspending", "Suspended"))


@dataclass(frozen=True)
class PodFacts:
    name: str
    running: bool
    waiting_reason: str | None = None
    waiting_message: str = ""
    waiting_container: str | None = None
    """The container that it waits for; None: it waits as a whole."""
    beside: str = ""
    """What its containers that are not the trainer's ask for: KubeRay's submitter, or what a platform adds."""
    created: datetime | None = None
    scheduled_at: datetime | None = None
    gone: bool = False
    """Whether its containers have ended for good: such a pod does nothing any more."""
    terminating: bool = False
    node: str | None = None
    submitter_exit_code: int | None = None
    """Exit code of KubeRay's container ray-job-submitter (SidecarMode), once it has ended."""
    out_of_memory: bool = False
    """Whether the kernel killed its trainer's container for its memory."""
    restarted: str = ""
    """How its trainer's container ended before the kubelet started it again."""
    disruption: str | None = None
    """Why the cluster takes the pod away (condition DisruptionTarget): preemption, eviction, a node that goes."""


@dataclass(frozen=True)
class WorkloadFacts:
    """Kueue's Workload for a RayJob."""

    name: str
    """Empty where we may not read it."""
    active: bool = True
    """False: Kueue or a person has taken it out of the queue (spec.active)."""
    quota_reserved: bool = False
    admitted: bool = False
    reason: str = ""
    """Of condition QuotaReserved: Pending, Inadmissible, ..."""
    message: str = ""
    evicted: str = ""
    """Why it had to go, while it has not been let in again: Preempted, PodsReadyTimeout, AdmissionCheck, ..."""
    evicted_message: str = ""
    checks: Sequence[str] = ()
    """Admission checks that are not ready, with what they say."""
    position: int | None = None
    """Place in the LocalQueue, from 1."""


@dataclass(frozen=True)
class UpstreamFacts:
    """A FineTuneJob that makes the model, the adapter or the reward model."""

    name: str
    exists: bool = True
    phase: Phase | None = None
    reason: str | None = None
    artifact: Artifact | None = None
    waits_for: Sequence[str] = ()
    """The jobs that it waits for in turn, the nearest first; on the way to the one that asks, where they wait in a
    circle."""
    objective: str | None = None


@dataclass(frozen=True)
class Observed:
    job: JobFacts
    rayjob: RayJobFacts | None = None
    """The RayJob of the current attempt."""
    inspection: RayJobFacts | None = None
    pods: Sequence[PodFacts] = ()
    """Pods of the current attempt; between two attempts, and before its RayJob is created, of any job of this name."""
    clusters: Sequence[str] = ()
    """RayClusters of the job; only looked up between two attempts."""
    submitter: PodFacts | None = None
    """KubeRay's pod that submits the job; only looked up where that takes long."""
    submitter_problem: str = ""
    """Why there is none, by the words of Kubernetes."""
    report: reports.Report | None = None
    """The latest report of the current attempt that came since the operator started."""
    reported_at: datetime | None = None
    listening_since: datetime | None = None
    """Since when reports are taken; before that, silence says nothing."""
    clock_is_behind: bool = False
    """Whether the clock was set back behind what the job has recorded: its time stands still until then."""
    kuberay_installed: bool = True
    kueue_installed: bool = True
    """Only looked up where spec.scheduling.queueName is set."""
    workload: WorkloadFacts | None = None
    """Kueue's Workload for the RayJob; only looked up while that is held back."""
    upstream: UpstreamFacts | None = None
    """The job of spec.model.fineTuneJobRef."""
    reward: UpstreamFacts | None = None
    """The job of spec.reward.fineTuneJobRef."""
    scripts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The ConfigMaps of reward functions that exist, with their keys; only looked up before the first attempt."""

    def with_status(self, status: FineTuneJobStatus) -> Observed:
        """The same facts after a part of the decision."""
        return replace(self, job=replace(self.job, status=status))


@dataclass(frozen=True)
class Defaults:
    output_uri: str | None
    image: str
    prices: PriceTable | None = None
    """What an hour of a GPU costs."""


@dataclass(frozen=True)
class CreateRayJob:
    """Create the run file and the RayJob of an attempt; refused by the API server where the RayJob exists."""

    name: str
    attempt: int
    inspect: bool = False


@dataclass(frozen=True)
class WriteRunFile:
    """Write the run file of an attempt again: somebody deleted it."""

    name: str
    attempt: int


@dataclass(frozen=True)
class DeleteRayJob:
    """Delete this RayJob, and no other of its name; its cluster and pods go with it."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the FineTuneJob itself: its time to live is over."""


Action: TypeAlias = CreateRayJob | WriteRunFile | DeleteRayJob | DeleteJob


@dataclass(frozen=True)
class Event:
    warning: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    status: FineTuneJobStatus
    actions: Sequence[Action] = ()
    events: Sequence[Event] = ()
    requeue_after: float | None = None
    """Seconds after which to look again; None: only when something changes."""
