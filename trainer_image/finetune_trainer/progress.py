"""What the operator and the log get to know while a run goes on.

Posting happens in a thread of its own and only ever sends the latest state: training never waits for the network.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

POST_INTERVAL = 2.0  # seconds between posts; the operator writes status at most every few seconds anyway
POST_TIMEOUT = 10.0  # seconds
BEAT_INTERVAL = 5.0  # seconds between posts of work that has no step
RESULT_PATIENCE = 120.0  # seconds in which the last report is tried again
MAX_BODY = 60_000  # bytes; the endpoint refuses more than 64 kB


class Phase(StrEnum):
    VALIDATING = "Validating"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    EXPORTING = "Exporting"


@dataclass
class State:
    """The latest known facts of the run; None and empty mean not known yet."""

    phase: Phase = Phase.VALIDATING
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    tokens_per_second: float | None = None
    remaining_seconds: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    effective: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None  # {"step", "uri"} of the newest whole one
    resumed_from_step: int | None = None  # 0: began anew; None: not known, or no checkpoints are kept
    inspection: bool = False  # what was found in storage, and no run's own word

    def to_body(self, result: dict[str, Any] | None = None) -> dict[str, Any]:
        """The body of one report: Kubeflow's part, and ours beside it."""
        succeeded = result is not None and result["exitCode"] == 0
        percent = 100 * self.step // self.total_steps if self.total_steps else 0
        ours: dict[str, Any] = {"phase": self.phase, "step": self.step, "epoch": round(self.epoch, 4)}
        if self.total_steps:
            ours["totalSteps"] = self.total_steps
        if self.tokens_per_second is not None:
            ours["tokensPerSecond"] = round(self.tokens_per_second, 1)
        if self.effective:
            ours["effective"] = dict(self.effective)
        if self.checkpoint is not None:
            ours["checkpoint"] = dict(self.checkpoint)
        if self.resumed_from_step is not None:
            ours["resumedFromStep"] = self.resumed_from_step
        if self.inspection:
            ours["inspection"] = True
        if result is not None:
            ours["result"] = result
        status: dict[str, Any] = {
            "progressPercentage": 100 if succeeded else min(percent, 100),
            "metrics": [
                {"name": k, "value": f"{v:.6g}"} for k, v in self.metrics.items() if math.isfinite(v)
            ],
            "lastUpdatedTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if succeeded or self.remaining_seconds is not None:
            status["estimatedRemainingSeconds"] = 0 if succeeded else self.remaining_seconds
        return {"trainerStatus": status, "finetune": ours}


@dataclass(frozen=True)
class Endpoint:
    url: str
    token_file: Path | None = None
    ca_file: Path | None = None

    @classmethod
    def from_environment(cls) -> Endpoint | None:
        url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL")
        if not url:
            return None
        token, ca = (
            os.environ.get("KUBEFLOW_TRAINER_SERVER_TOKEN"),
            os.environ.get("KUBEFLOW_TRAINER_SERVER_CA_CERT"),
        )
        return cls(url, Path(token) if token else None, Path(ca) if ca else None)

    def post(self, body: dict[str, Any]) -> None:
        """Sends one report. Raises OSError (urllib's errors are) when it was not taken."""
        headers = {"Content-Type": "application/json"}
        if self.token_file is not None:
            # Read each time: the kubelet replaces the file before the token expires.
            headers["Authorization"] = f"Bearer {self.token_file.read_text().strip()}"
        data = json.dumps(body, ensure_ascii=False).encode()
        if len(data) > MAX_BODY:
            raise OSError(f"report of {len(data)} bytes is too large")
        request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")  # noqa: S310  the operator set it
        # The operator is inside the cluster; a proxy for the outside world must not see the token.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.url.startswith("https://"):
            context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        with urllib.request.build_opener(*handlers).open(request, timeout=POST_TIMEOUT):
            pass


class Reporter:
    """Keeps the latest state and posts it in the background. Without an endpoint it only keeps the state."""

    def __init__(self, endpoint: Endpoint | None) -> None:
        self._endpoint = endpoint
        self._state = State()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._warned = ""
        self._told = -math.inf  # monotonic seconds of the latest post
        self._thread = threading.Thread(target=self._run, args=(endpoint,), name="progress", daemon=True)
        if endpoint is not None:
            self._thread.start()

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        return self._state.checkpoint

    def update(
        self,
        *,
        metrics: dict[str, float] | None = None,
        effective: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Changes some facts; metrics and effective are merged. Never blocks on the network."""
        with self._lock:
            for name, value in facts.items():
                setattr(self._state, name, value)
            self._state.metrics.update(metrics or {})
            self._state.effective.update(effective or {})
        self._changed.set()

    def beat(self) -> None:
        """Tells again what is known, as a sign that something goes on; not more often than every few seconds."""
        if time.monotonic() - self._told >= BEAT_INTERVAL:
            self._changed.set()

    def finish(self, result: dict[str, Any], *, patience: float = RESULT_PATIENCE) -> bool:
        """Sends the result, says whether it was taken; retries for `patience` seconds while the operator is away."""
        self._closing.set()
        self._changed.set()
        if self._endpoint is None:
            return False
        self._thread.join(timeout=min(POST_TIMEOUT + 1, patience))
        with self._lock:
            body = self._state.to_body(result)
        return self._send_result(self._endpoint, body, patience)

    def _send_result(self, endpoint: Endpoint, body: dict[str, Any], patience: float) -> bool:
        deadline, pause = time.monotonic() + patience, 0.5
        while True:
            try:
                endpoint.post(body)
                return True
            except urllib.error.HTTPError as error:
                if _is_refusal(error):
                    _complain(f"result was not taken by the operator: HTTP {error.code} {error.reason}")
                    return False
                reason = f"HTTP {error.code}"
            except (OSError, ValueError) as error:
                reason = str(error)
            if time.monotonic() + pause > deadline:
                _complain(f"result could not be reported ({reason}); the manifest and the exit code stand")
                return False
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _run(self, endpoint: Endpoint) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            self._changed.clear()
            if self._closing.is_set():
                return
            with self._lock:
                body = self._state.to_body()
            self._told = time.monotonic()
            try:
                endpoint.post(body)
                self._warned = ""
            except (OSError, ValueError) as error:
                if not _is_refusal(error):
                    self._changed.set()  # what is known now is still news when the operator is back
                if str(error) != self._warned:  # once per reason, not every two seconds
                    self._warned = str(error)
                    say(f"progress could not be reported: {error}; training goes on")
            self._closing.wait(POST_INTERVAL)


def _is_refusal(error: Exception) -> bool:
    """Whether the operator answered that it does not want this report, so that sending it again cannot help."""
    return isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429


def _complain(text: str) -> None:
    say(text, file=sys.stderr)  # the last line of stdout is the result


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints. A log that cannot be written, as on a full disk, changes nothing of how a run is reported and ends."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file, flush=True)


class Clock:
    """Estimates the remaining time from the time of steps and of evaluations, which are kept apart.

    Exponential averages: the first steps are slow (warm-up of caches) and must be forgotten.
    """

    SMOOTHING = 0.1

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.evaluation_seconds: float | None = None
        self._seen = 0

    def add_step(self, seconds: float) -> None:
        self._seen += 1
        if self.step_seconds is None or self._seen == 2:
            self.step_seconds = seconds  # the second replaces the first, which holds one-off costs
        else:
            self.step_seconds += self.SMOOTHING * (seconds - self.step_seconds)

    def add_evaluation(self, seconds: float) -> None:
        self.evaluation_seconds = seconds

    def remaining(self, *, steps: int, evaluations: int) -> int | None:
        """Returns seconds to the end of training, None before the first step."""
        if self.step_seconds is None:
            return None
        return math.ceil(steps * self.step_seconds + evaluations * (self.evaluation_seconds or 0.0))


def format_duration(seconds: float) -> str:
    """Returns 45s, 3m20s or 2h05m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
