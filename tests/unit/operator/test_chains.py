"""Jobs whose base model another job makes."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import Artifact, Phase
from finetune_operator.core.facts import UpstreamFacts
from tests.unit.operator.stories import ARTIFACT, Story

CHAINED: dict[str, Any] = {"model": {"fineTuneJobRef": {"name": "base"}}}
WHOLE = Artifact.model_validate(ARTIFACT | {"rank": None})
ADAPTER = Artifact.model_validate(ARTIFACT)


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
    assert plan.requeue_after is not None
    assert plan.requeue_after <= 60  # events wake it; this is for one that was lost


@pytest.mark.parametrize(
    ("upstream", "reason", "word"),
    [
        (UpstreamFacts("base", phase=Phase.FAILED, reason="BadData"), "UpstreamFailed", "BadData"),
        (UpstreamFacts("base", phase=Phase.CANCELLED), "UpstreamFailed", "Cancelled"),
        (UpstreamFacts("base", phase=Phase.SUCCEEDED, artifact=ADAPTER), "UpstreamIsAnAdapter", "method Full"),
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
