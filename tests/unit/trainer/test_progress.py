"""Reports: the body, the estimate of the remaining time, and a reporter that never waits for the network."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.evaluation.metrics import parse_object, score_answers
from finetune_trainer.progress import Clock, Endpoint, Phase, Reporter, State, format_duration
from tests.waiting import wait_until

RESULT = {"class": "Succeeded", "exitCode": 0, "message": "done", "step": 10}


class Operator(ThreadingHTTPServer):
    """Behaves as the operator's status endpoint does towards a trainer; answers are taken from `codes`, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.codes: list[int] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/namespaces/a/finetunejobs/b/attempts/1/status"


class Handler(BaseHTTPRequestHandler):
    server: Operator

    def do_POST(self) -> None:
        time.sleep(self.server.delay)
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.tokens.append(self.headers.get("Authorization", ""))
        self.send_response(self.server.codes.pop(0) if self.server.codes else 200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Operator]:
    server = Operator()
    # shutdown() waits for the next poll.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def operator() -> Iterator[Operator]:
    with serve() as server:
        yield server


def test_the_body_is_kubeflows_with_our_part_beside_it() -> None:
    state = State(
        phase=Phase.TRAINING, step=5, total_steps=20, epoch=0.5, tokens_per_second=12.34, remaining_seconds=7
    )
    state.metrics = {"loss": 1.23456789, "grad_norm": float("nan")}
    body = state.to_body()
    assert body["trainerStatus"]["progressPercentage"] == 25
    assert body["trainerStatus"]["estimatedRemainingSeconds"] == 7
    assert body["trainerStatus"]["metrics"] == [{"name": "loss", "value": "1.23457"}]
    assert body["finetune"] == {
        "phase": "Training",
        "step": 5,
        "totalSteps": 20,
        "epoch": 0.5,
        "tokensPerSecond": 12.3,
    }


def test_an_early_stop_is_100_percent_only_with_the_result() -> None:
    state = State(phase=Phase.EVALUATING, step=6, total_steps=20)
    assert state.to_body()["trainerStatus"]["progressPercentage"] == 30
    assert state.to_body(RESULT)["trainerStatus"]["progressPercentage"] == 100
    failed = {**RESULT, "class": "NotFinite", "exitCode": 82}
    assert state.to_body(failed)["trainerStatus"]["progressPercentage"] == 30


def test_a_checkpoint_and_where_the_run_began_are_told_once_known() -> None:
    ours = State(step=6).to_body()["finetune"]
    assert "checkpoint" not in ours
    assert "resumedFromStep" not in ours
    state = State(step=6, checkpoint={"step": 5, "uri": "s3://b/ck/checkpoint-5"}, resumed_from_step=0)
    ours = state.to_body()["finetune"]
    assert ours["checkpoint"] == {"step": 5, "uri": "s3://b/ck/checkpoint-5"}
    assert ours["resumedFromStep"] == 0


def test_the_result_is_sent_with_a_freshly_read_token(operator: Operator, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    reporter = Reporter(Endpoint(operator.url, token))
    reporter.update(phase=Phase.TRAINING, step=10, total_steps=10)
    wait_until(lambda: operator.bodies, seconds=5)
    token.write_text("second")
    assert reporter.finish(RESULT)
    assert operator.tokens == ["Bearer first", "Bearer second"]
    assert operator.bodies[-1]["finetune"]["result"] == RESULT


def test_updates_do_not_wait_for_a_slow_operator_and_only_the_latest_is_sent(operator: Operator) -> None:
    operator.delay = 0.5
    reporter = Reporter(Endpoint(operator.url))
    started = time.monotonic()
    for step in range(1000):
        reporter.update(step=step, total_steps=1000)
    assert time.monotonic() - started < 0.4
    assert reporter.finish(RESULT)
    assert len(operator.bodies) <= 3
    assert operator.bodies[-1]["finetune"]["step"] == 999


@pytest.mark.parametrize(("code", "posts"), [(503, 2), (429, 2), (409, 1)])
def test_progress_that_did_not_arrive_is_told_again_though_nothing_changes(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, code: int, posts: int
) -> None:
    """A step may take minutes: until then the status would stay as it was before the operator was away."""
    monkeypatch.setattr("finetune_trainer.progress.POST_INTERVAL", 0.05)
    operator.codes = [code]
    reporter = Reporter(Endpoint(operator.url))
    reporter.update(step=3)
    wait_until(lambda: len(operator.bodies) >= posts, seconds=10)
    time.sleep(0.3)
    assert [body["finetune"]["step"] for body in operator.bodies] == [3] * posts
    reporter.finish(RESULT, patience=1)


def test_the_result_is_tried_again_while_the_operator_is_away(operator: Operator) -> None:
    operator.codes = [503, 503]
    assert Reporter(Endpoint(operator.url)).finish(RESULT)
    assert len(operator.bodies) == 3


@pytest.mark.parametrize("code", [400, 401, 404, 409, 413])
def test_a_refused_result_is_not_repeated(
    operator: Operator, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    operator.codes = [code]
    assert not Reporter(Endpoint(operator.url)).finish(RESULT)
    assert len(operator.bodies) == 1
    assert f"HTTP {code}" in capsys.readouterr().err


def test_an_operator_that_never_answers_costs_the_patience_and_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter(Endpoint("http://127.0.0.1:9/status"))
    reporter.update(step=1)
    assert not reporter.finish(RESULT, patience=0.6)
    assert "could not be reported" in capsys.readouterr().err


def test_the_estimate_keeps_steps_and_evaluations_apart() -> None:
    clock = Clock()
    assert clock.remaining(steps=10, evaluations=2) is None
    for seconds in (30.0, 1.0, 1.0, 1.0):
        clock.add_step(seconds)
    clock.add_evaluation(5.0)
    assert clock.remaining(steps=10, evaluations=2) == 20
    assert clock.remaining(steps=0, evaluations=0) == 0


@pytest.mark.parametrize(("seconds", "text"), [(4.9, "4s"), (200, "3m20s"), (7500, "2h05m")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_answers_count_only_as_strict_json_with_exactly_the_keys() -> None:
    assert parse_object('{"a": 1, "b": 2}', keys=("a", "b")) == {"a": 1, "b": 2}
    for text in (
        '{"a": 1}',
        '{"a": 1, "b": 2, "c": 3}',
        '```{"a": 1, "b": 2}```',
        '{"a": NaN, "b": 1}',
        "[1]",
        "",
    ):
        assert parse_object(text, keys=("a", "b")) is None


def test_scores_are_percentages_of_all_rows() -> None:
    right = '{"a": "x", "b": 1}'
    scores = score_answers(
        [right, '{"a": "x", "b": 2}', "no", '{"b": 1}'], [right] * 4, keys=("a", "b"), fields=("a", "b")
    )
    assert scores.valid_json == 50
    assert scores.exact_match == 25
    assert scores.match == {"a": 50, "b": 25}
    assert score_answers(["yes"], ["yes "], keys=(), fields=()).valid_json is None
