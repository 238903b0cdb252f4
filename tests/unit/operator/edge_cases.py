"""What KubeRay can show of a RayJob, and what the job must become: one row for each case.

Statuses marked `SEEN` were recorded from KubeRay 1.6.2 with real pods; those marked `READ` follow from
its source (1.7).
`edge_pages` plays every row and writes docs/failure-modes.md from what comes out; the test compares it with `expect`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

SEEN, READ = "seen", "read"
# Which test brings a case about, with a real API server, KubeRay, Ray and trainer: on the laptop cluster, in module
# tests/integration/test_attempts.py unless another one is named, or in tests/cluster on real pods.
PROVOKED = {
    "1": "test_jobs_that_cannot_start_say_why_and_end_as_they_must",
    "3": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "4": "cluster/states.a_submission_that_fails_is_tried_again",
    "6": "cluster/test_faults.a_killed_submitter_costs_one_interval_at_most",
    "7a": "test_jobs_that_cannot_start_say_why_and_end_as_they_must",
    "7e": "cluster/states.a_pod_with_too_little_memory_gets_more",
    "8b": "test_a_ray_job_that_is_stopped_in_the_dashboard_is_cancelled",
    "10": "test_job_lifecycle.test_apply_trains_and_publishes_an_artifact",
    "11": "cluster/test_faults.a_killed_head_pod_costs_one_interval_at_most",
    "12a": "test_what_ends_a_process_and_how_the_job_goes_on",
    "13": "cluster/test_sidecar.a_killed_head_pod_costs_one_interval_at_most",
    "14": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "15": "cluster/test_faults.a_deleted_submitter_costs_nothing",
    "16": "cluster/states.a_dashboard_that_never_answers_is_given_up",
    "17b": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "18": "test_a_quota_is_named_and_waited_for",
    "19a": "cluster/states.an_image_that_cannot_be_pulled_is_named",
    "20": "test_kueue.test_a_full_queue_lets_the_next_one_in_when_there_is_room",
    "21": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "23": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "25": "test_what_ends_a_process_and_how_the_job_goes_on",
    "26": "test_kuberay_is_away_when_it_is_needed",
    "27": "test_a_killed_job_comes_to_its_end_and_time_to_live_removes_all_but_the_artifact",
    "28": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "29": "test_a_killed_job_comes_to_its_end_and_time_to_live_removes_all_but_the_artifact",
    "30": "test_kuberay_is_away_when_it_is_needed",
    "32": "test_what_happens_to_its_objects_and_how_the_job_goes_on",
    "33": "test_kueue.test_a_stopped_queue_is_named_and_holds_what_runs",
    "35": "cluster/test_sidecar.a_job_that_fails_at_once_does_not_hang",
}
# What it would take for the others.
NEEDS = {
    "2": "a correction in the moment before the RayJob is deleted",
    "5": "KubeRay's grace period to run out while the trainer has ended",
    "7b": "a GPU",
    "7c": "minutes of a store that is away",
    "7d": "a loss that is not finite",
    "8a": "a trainer that is stopped before it hears signals; 8b is what happens else",
    "9": "KubeRay's grace period to run out while the trainer has ended",
    "12b": "KubeRay 1.7",
    "17a": "a trainer that goes without a word, and a KubeRay that is quicker than its deletion is seen",
    "19b": "ten minutes",
    "22": "a changed backoffLimit, and a suspension in the moment of the retry",
    "24": "a changed backoffLimit",
    "31": "a message that has become untrue since",
    "34": "a second cluster",
}
LOGS = "last available logs (truncated to 20,000 chars):\n"


@dataclass(frozen=True)
class EdgeCase:
    id: str
    title: str
    status: Json | None
    """status of the RayJob; None: there is no RayJob."""
    expect: str
    """`<phase>/<reason>` after the first pass, then ` -> ` and how it goes on (see edge_pages.OUTCOMES)."""
    meaning: str
    """Why this is right, for people."""
    known: str = READ
    before: str = "training"
    """What the operator knew: new, created, running (no report yet), training, exporting, finished."""
    rayjob: Json = field(default_factory=dict)
    """More of the RayJob than its status: labels, spec, finalizers, deletionTimestamp."""
    pods: tuple[Json, ...] = ()
    clusters: tuple[str, ...] = ()
    heard: bool = True
    """Whether the trainer's last report is fresh."""
    step: int | None = None
    """A report of this step comes together with the status."""
    goodbye: bool = False
    """The trainer's last word comes together with the status: it heard SIGTERM, saved, and ended with 75."""
    artifact: bool = False
    """A report of the committed artifact comes together with the status, or an inspection finds it."""
    later: int = 0
    """Seconds that have gone by."""
    spec: Json = field(default_factory=dict)


def status(deployment: str, job: str = "", reason: str = "", message: str = "", **more: Any) -> Json:
    told = {"jobDeploymentStatus": deployment, "jobStatus": job, "reason": reason, "message": message, **more}
    return {name: value for name, value in told.items() if value != ""}


def exited(code: int, log: str) -> Json:
    message = f"Job entrypoint command failed with exit code {code}, {LOGS}{log}"
    return status("Failed", "FAILED", "AppFailed", message, failed=1)


def pod(**more: Any) -> Json:
    return {
        "metadata": {"name": "triage-a1-head"},
        "spec": {"nodeName": "node-7"},
        "status": {"phase": "Running"},
    } | more


def waiting(reason: str, message: str) -> Json:
    container = {"name": "ray-head", "state": {"waiting": {"reason": reason, "message": message}}}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}
    return pod(status={"phase": "Pending", "conditions": [scheduled], "containerStatuses": [container]})


RUNNING = status("Running", "RUNNING")
BACKOFF = (
    "Job submission has failed. Reason: BackoffLimitExceeded. Message: Job has reached its backoff limit"
)
RAY_KILLS = (
    "Unexpected error occurred: 1 worker(s) were killed due to the node running low on memory. Memory on the node "
    "(IP: 10.244.0.9, ID: 37d3b51e) was 0.85GB used / 0.88GB limit (0.969240)\nOOM kill reason: Memory usage exceeded"
)
INVALID = status(
    "ValidationFailed", "", "ValidationFailed", "RayJob name should be no more than 47 characters"
)
QUOTA = (
    'pods "triage-a1-head" is forbidden: exceeded quota: small, requested: cpu=4, used: cpu=8, limited: cpu=8'
)
TAKEN = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "DeletionByTaintManager",
    "message": "spot reclaim",
}
PULL = waiting("ImagePullBackOff", 'Back-off pulling image "trainer:2"')
KUEUE = {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team-a"}}, "spec": {"suspend": True}}
HUNG = pod(
    status={
        "phase": "Running",
        "containerStatuses": [
            {"name": "ray-job-submitter", "state": {"terminated": {"exitCode": 65, "reason": "Error"}}}
        ],
    }
)

EDGE_CASES = (
    EdgeCase("1", "the spec is invalid for KubeRay from the beginning", INVALID,
             "Provisioning/Stopping -> deleted, Failed/BadConfig",
             "A mistake that no retry heals. The RayJob is deleted, because KubeRay and Kueue keep what it holds.",
             before="created"),
    EdgeCase("2", "an invalid RayJob is corrected by someone later", INVALID | {"message": "corrected since"},
             "Provisioning/Stopping -> deleted, Failed/BadConfig",
             "KubeRay never leaves ValidationFailed, so nothing is waited for.", before="created"),
    EdgeCase("3", "a running RayJob is edited to something invalid", INVALID | {"jobStatus": "RUNNING"},
             "Retrying/Lost -> deleted, attempt 2",
             "KubeRay leaves the cluster and its GPUs up. The RayJob is deleted; training goes on elsewhere."),
    EdgeCase("4", "the submission failed", status("Failed", "", "SubmissionFailed", BACKOFF),
             "Retrying/Lost -> attempt 2", "The cluster's fault: nothing of the trainer ran.", before="created"),
    EdgeCase("5", "the trainer succeeded and KubeRay calls it failed",
             status("Failed", "FAILED", "JobDeploymentStatusTransitionGracePeriodExceeded", "grace period exceeded"),
             "Evaluating/Inspecting -> inspected, Succeeded/ArtifactPublished",
             "The committed manifest counts, not a word in a status.", before="exporting", heard=False, artifact=True),
    EdgeCase("6", "the submitter died while the trainer works",
             status("Failed", "FAILED", "AppFailed", "Submitter completed but Ray job not found in RayCluster"),
             "Retrying/Lost -> attempt 2",
             "AppFailed without an exit code is not the trainer's word. The next attempt waits for the pods to go."),
    EdgeCase("7a", "the trainer refuses the data (exit code 65)", exited(65, "train.jsonl:7: no messages"),
             "Failed/BadData -> the end", "The user's mistake: no retry, the message names it.", SEEN),
    EdgeCase("7b", "the GPU's memory is not enough (exit code 80)", exited(80, "CUDA out of memory"),
             "Retrying/GpuOutOfMemory -> attempt 2 with 4 rows per forward pass",
             "Half the micro batch, twice the accumulation: the same global batch."),
    EdgeCase("7c", "the storage does not answer (exit code 74)", exited(74, "s3://bucket: timed out"),
             "Retrying/Storage -> attempt 2", "The infrastructure's fault, with backoff."),
    EdgeCase("7d", "the loss is not finite (exit code 82)", exited(82, "loss is nan at step 12"),
             "Failed/NotFinite -> the end",
             "It would happen again; the message proposes a learning rate. The last finite checkpoint stays."),
    EdgeCase("7e", "the pod's memory is not enough, as Ray's memory monitor sees first",
             status("Failed", "FAILED", "AppFailed", RAY_KILLS, failed=1),
             "Retrying/HostOutOfMemory -> attempt 2 with 8192Mi",
             "Ray kills the trainer before the kernel does: the next attempt has twice the memory.", SEEN),
    EdgeCase("8a", "the Ray job is stopped in the dashboard", status("Complete", "STOPPED"),
             "Cancelled/Cancelled -> the end", "Somebody wanted that: neither a success nor a failure to heal."),
    EdgeCase("8b", "the same, and the trainer has said goodbye before", status("Complete", "STOPPED"),
             "Retrying/Preempted -> Cancelled/Cancelled",
             "The trainer hears SIGTERM and cannot know who sent it; KubeRay tells before the next attempt may start.",
             SEEN, goodbye=True),
    EdgeCase("9", "a success with a reason of failure",
             status("Complete", "SUCCEEDED", "JobDeploymentStatusTransitionGracePeriodExceeded", "submitter hangs"),
             "Succeeded/ArtifactPublished -> the end", "The artifact is there; the reason says nothing.",
             artifact=True),
    EdgeCase("10", "the job status is over and the deployment status is not", status("Running", "SUCCEEDED"),
             "Evaluating/Exporting -> goes on", "KubeRay is not done; the phase stays until it is.", SEEN,
             before="exporting", heard=False),
    EdgeCase("11", "the head pod is lost (K8sJobMode, submitter without retries)",
             status("Failed", "RUNNING", "SubmissionFailed", BACKOFF, failed=1),
             "Retrying/Lost -> attempt 2", "The job status is stale at RUNNING: the deployment status decides.", SEEN),
    EdgeCase("12a", "the head pod is lost and KubeRay goes on saying RUNNING (HTTPMode before 1.7)", RUNNING,
             "Evaluating/Inspecting -> deleted, inspected, attempt 2",
             "Silence is the only sign. After deadlines.stallSeconds the attempt is given up.", later=1900),
    EdgeCase("12b", "the head pod is out of reach (HTTPMode, 1.7)",
             status("Failed", "RUNNING", "JobStatusCheckTimeoutExceeded", "job status check failed for 300 s"),
             "Retrying/Lost -> attempt 2", "The infrastructure's fault."),
    EdgeCase("13", "the head pod is lost (SidecarMode)",
             status("Failed", "RUNNING", "AppFailed", "Ray head pod not found."), "Retrying/Lost -> attempt 2",
             "AppFailed is KubeRay's word here, not the trainer's.", SEEN),
    EdgeCase("14", "the pod's node is reclaimed", status("Failed", "RUNNING", "SubmissionFailed", BACKOFF),
             "Retrying/Preempted -> attempt 2", "Preemption has a budget of its own, unlimited by default.",
             pods=(pod(status={"phase": "Running", "conditions": [TAKEN]}),)),
    EdgeCase("15", "someone deletes the submitter's Job", RUNNING,
             "Evaluating/Inspecting -> deleted, inspected, attempt 2", "KubeRay's status is frozen; silence decides.",
             later=1900),
    EdgeCase("16", "the dashboard never answers", status("Running"), "Retrying/Stalled -> deleted, attempt 2",
             "The pods run and no trainer starts: counted from when the pods ran.", before="running", later=1900),
    EdgeCase("17a", "the RayCluster is deleted by hand and KubeRay starts it again (HTTPMode)", RUNNING,
             "Running/Training -> goes on, 3 steps lost",
             "The trainer has gone on from its newest checkpoint within the attempt; what that lost is counted.",
             step=2),
    EdgeCase("17b", "the RayCluster or its head pod is deleted, and the trainer has time to say goodbye (HTTPMode)",
             RUNNING, "Retrying/Preempted -> deleted, attempt 2",
             "The checkpoint was saved just in time. KubeRay begins the same RayJob anew: after 10 s it is deleted.",
             goodbye=True),
    EdgeCase("18", "a quota forbids the pods",
             status("Initializing", rayClusterStatus={
                 "conditions": [{"type": "ReplicaFailure", "status": "True", "message": QUOTA}]}),
             "Provisioning/QuotaExceeded -> waits", "It starts once there is room; deadlines.startSeconds limits that.",
             before="created"),
    EdgeCase("19a", "the image cannot be pulled", status("Initializing"), "Provisioning/ImagePullBackOff -> waits",
             "Registries have outages: ten minutes of patience.", before="created", pods=(PULL,)),
    EdgeCase("19b", "the image cannot be pulled for ten minutes", status("Initializing"),
             "Provisioning/Stopping -> deleted, Failed/BadConfig", "The image or its pull secret is wrong.",
             before="created", pods=(PULL,), later=700),
    EdgeCase("20", "the RayJob is created suspended (Kueue)", status("Initializing"), "Queued/Queued -> waits",
             "Initializing is not admission.", before="created", rayjob=KUEUE),
    EdgeCase("21", "the RayJob is suspended while it runs", status("Suspended"),
             "Queued/RayJobSuspended -> waits, preemption 1",
             "The same attempt goes on when it is let go, from the checkpoint that was saved just in time.", SEEN,
             rayjob={"spec": {"suspend": True}}, goodbye=True),
    EdgeCase("22", "suspended while KubeRay retries", status("Retrying"), "Queued/Queued -> waits, preemption 1",
             "With backoffLimit 0 KubeRay does not retry; where a webhook changed that, the wish to hold counts.",
             rayjob=KUEUE),
    EdgeCase("23", "resumed: a new cluster, a new job id, the same RayJob", status("Initializing"),
             "Provisioning/Provisioning -> waits", "The same attempt; totalSeconds is ours and does not begin anew.",
             heard=False),
    EdgeCase("24", "KubeRay retries by itself",
             exited(74, "s3://bucket: timed out") | {"jobDeploymentStatus": "Retrying"},
             "Provisioning/RayJobRetrying -> waits",
             "Somebody changed backoffLimit. It is told with the reason of the failure, which KubeRay wipes a moment "
             "later.", heard=False),
    EdgeCase("25", "old pods are still there when the RayJob is over",
             status("Failed", "RUNNING", "SubmissionFailed", BACKOFF), "Retrying/Lost -> fenced",
             "No attempt starts while a pod of the job is left: it may still write.", SEEN,
             pods=(pod(metadata={"name": "triage-a1-head", "deletionTimestamp": "2026-01-01T12:00:00Z"}),)),
    EdgeCase("26", "the deletion of a RayJob is stuck at KubeRay's finalizer", INVALID | {"jobStatus": "RUNNING"},
             "Retrying/Lost -> fenced, names the finalizer", "Only its cluster's end makes another attempt safe.",
             rayjob={"metadata": {"deletionTimestamp": "2026-01-01T11:00:00Z"}}, clusters=("triage-a1-x7k2p",)),
    EdgeCase("27", "the RayJob is gone after the job's end", None, "Succeeded/ArtifactPublished -> nothing",
             "The result is in our status; nothing is started.", before="finished"),
    EdgeCase("28", "the RayJob is deleted while it runs", None, "Retrying/Lost -> attempt 2",
             "The infrastructure's fault; a job that is over never starts again.", SEEN),
    EdgeCase("29", "KubeRay's time to live deletes only the cluster", status("Complete", "SUCCEEDED"),
             "Succeeded/ArtifactPublished -> FineTuneJob deleted",
             "Our time to live deletes the FineTuneJob, and owner references everything that it owns.",
             before="finished", later=120, spec={"ttlSecondsAfterFinished": 100}),
    EdgeCase("30", "KubeRay does not run", {}, "Provisioning/KubeRayUnavailable -> waits",
             "Its finalizer is missing 15 s after the creation. The job goes on by itself.", before="created",
             rayjob={"metadata": {"finalizers": []}}, later=20),
    EdgeCase("31", "the message is old", RUNNING | {"message": "an old text"}, "Running/Training -> goes on",
             "Only the trainer's reports are signs of life; messages of KubeRay stay for hours.", later=3600, step=7),
    EdgeCase("32", "KubeRay copies labels to the RayCluster",
             status("Failed", "RUNNING", "SubmissionFailed", BACKOFF), "Retrying/Lost -> fenced",
             "That is how what is left of an attempt is found. Annotations are copied too, so we set none.",
             clusters=("triage-a1-x7k2p",)),
    EdgeCase("33", "Kueue evicts the workload", status("Suspended"), "Queued/Queued -> waits, preemption 1",
             "It waits in its queue again, as the same attempt.", rayjob=KUEUE),
    EdgeCase("34", "another cluster runs the RayJob (MultiKueue)", RUNNING, "Running/Training -> goes on",
             "Pods that are not here are no reason to stop.", step=7,
             rayjob={"metadata": {"finalizers": []}, "spec": {"managedBy": "kueue.x-k8s.io/multikueue"}}),
    EdgeCase("35", "SidecarMode: the trainer fails before the cluster is ready", status("Initializing"),
             "Provisioning/Stopping -> deleted, Failed/BadData",
             "KubeRay waits for ever, as the head pod is never ready. The submitter's container tells the exit code.",
             SEEN, before="created", pods=(HUNG,)),
)  # fmt: skip
