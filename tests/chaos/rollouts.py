"""Two AdapterDeployments under traffic that chaos is let loose on, with simulated engines and routers.

A revision in HARMFUL fails each of its requests. Whatever happens, it never becomes stable, and no request is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from tests.clients import Json, Kubectl, KubectlError
from tests.integration.rollout_lab import Router
from tests.integration.rollout_operator import BAD, BETTER, GOOD, Serving, deployment, serves
from tests.waiting import wait_until

Item = TypeVar("Item")

NAMES = ("bot", "second")
FRESH, WORSE = "d" * 8, "e" * 8  # not seen before the end
HARMFUL = frozenset({BAD, WORSE})
STEPS = [{"setWeight": 20}, {"pause": {"duration": "4s"}}, {"setWeight": 50}, {"pause": {"duration": "4s"}}]
VERBS = ("pause", "resume", "resume", "abort", "retry")
RATE = 60  # requests a second to each
SETTLING_SECONDS = 300.0


class Rollouts:
    """`WEIGHTS` are the faults that it knows: each is a method that does it and returns to whom."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "another revision": 12, "verb": 6, "router away": 2, "router restarted": 3, "router lies": 2,
        "counters spoilt": 2, "engine slow": 2, "load refused": 1,
    }  # fmt: skip

    def __init__(self, serving: Serving, kubectl: Kubectl) -> None:
        self.serving = serving
        self.kubectl = kubectl

    @contextmanager
    def under_traffic(self) -> Iterator[None]:
        """From the first revision on; at the end, what must have held all the time."""
        for name in NAMES:
            self._deploy(name, GOOD)
        for name in NAMES:
            self._wait(name, serves(GOOD))
            self.serving.send(lambda revision: revision in HARMFUL, alias=name, rate=RATE)
        yield
        assert self.serving.failed_requests == 0, "requests were refused"
        for router in self.serving.routers:
            versions = [snapshot.version for _, snapshot in router.applied]
            assert versions == sorted(set(versions)), "a router went back"
            stable = {
                route.stable.revision
                for _, snapshot in router.applied
                for route in snapshot.routes
                if route.stable
            }
            assert not stable & HARMFUL, "a revision that fails all of its requests became stable"

    def settle(self) -> None:
        """Nothing is wrong any more: a good revision takes over, and a harmful one is rolled back by itself."""
        self.serving.engine.load_seconds = 0.0
        self.serving.engine.refuse.clear()
        for name, revision in zip(NAMES, (FRESH, WORSE), strict=True):
            self._deploy(name, revision)
            self._verb(name, "resume")
        self._wait("bot", serves(FRESH))
        status = self._wait(
            "second", lambda s: s.get("stage") == "Failed" and s["abort"]["revision"] == WORSE
        )
        assert status["abort"]["reason"] == "GuardrailBreached", status["abort"]
        assert [router.weight("second") for router in self.serving.routers] == [0] * len(self.serving.routers)

    # ------------------------------------------------------------ faults

    def another_revision(self, pick: float) -> str:
        name, revision = _one_of([(name, each) for name in NAMES for each in (GOOD, BETTER, BAD)], pick)
        self._deploy(name, revision)
        return f"{name} {revision}"

    def verb(self, pick: float) -> str:
        name, verb = _one_of([(name, each) for name in NAMES for each in VERBS], pick)
        self._verb(name, verb)
        return f"{name} {verb}"

    def router_away(self, pick: float) -> str:
        router = self._router(pick)
        router.stop()
        time.sleep(1 + 3 * pick)
        router.start()
        return router.url

    def router_restarted(self, pick: float) -> str:
        router = self._router(pick)
        router.stop()
        router.restart()
        router.start()
        return router.url

    def router_lies(self, pick: float) -> str:
        """It says that it applies nothing."""
        router = self._router(pick)
        router.claims = 0
        time.sleep(1 + 3 * pick)
        router.claims = None
        return router.url

    def counters_spoilt(self, pick: float) -> str:
        router = self._router(pick)
        router.garbage = b'{"instance": '
        time.sleep(1 + 3 * pick)
        router.garbage = None
        return router.url

    def engine_slow(self, pick: float) -> str:
        self.serving.engine.load_seconds = 6 * pick
        return f"{6 * pick:.1f} s for a load"

    def load_refused(self, pick: float) -> str:
        served = f"{_one_of(NAMES, pick)}--{BETTER}"
        self.serving.engine.refuse = {served: "LoadFailed"} if pick < 0.7 else {}
        return served

    def _router(self, pick: float) -> Router:
        return _one_of(self.serving.routers, pick)

    def _deploy(self, name: str, revision: str) -> None:
        self.kubectl.apply(deployment(name, revision, strategy={"canary": {"steps": STEPS}}))

    def _verb(self, name: str, verb: str) -> None:
        self.kubectl("annotate", "adep", name, f"finetune.dev/action={verb}", "--overwrite")

    def _wait(self, name: str, until: Callable[[Json], bool]) -> Json:
        last: Json = {}

        def look() -> Json | None:
            nonlocal last
            try:
                last = (self.kubectl.get("adep", name) or {}).get("status", {})
            except KubectlError:  # the API server is away
                return None
            return last if until(last) else None

        return wait_until(look, seconds=SETTLING_SECONDS, what=lambda: f"{name}: {last}")


def _one_of(items: Sequence[Item], pick: float) -> Item:
    return items[int(pick * len(items))]
