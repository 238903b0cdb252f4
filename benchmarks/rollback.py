"""How long a bad candidate has users: from its first bad answer to weight 0 on all routers, in two parts.

    python -m benchmarks.rollback --write

Real routers, the operator as a process, a real API server; the engine is played, so that the moment at which the
candidate breaks is known. `analysis.interval` and the guardrail are the defaults. The first part ends when the
counters that the routers had by then are enough for the statistics: how long that takes is a matter of traffic and
weight (docs/statistics.md). The second part is the operator's: to see it, record it, publish it, and be confirmed.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.pages import current_load, describe_machine, say, spread, write_section
from finetune_operator.api.adapterdeployment_analysis import AnalysisSpec
from finetune_operator.api.adapterdeployment_status import CheckPhase
from finetune_operator.api.routes import COUNTERS_PATH, RouterCounters
from finetune_operator.core import statistics
from tests.clients import Json, Kubectl
from tests.clusters import api_server
from tests.integration.rollout_operator import BAD, COLLECTOR, GOOD, serves
from tests.integration.rollout_traffic import RealLab, Users
from tests.integration.router.engines import Behaviour
from tests.integration.router.routers import ADMIN_TOKEN

LIMIT_SECONDS = 5.0
LOOK_SECONDS = 0.05
HEADERS = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


@dataclass(frozen=True)
class Result:
    evidence: float
    """Seconds from the first bad answer to the answer that makes the proof."""
    withdrawal: float
    """Seconds from that to weight 0 on every router."""
    bad: int
    """Answers of the bad candidate, before and after the proof."""


class Watcher:
    """Reads the routers' counters and routes many times a second, and notes when they say what is waited for."""

    def __init__(self, lab: RealLab) -> None:
        self._lab = lab
        self._plan = statistics.plan_analysis(AnalysisSpec())
        self._evidence: statistics.Evidence | None = None
        self.proved: float | None = None
        self.withdrawn: float | None = None
        self._task = asyncio.run_coroutine_threadsafe(self._run(), lab.loop._loop)

    async def _run(self) -> None:
        async with aiohttp.ClientSession(headers=HEADERS) as session:
            first: int | None = None
            while self.withdrawn is None:
                asked = (self._counters(session, front.admin_url) for front in self._lab.fronts)
                told = await asyncio.gather(*asked)
                now = time.monotonic()
                first = max(router.version for router in told) if first is None else first
                if self.proved is None:
                    self._fold(list(told))
                    self.proved = now if self._is_proved() else None
                if self._is_withdrawn(told, after=first):  # it may be so before we have seen the proof
                    self.withdrawn = now
                    self.proved = self.proved or now
                await asyncio.sleep(LOOK_SECONDS)

    def _is_withdrawn(self, told: list[RouterCounters], *, after: int) -> bool:
        return all(router.version > after for router in told) and set(self._lab.weights()) == {0.0}

    async def _counters(self, session: aiohttp.ClientSession, url: str) -> RouterCounters:
        async with session.get(url + COUNTERS_PATH) as answer:
            return RouterCounters.model_validate_json(await answer.read())

    def _fold(self, told: list[RouterCounters]) -> None:
        self._evidence = statistics.fold(
            self._evidence, told, alias="bot", stable_revision=GOOD, candidate_revision=BAD,
            plan=self._plan, weight=0.0,
        )  # fmt: skip

    def _is_proved(self) -> bool:
        if self._evidence is None:
            return False
        checks = statistics.assess(self._evidence, self._plan, weight=0.0).guardrails
        return any(check.phase is CheckPhase.FAILED for check in checks)

    def wait(self, seconds: float) -> None:
        self._task.result(timeout=seconds)


def measure(lab: RealLab, *, weight: int, rate: float) -> Result:
    """One rollout of a candidate that is good until its users are there, and then fails every request."""
    lab.deploy(GOOD, analysis={})
    lab.wait(serves(GOOD))
    users = Users(lab, rate=rate)
    try:
        steps = [{"setWeight": weight}, {"pause": {}}]
        spec: Json = {"analysis": {}, "traffic": {"fallback": {"onCandidateError": "Fail"}}}
        lab.deploy(BAD, strategy={"canary": {"steps": steps}}, **spec)
        lab.wait(lambda s: s.get("phase") == "Paused" and s["weights"]["verified"])
        lab.eventually(lambda: users.answered()[BAD] > 5)
        watcher = Watcher(lab)
        time.sleep(1)  # its starting line
        lab.behave(BAD, Behaviour(status=500))
        watcher.wait(300)
        lab.wait(lambda s: s.get("stage") == "Failed")
    finally:
        users.close()
    bad = sorted(reply.sent for reply in users.failures)
    if watcher.proved is None or watcher.withdrawn is None or not bad:
        raise SystemExit("error: the candidate was not rolled back")
    proved = max(watcher.proved, bad[0])
    return Result(proved - bad[0], watcher.withdrawn - proved, len(bad))


def build_section(results: list[Result], *, weight: int, rate: float, routers: int, load: float) -> str:
    first = spread([result.evidence for result in results], "s")
    second = spread([result.withdrawal for result in results], "s")
    bad = sorted(result.bad for result in results)
    slowest = max(result.withdrawal for result in results)
    verdict = "within it" if slowest <= LIMIT_SECONDS else f"over it ({slowest:.2f} s)"
    packages = ("aiohttp", "kopf", "kubernetes")
    return f"""\
From the first bad answer of a candidate to weight 0 on all routers, {len(results)} times: median (smallest to largest).
{routers} real routers, {rate:g} requests/s, a weight of {weight} %, `analysis.interval` and the guardrail by default;
the candidate answers well until it has users, and then fails every request. The engine is played, all else is real.

| part | time | limit |
|---|---|---|
| until the routers' counters prove it (traffic and weight decide) | {first} |  |
| from there until every router applies weight 0 | {second} | {LIMIT_SECONDS:g} s: {verdict} |

Bad answers: {bad[len(bad) // 2]} ({bad[0]} to {bad[-1]}).
Command: `python -m benchmarks.rollback --rounds {len(results)} --write`.
{describe_machine(packages, load=load)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="rollbacks (default 10)")
    parser.add_argument("--routers", type=int, default=3, help="router processes (default 3)")
    parser.add_argument("--weight", type=int, default=10, help="percent of the users (default 10)")
    parser.add_argument("--rate", type=float, default=40, help="requests per second in all (default 40)")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    asked = parser.parse_args()
    load, results = current_load(), []
    with tempfile.TemporaryDirectory(prefix="rollback-") as name:
        folder = Path(name)
        with api_server(folder / "cluster", COLLECTOR) as cluster:
            for number in range(asked.rounds):
                kubectl = Kubectl(cluster.kubeconfig, f"rollback-{number}")
                kubectl("create", "namespace", kubectl.namespace)
                (folder / f"round-{number}").mkdir()
                lab = RealLab(cluster, kubectl, folder / f"round-{number}", routers=asked.routers)
                try:
                    lab.start()
                    results.append(measure(lab, weight=asked.weight, rate=asked.rate))
                finally:
                    lab.close()
                last = results[-1]
                say(f"{number + 1}: {last.evidence:.2f} s + {last.withdrawal:.2f} s, {last.bad} bad answers")
    section = build_section(results, weight=asked.weight, rate=asked.rate, routers=asked.routers, load=load)
    print(section)
    if asked.write:
        write_section("Rollback", section)


if __name__ == "__main__":
    main()
