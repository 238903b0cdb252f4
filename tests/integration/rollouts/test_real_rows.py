"""More rows of the matrix with the real engine, real adapters, the real router and the official client."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from finetune_local.cluster import Cluster
from tests.adapters import commit_artifact
from tests.clients import Json, Kubectl
from tests.clusters import pid_of
from tests.integration.rollout_operator import serves
from tests.integration.rollouts.test_real import Users, chat, deploy, publish, replies, serving, train, wait

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[3] / "examples" / "rollouts" / "shadow.yaml"
Artifact = tuple[Path, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    with serving(tmp_path_factory.mktemp("laptop"), tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An adapter that always answers in JSON."""
    return train(tiny_model, tmp_path_factory.mktemp("trained") / "good", replies('{"colour": "red"}'))


def copied(model: Path, of: Artifact, folder: Path) -> Artifact:
    """The same weights as another artifact, with a digest of its own (the manifest names the run)."""
    files = folder.with_suffix(".adapter")
    shutil.copytree(of[0], files, ignore=shutil.ignore_patterns("manifest.json", "*.md"))
    digest = commit_artifact(files, folder, base_uri=f"file://{model}", rank=16)
    return folder, digest


class TimedUsers(Users):
    """They note when a request was sent that failed."""

    def __init__(self, cluster: Cluster, model: str, **more: Any) -> None:
        self.failed: list[tuple[float, openai.APIError]] = []
        plain = more.pop("ask")

        def ask(client: openai.OpenAI, model: str, user: str) -> str:
            sent = time.monotonic()
            try:
                revision: str = plain(client, model, user)
            except openai.APIError as error:
                self.failed.append((sent, error))
                raise
            return revision

        super().__init__(cluster, model, ask=ask, **more)


def is_at(weight: float) -> Callable[[Json], bool]:
    return lambda s: s.get("weights", {}).get("candidate") == weight and s["weights"]["verified"]


def test_bad_then_good_then_superseded_then_back_without_a_failed_request(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, good: Artifact, tmp_path: Path
) -> None:
    spec: Json = {
        "analysis": {"interval": "1s", "guardrails": [{"name": "not-json", "event": "schema_invalid"}]},
        "traffic": {"outputSchema": {"type": "object", "required": ["colour"]}},
    }
    steps: list[Json] = [{"setWeight": 40}, {"pause": {"duration": "3s"}}]
    first = deploy(kubectl, good, *steps, **spec)
    wait(kubectl, serves(first))
    bad = train(tiny_model, tmp_path / "bad", replies("colour is red."))
    users = Users(cluster, f"bot-{kubectl.namespace}", ask=chat)
    try:
        spoilt = deploy(kubectl, bad, {"setWeight": 40}, {"pause": {}}, **spec)
        status = wait(kubectl, lambda s: s.get("stage") == "Failed", seconds=120)
        assert status["abort"]["reason"] == "GuardrailBreached"

        second = deploy(kubectl, copied(tiny_model, good, tmp_path / "second"), *steps, **spec)
        wait(kubectl, serves(second), seconds=120)

        waits: list[Json] = [{"setWeight": 40}, {"pause": {}}]
        third = deploy(kubectl, copied(tiny_model, good, tmp_path / "third"), *waits, **spec)
        wait(kubectl, is_at(40))
        fourth = deploy(kubectl, copied(tiny_model, good, tmp_path / "fourth"), *steps, **spec)
        wait(kubectl, lambda s: s.get("candidateRevision") == fourth)
        wait(kubectl, serves(fourth), seconds=120)

        second_again = deploy(kubectl, (tmp_path / "second", digest_of(tmp_path / "second")), *steps, **spec)
        assert second_again == second
        status = wait(kubectl, serves(second))
        users.answers.clear()
        time.sleep(2)
    finally:
        users.close()
    ends = [(entry["revision"], entry["completionStatus"]) for entry in status["history"]]
    assert ends == [
        (second, "FastRolledBack"),
        (fourth, "Promoted"),
        (third, "Superseded"),
        (second, "Promoted"),
        (spoilt, "Aborted"),
        (first, "Promoted"),
    ]
    assert users.failures == []
    assert set(users.answers) == {second}


def digest_of(folder: Path) -> str:
    return "sha256:" + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.faults
def test_an_engine_and_a_router_that_are_killed_in_a_canary_move_nobody(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path
) -> None:
    first = deploy(kubectl, publish(tiny_model, tmp_path / "first", seed=11))
    wait(kubectl, serves(first))
    steps: list[Json] = [{"setWeight": 30}, {"pause": {}}, {"setWeight": 60}]
    users = TimedUsers(cluster, f"bot-{kubectl.namespace}", ask=complete_soon)
    outages: list[tuple[float, float]] = []
    try:
        second = deploy(kubectl, publish(tiny_model, tmp_path / "second", seed=12), *steps)
        wait(kubectl, is_at(30))
        for part in ("engine", "router"):
            users.sides.clear()
            began = time.monotonic()
            os.kill(pid_of(cluster, part), signal.SIGKILL)
            wait_for_failure(users, began)
            cluster.up((part,))
            status = wait(kubectl, lambda s: is_at(30)(s) and loaded(s), seconds=120)
            wait_for_answers(users, first, second)
            outages.append((began, time.monotonic()))
            assert status["candidateRevision"] == second, "the candidate is not blamed for a killed process"
        kubectl("annotate", "adep", "bot", "finetune.dev/action=promote/1")
        wait(kubectl, serves(second), seconds=120)
        time.sleep(1)
    finally:
        users.close()
    outside = [
        (sent, error)
        for sent, error in users.failed
        if not any(began - 30 <= sent <= ended for began, ended in outages)
    ]
    assert outside == [], "no request fails because a rollout moved"
    statuses = {error.status_code for _, error in users.failed if isinstance(error, openai.APIStatusError)}
    assert statuses <= {502, 503}, statuses
    assert [user for user, met in users.sides.items() if len(met) > 1 and not met <= {first, second}] == []


def complete_soon(client: openai.OpenAI, model: str, user: str) -> str:
    answer = client.completions.with_raw_response.create(
        model=model, prompt="a red cup", max_tokens=3, user=user, timeout=20
    )
    return answer.headers["x-adapter-revision"]


def loaded(status: Json) -> bool:
    return any(c["type"] == "AdaptersLoaded" and c["status"] == "True" for c in status.get("conditions", []))


def wait_for_failure(users: TimedUsers, began: float) -> None:
    deadline = time.monotonic() + 30
    while not any(sent >= began for sent, _ in users.failed):
        assert time.monotonic() < deadline, "nobody noticed that it was killed"
        time.sleep(0.1)


def wait_for_answers(users: TimedUsers, *revisions: str) -> None:
    users.answers.clear()
    deadline = time.monotonic() + 60
    while min(users.answers[revision] for revision in revisions) < 3:
        assert time.monotonic() < deadline, users.answers
        time.sleep(0.1)


def test_an_example_is_rolled_out_for_real(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, good: Artifact, tmp_path: Path
) -> None:
    """examples/rollouts/shadow.yaml as it stands, but for the names of model and adapter, and minutes as seconds."""
    spec = yaml.safe_load(re.sub(r"\b(\d+)m\b", r"\1s", EXAMPLE.read_text()))["spec"]
    spec = {key: value for key, value in spec.items() if key not in ("baseModelRef", "adapter", "strategy")}
    steps = yaml.safe_load(re.sub(r"\b(\d+)m\b", r"\1s", EXAMPLE.read_text()))["spec"]["strategy"]["canary"][
        "steps"
    ]
    first = deploy(kubectl, good, *steps, **spec)
    wait(kubectl, serves(first))
    users = Users(cluster, f"bot-{kubectl.namespace}", ask=chat)
    seen: list[tuple[str, float, float]] = []
    try:
        second = deploy(kubectl, copied(tiny_model, good, tmp_path / "second"), *steps, **spec)

        def promoted(status: Json) -> bool:
            weights = status.get("weights", {})
            seen.append((status.get("stage", ""), weights.get("candidate", 0), weights.get("mirror", 0)))
            return serves(second)(status)

        status = wait(kubectl, promoted, seconds=150)
    finally:
        users.close()
    places = list(dict.fromkeys(seen))
    assert ("Shadowing", 0, 20) in places
    assert [weight for stage, weight, _ in places if stage == "Canary"][-1] == 50
    assert users.failures == []
    assert {check["name"]: check.get("dryRun") for check in status["analysis"]}["repetition"] is True
    assert min(users.answers[first], users.answers[second]) > 3
