"""What is known of a job, and what is planned for it: the input and the output of `core.jobs.decide`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core import reports

OVER = frozenset({"Complete", "Failed", "ValidationFailed"})  # KubeRay does nothing more with such a RayJob


@dataclass(frozen=True)
class JobFacts:
    namespace: str
    name: str
    uid: str
    generation: int
    spec: FineTuneJobSpec | None
    """None where the stored spec cannot be read; `problem` then says why."""
    problem: str | None
    status: FineTuneJobStatus
    deleting: bool = False


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

    @property
    def is_over(self) -> bool:
        return self.deployment_status in OVER


@dataclass(frozen=True)
class PodFacts:
    name: str
    running: bool
    waiting_reason: str | None = None
    waiting_message: str = ""


@dataclass(frozen=True)
class Observed:
    job: JobFacts
    rayjob: RayJobFacts | None = None
    """The RayJob of the current attempt."""
    inspection: RayJobFacts | None = None
    pods: Sequence[PodFacts] = ()
    report: reports.Report | None = None
    """The latest report of the current attempt that came since the operator started."""
    reported_at: datetime | None = None
    kuberay_installed: bool = True


@dataclass(frozen=True)
class Defaults:
    output_uri: str | None
    image: str


@dataclass(frozen=True)
class CreateRayJob:
    """Create the run file and the RayJob of an attempt; safe to do twice."""

    name: str
    attempt: int
    inspect: bool = False


@dataclass(frozen=True)
class Event:
    warning: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    status: FineTuneJobStatus
    actions: Sequence[CreateRayJob] = ()
    events: Sequence[Event] = ()
    requeue_after: float | None = None
    """Seconds after which to look again; None: only when something changes."""
