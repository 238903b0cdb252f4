"""The operator is killed in each stage of a rollout: the next one goes on in that stage, with the same users."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.clients import Json
from tests.integration.rollout_operator import BAD, BETTER, GOOD, Lab, serves, training
from tests.integration.rollouts.webhooks import Receiver

pytestmark = [pytest.mark.integration, pytest.mark.faults]

EVALUATIONS = [{"name": "golden", "uri": "file:///golden.jsonl"}]
GATE = {"evalGate": {"evalRef": "golden", "minScore": 0.1}}


@dataclass
class Row:
    """How a rollout gets into a stage and stays there until it is let go."""

    steps: list[Json]
    keep: Callable[[Lab, Receiver], None]
    let_go: Callable[[Lab, Receiver], None]
    revision: str = BETTER
    ends: str = BETTER
    """Who serves in the end."""
    spec: dict[str, Any] = field(default_factory=dict)


def hooked(kind: str) -> Callable[[Receiver], list[Json]]:
    return lambda receiver: [{"name": "ask", "type": kind, "url": f"{receiver.url}/ask"}]


def slow_load(lab: Lab, _: Receiver) -> None:
    lab.engine.load_seconds = 3600


def load_now(lab: Lab, _: Receiver) -> None:
    for adapter in lab.engine.adapters.values():
        adapter["ready_at"] = 0.0


def endless_evaluation(lab: Lab, _: Receiver) -> None:
    lab.engine.evaluating = "Running"


def end_evaluation(lab: Lab, _: Receiver) -> None:
    lab.engine.evaluating = "Done"


def refuse(_: Lab, receiver: Receiver) -> None:
    receiver.statuses["/ask"] = 403


def accept(_: Lab, receiver: Receiver) -> None:
    receiver.statuses.clear()


def lag(lab: Lab, _: Receiver) -> None:
    """One router takes no snapshot that has everybody at the candidate, or nobody any more."""
    lab.routers[1].deaf = True


def listen(lab: Lab, _: Receiver) -> None:
    lab.routers[1].deaf = False


def end_job(lab: Lab, _: Receiver) -> None:
    lab.kubectl.apply(training("tickets"))
    lab.end_job("tickets", BETTER)


def unload_now(lab: Lab, _: Receiver) -> None:
    """The former revision, which is loaded until now, is not kept any longer."""
    assert lab.engine.unloads == []
    delays = {"scaleDownDelaySeconds": 0, "abortScaleDownDelaySeconds": 0}
    spec = {"strategy": {"canary": delays}}
    lab.kubectl("patch", "adep", "bot", "--type=merge", "-p", json.dumps({"spec": spec}))
    lab.wait(lambda s: s.get("stage") == "Succeeded")
    assert lab.engine.unloads == [f"bot--{GOOD}"]


def nothing(lab: Lab, _: Receiver) -> None:
    return


ROWS: dict[str, Row] = {
    "Initializing": Row(
        [{"setWeight": 30}], nothing, end_job, spec={"adapter": {"fineTuneJobRef": {"name": "tickets"}}}
    ),
    "Loading": Row([{"setWeight": 30}], slow_load, load_now),
    "Validating": Row(
        [GATE, {"setWeight": 30}], endless_evaluation, end_evaluation, spec={"evaluations": EVALUATIONS}
    ),
    "Shadowing": Row([{"setMirror": {"percent": 50, "duration": "6s"}}, {"setWeight": 30}], nothing, nothing),
    "Canary": Row([{"setWeight": 30}, {"pause": {}}], nothing, lambda lab, _: lab.annotate("promote/1")),
    "WaitingPromotion": Row([{"setWeight": 30}], refuse, accept, spec={"webhooks": "confirm-promotion"}),
    "Promoting": Row([{"setWeight": 30}], lag, listen),
    "Aborting": Row([{"setWeight": 30}, {"pause": {}}], lag, listen, revision=BAD, ends=GOOD),
    "Finalising": Row([{"setWeight": 30}], nothing, unload_now),
}


@pytest.mark.parametrize("stage", ROWS)
def test_the_operator_may_be_killed_in_every_stage(lab: Lab, receiver: Receiver, stage: str) -> None:
    row = ROWS[stage]
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(lambda revision: revision == BAD, rate=100)
    late = stage in ("Promoting", "Aborting")
    if not late:
        row.keep(lab, receiver)
    spec = dict(row.spec)
    if "webhooks" in spec:
        spec["webhooks"] = hooked(spec["webhooks"])(receiver)
    steps = [*row.steps, {"pause": {"duration": "2s"}}] if stage == "Promoting" else row.steps
    lab.deploy(row.revision, strategy={"canary": {"steps": steps}}, **spec)
    if late:
        lab.wait(lambda s: s.get("weights", {}).get("candidate") == 30 and s["weights"]["verified"])
        row.keep(lab, receiver)
    before = lab.wait(lambda s: s.get("stage") == stage)
    if stage == "Promoting":
        before = lab.wait(lambda s: s["weights"]["candidate"] == 100)
    elif stage == "Canary":
        before = lab.wait(lambda s: s["weights"]["candidate"] == 30 and s["weights"]["verified"])
    elif stage == "Finalising":
        before = lab.wait(lambda s: s["stableRevision"] == BETTER and s["weights"]["verified"])
    routes = [router.route("bot") for router in lab.routers]
    lab.kill()
    time.sleep(1)
    if stage not in ("Promoting", "Aborting"):
        assert [router.weight("bot") for router in lab.routers] == [r.weight if r else None for r in routes]
    asked = lab.engine.asked
    lab.start()
    lab.eventually(lambda: lab.engine.asked > asked + 1, seconds=60)  # passes of the next operator
    after = lab.status()
    assert after["rolloutStartTime"] == before["rolloutStartTime"]
    if stage != "Shadowing":
        assert after["stage"] == stage, after["message"]
        assert after["weights"]["candidate"] == before["weights"]["candidate"]
    row.let_go(lab, receiver)
    ended = serves(row.ends) if row.ends == row.revision else lambda s: s.get("stage") == "Failed"
    status = lab.wait(ended, seconds=90)
    assert status["stableRevision"] == row.ends, status["message"]
    assert lab.failed_requests == 0
    assert lab.engine.loads == [f"bot--{GOOD}", f"bot--{row.revision}"], "nothing was loaded twice"
    endings = [entry["completionStatus"] for entry in status["history"]]
    assert endings == ["Promoted" if row.ends == row.revision else "Aborted", "Promoted"]
    lab.eventually(lambda: lab.told().count("RolloutStarted") == 2)
