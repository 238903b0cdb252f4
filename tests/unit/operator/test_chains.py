"""Jobs that are built on what other jobs make: a model, an adapter, a reward model, a ConfigMap."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import Artifact, Phase, Upstream
from finetune_operator.core.facts import UpstreamFacts
from tests.unit.operator.stories import ARTIFACT, Story

CHAINED: dict[str, Any] = {"model": {"fineTuneJobRef": {"name": "base"}}}
WHOLE = Artifact.model_validate(ARTIFACT | {"rank": None})
ADAPTER = Artifact.model_validate(ARTIFACT)
SCORING = UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="RewardModel")


@pytest.mark.parametrize(
    ("upstream", "reason"),
    [
        (UpstreamFacts("base", exists=False), "FineTuneJobNotFound"),
        (UpstreamFacts("base"), "WaitingForModel"),
        (UpstreamFacts("base", phase=Phase.RUNNING), "WaitingForModel"),
        (UpstreamFacts("base", phase=Phase.SUSPENDED, waits_for=("other",)), "WaitingForModel"),
    ],
)
def test_a_job_waits_for_its_model_and_says_so(upstream: UpstreamFacts, reason: str) -> None:
    plan = Story(CHAINED).step(upstream=upstream)
    assert (plan.status.phase, plan.status.reason) == (Phase.PENDING, reason)
    assert "base" in (plan.status.message or "")
    assert plan.status.attempts == []
    assert plan.requeue_after == 60  # events wake it; this is for one that was lost
    assert {c.type: c.status for c in plan.status.conditions} == {
        "ResourcesReady": "False",
        "Reconciling": "True",
        "Stalled": "False",
    }


@pytest.mark.parametrize(
    ("upstream", "reason", "word"),
    [
        (UpstreamFacts("base", phase=Phase.FAILED, reason="BadData"), "UpstreamFailed", "BadData"),
        (UpstreamFacts("base", phase=Phase.CANCELLED), "UpstreamFailed", "Cancelled"),
        (SCORING, "UpstreamIsARewardModel", "spec.reward"),
        (UpstreamFacts("base", waits_for=("other", "triage")), "ChainIsACircle", "triage -> base -> other -> triage"),
    ],
)  # fmt: skip
def test_a_model_that_will_never_come_fails_the_job_clearly(
    upstream: UpstreamFacts, reason: str, word: str
) -> None:
    plan = Story(CHAINED).step(upstream=upstream)
    assert (plan.status.phase, plan.status.reason) == (Phase.FAILED, reason)
    assert word in (plan.status.message or "")
    assert plan.status.completion_time is not None


def test_the_model_is_settled_when_the_job_begins() -> None:
    story = Story(CHAINED)
    story.step(upstream=UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=WHOLE))
    effective = story.job.status.effective
    assert effective is not None
    assert effective.model_uri == ARTIFACT["uri"]
    assert [a.number for a in story.job.status.attempts] == [1]
    assert effective.adapter is None


def test_an_adapter_is_put_on_its_own_base_model() -> None:
    story = Story(CHAINED)
    story.step(upstream=UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="SFT"))
    effective = story.job.status.effective
    assert effective is not None
    assert effective.model_uri == ARTIFACT["baseModel"]
    assert effective.adapter == Upstream(
        uri=ADAPTER.uri, digest=ADAPTER.digest, base_model=ADAPTER.base_model
    )


def test_method_full_does_not_go_on_with_an_adapter() -> None:
    plan = Story(CHAINED | {"method": {"type": "Full"}}).step(
        upstream=UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER)
    )
    assert (plan.status.phase, plan.status.reason) == (Phase.FAILED, "UpstreamIsAnAdapter")
    assert "use LoRA or QLoRA" in (plan.status.message or "")


def test_a_reward_model_may_be_trained_further_as_one() -> None:
    story = Story(CHAINED | {"objective": "RewardModel"})
    done = UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="RewardModel")
    assert story.step(upstream=done).status.phase is not Phase.FAILED


# ---------------------------------------------------------------- rewards

JUDGED: dict[str, Any] = {"objective": "RLOO", "reward": {"fineTuneJobRef": {"name": "judge"}}}
JUDGE = UpstreamFacts("judge", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="RewardModel")


@pytest.mark.parametrize(
    ("reward", "phase", "reason", "word"),
    [
        (None, Phase.PENDING, "FineTuneJobNotFound", "there is no FineTuneJob judge"),
        (UpstreamFacts("judge", phase=Phase.RUNNING), Phase.PENDING, "WaitingForModel", "which is Running"),
        (UpstreamFacts("judge", phase=Phase.FAILED), Phase.FAILED, "UpstreamFailed", "no reward model"),
        (
            UpstreamFacts("judge", waits_for=("triage",)),
            Phase.FAILED,
            "ChainIsACircle",
            "triage -> judge -> triage",
        ),
        (
            UpstreamFacts("judge", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="SFT"),
            Phase.FAILED,
            "UpstreamIsNoRewardModel",
            "has objective SFT",
        ),
    ],
)
def test_a_reward_model_is_waited_for_as_a_model_is(
    reward: UpstreamFacts | None, phase: Phase, reason: str, word: str
) -> None:
    plan = Story(JUDGED).step(reward=reward)
    assert (plan.status.phase, plan.status.reason) == (phase, reason)
    assert "spec.reward.fineTuneJobRef" in (plan.status.message or "")
    assert word in (plan.status.message or "")
    assert plan.status.attempts == []


def test_what_will_never_come_is_told_before_what_is_waited_for() -> None:
    both = CHAINED | JUDGED
    plan = Story(both).step(
        upstream=UpstreamFacts("base", phase=Phase.RUNNING), reward=UpstreamFacts("judge", phase=Phase.FAILED)
    )
    assert plan.status.reason == "UpstreamFailed"
    plan = Story(both).step(upstream=UpstreamFacts("base", phase=Phase.RUNNING), reward=JUDGE)
    assert plan.status.reason == "WaitingForModel"


def test_model_and_reward_model_are_settled_together() -> None:
    story = Story(CHAINED | JUDGED)
    story.step(
        upstream=UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER, objective="SFT"), reward=JUDGE
    )
    effective = story.job.status.effective
    assert effective is not None
    assert (
        effective.reward
        == effective.adapter
        == Upstream(uri=ADAPTER.uri, digest=ADAPTER.digest, base_model=ADAPTER.base_model)
    )


@pytest.mark.parametrize(
    ("scripts", "word"),
    [
        ({}, "kubectl create configmap rewards --from-file=r.py"),
        ({"rewards": ["other.py"]}, "has no key r.py (keys: other.py)"),
        ({"rewards": []}, "(keys: none)"),
    ],
)
def test_a_missing_reward_function_is_waited_for_before_a_pod_hangs_at_it(
    scripts: dict[str, list[str]], word: str
) -> None:
    functions = [{"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": "f"}]
    story = Story({"objective": "GRPO", "reward": {"functions": functions}})
    plan = story.step(scripts=scripts)
    assert (plan.status.phase, plan.status.reason) == (Phase.PENDING, "ConfigMapNotFound")
    assert plan.requeue_after == 10, "nobody watches ConfigMaps"
    assert word in (plan.status.message or "")
    assert story.step(scripts={"rewards": ["r.py", "other.py"]}).status.attempts
