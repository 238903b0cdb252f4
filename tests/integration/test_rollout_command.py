"""`finetune rollout` as a user starts it, against a real API server; the tests write what the operator would write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import yaml

from finetune_local.cluster import Cluster
from finetune_operator.api.base import ACTION_ANNOTATION
from tests.clients import Json, Kubectl
from tests.clusters import api_server
from tests.commands import Command
from tests.unit.cli.rollouts import aborted, canary, paused, promoted
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

BOT: Json = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "AdapterDeployment",
    "metadata": {"name": "bot"},
    "spec": {"baseModelRef": {"name": "smollm2"}, "adapter": {"fineTuneJobRef": {"name": "tickets-2"}}},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server without the operator."""
    with api_server(tmp_path_factory.mktemp("api-server")) as running:
        yield running


class Rollouts(Command):
    """Runs `finetune rollout` in the test's namespace, and plays the operator."""

    def bot(self) -> Json:
        found = self.kubectl.get("adep", "bot")
        assert found is not None
        return found

    def wish(self) -> str | None:
        """What the operator is asked for."""
        annotations: dict[str, str] = self.bot()["metadata"].get("annotations") or {}
        return annotations.get(ACTION_ANNOTATION)

    def set_status(self, status: Json) -> None:
        """All of the status, about the spec as it is."""
        generation = self.bot()["metadata"]["generation"]
        patch = json.dumps({"status": {**status, "observedGeneration": generation}})
        self.kubectl("patch", "adep", "bot", "--subresource=status", "--type=merge", "-p", patch)

    def answer(self, *, refused: bool, message: str, seconds: float = 20) -> str:
        """Wait for a wish, answer it as the operator does, take the annotation away; return the wish."""
        wish = wait_until(self.wish, seconds=seconds, what="somebody asks for something")
        taken = {"value": wish, "pending": True, "refused": refused, "message": message}
        self.set_status({"lastAction": taken})
        self.kubectl("annotate", "adep", "bot", f"{ACTION_ANNOTATION}-")
        return wish


@pytest.fixture
def rollouts(kubectl: Kubectl) -> Rollouts:
    kubectl.apply(BOT)
    return Rollouts("rollout", kubectl)


def test_watch_follows_to_the_promotion(rollouts: Rollouts) -> None:
    process = rollouts.start("watch", "bot")
    assert process.stdout is not None
    assert "Pending" in process.stdout.readline()
    rollouts.set_status(canary()["status"])
    rollouts.set_status(paused("AwaitingApproval", "approve it")["status"])
    rollouts.set_status({"pauseConditions": None, **promoted()["status"]})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [line[10:] for line in out.splitlines()]
    assert "Progressing  Canary  2/4 pause  stable 1a2b3c4d 95%  candidate 9f8e7d6c 5%" in lines
    assert "paused AwaitingApproval: approve it" in lines
    assert out.splitlines()[-1] == "bot: Promoted after 4m30s, 9f8e7d6c serves bot"


def test_watch_of_a_rollback_ends_with_1_and_the_reason(rollouts: Rollouts) -> None:
    rollouts.set_status(aborted()["status"])
    text = rollouts("watch", "bot", code=1)
    assert "9f8e7d6c was rolled back (GuardrailBreached) at 5%" in text
    assert "9 of 100 answers failed" in text


def test_watch_does_not_end_by_the_status_of_an_older_spec(rollouts: Rollouts) -> None:
    rollouts.set_status(promoted()["status"])
    rollouts("watch", "bot")
    other = {"fineTuneJobRef": {"name": "tickets-3"}}
    rollouts.kubectl.apply({**BOT, "spec": {**BOT["spec"], "adapter": other}})
    assert "has not ended within 2s" in rollouts("watch", "bot", "--timeout", "2s", code=124)
    rollouts.set_status(promoted()["status"])
    rollouts("watch", "bot", "--timeout", "30s")


def test_watch_for_ever_goes_on_after_the_end(rollouts: Rollouts) -> None:
    rollouts.set_status(promoted()["status"])
    text = rollouts("watch", "bot", "--forever", "--timeout", "2s", code=124)
    assert "Healthy  Succeeded" in text


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_watch_prints_only_the_status_as_data(rollouts: Rollouts, output: str) -> None:
    rollouts.set_status(promoted()["status"])
    process = rollouts.start("watch", "bot", "-o", output)
    out, _ = process.communicate(timeout=60)
    read = json.loads(out) if output == "json" else yaml.safe_load(out)
    assert read["stableRevision"] == "9f8e7d6c"


def test_watch_shows_the_events(rollouts: Rollouts) -> None:
    bot = rollouts.bot()["metadata"]
    rollouts.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": "bot.1"},
            "involvedObject": {"kind": "AdapterDeployment"}
            | {key: bot[key] for key in ("name", "uid", "namespace")},
            "type": "Warning",
            "reason": "AdapterLoadFailed",
            "message": "rank 128 is more than 64",
            "lastTimestamp": "2026-01-01T00:00:00Z",
        }
    )
    rollouts.set_status(canary()["status"])
    text = rollouts("watch", "bot", "--timeout", "2s", code=124)
    assert "event Warning AdapterLoadFailed: rank 128 is more than 64" in text
    assert "Warning AdapterLoadFailed: rank 128 is more than 64" in rollouts("describe", "bot")


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        (("promote", "bot"), "promote"),
        (("promote", "bot", "--full"), "promote-full"),
        (("abort", "bot"), "abort"),
        (("pause", "bot"), "pause"),
        (("resume", "bot"), "resume"),
        (("retry", "bot"), "retry"),
        (("undo", "bot"), "rollback"),
    ],
)
def test_verbs_ask_by_annotation_and_tell_the_answer(
    rollouts: Rollouts, arguments: tuple[str, ...], wish: str
) -> None:
    rollouts.set_status(canary()["status"])
    spec = rollouts.bot()["spec"]
    process = rollouts.start(*arguments)
    asked = rollouts.answer(refused=False, message="as you wish")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    verb, _, nonce = asked.partition("/")
    assert verb == wish
    assert len(nonce) == 8
    assert out.splitlines() == [
        "bot: as you wish",
        "Progressing  Canary  2/4 pause  stable 1a2b3c4d 95%  candidate 9f8e7d6c 5%",
    ]
    assert rollouts.bot()["spec"] == spec


def test_a_refused_verb_ends_with_1_and_the_reason(rollouts: Rollouts) -> None:
    process = rollouts.start("retry", "bot")
    rollouts.answer(refused=True, message="nothing was rolled back")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "bot: nothing was rolled back" in err


def test_a_verb_that_nobody_answers_stays_asked_for(rollouts: Rollouts) -> None:
    text = rollouts("promote", "bot", "--timeout", "2s", code=124)
    assert "the operator has not answered within 2s; promote stays asked for" in text
    assert rollouts.bot()["metadata"]["annotations"][ACTION_ANNOTATION].startswith("promote/")


def test_a_wish_waits_for_the_one_before_and_an_abort_does_not(rollouts: Rollouts) -> None:
    rollouts.kubectl("annotate", "adep", "bot", f"{ACTION_ANNOTATION}=pause/0")
    text = rollouts("promote", "bot", "--timeout", "2s", code=124)
    assert "within 2s; promote was not asked for, because an earlier wish waits" in text
    assert rollouts.bot()["metadata"]["annotations"][ACTION_ANNOTATION] == "pause/0"
    process = rollouts.start("promote", "bot")
    assert rollouts.answer(refused=False, message="paused") == "pause/0"
    assert rollouts.answer(refused=False, message="promoted").startswith("promote/")
    out, _ = process.communicate(timeout=60)
    assert out.startswith("bot: promoted\n")
    rollouts.kubectl("annotate", "adep", "bot", f"{ACTION_ANNOTATION}=pause/1")
    process = rollouts.start("abort", "bot")
    wait_until(lambda: rollouts.wish() != "pause/1", seconds=20, what="an abort overtakes a pause")
    assert rollouts.answer(refused=False, message="aborted").startswith("abort/")
    assert process.wait(timeout=60) == 0


def test_two_wishes_at_once_are_both_obeyed(rollouts: Rollouts) -> None:
    processes = [rollouts.start(verb, "bot") for verb in ("pause", "resume")]
    wishes: list[str] = []
    operator = threading.Thread(
        target=lambda: wishes.extend(rollouts.answer(refused=False, message="yes") for _ in processes)
    )
    operator.start()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    operator.join()
    assert {wish.partition("/")[0] for wish in wishes} == {"pause", "resume"}


def test_list_history_and_describe(rollouts: Rollouts) -> None:
    rollouts.set_status(aborted()["status"])
    header, row = rollouts("list").splitlines()
    assert header.split() == ["NAME", "PHASE", "STAGE", "STEP", "WEIGHT", "STABLE", "CANDIDATE", "AGE"]
    assert row.split()[:3] == ["bot", "Degraded", "Failed"]
    assert json.loads(rollouts("list", "-o", "json"))[0]["metadata"]["name"] == "bot"
    assert yaml.safe_load(rollouts("list", "-o", "yaml"))[0]["metadata"]["name"] == "bot"
    assert rollouts.kubectl.namespace in rollouts("list", "-A")
    assert "GuardrailBreached" in rollouts("history", "bot")
    (entry,) = json.loads(rollouts("history", "bot", "-o", "json"))
    assert entry["completionStatus"] == "Aborted"
    assert "finetune rollout retry bot" in rollouts("describe", "bot")


@pytest.mark.parametrize("command", ["watch", "describe", "history", "promote"])
def test_a_deployment_that_does_not_exist(rollouts: Rollouts, command: str) -> None:
    assert f"no AdapterDeployment nope in namespace {rollouts.kubectl.namespace}" in rollouts(
        command, "nope", code=2
    )


def test_validate_says_spelling_and_values_at_once(rollouts: Rollouts) -> None:
    assert "AdapterDeployment bot: valid" in rollouts("validate", "-f", "-", text=json.dumps(BOT))
    bad = {**BOT, "spec": {**BOT["spec"], "alias": "a--b", "strategie": {}}}
    text = rollouts("validate", "-f", "-", text=json.dumps({**bad, "metadata": {"name": "b"}}), code=1)
    assert "spec.strategie: unknown field; did you mean strategy?" in text
    assert "no '--', for example support-bot" in text
