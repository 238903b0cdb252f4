"""Two operators, of which one leads, and what goes wrong between them and the API server.

Each has an API proxy of its own. Whatever goes wrong does so for a while and in the background, so that it falls
together with the faults that follow.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from finetune_local.cluster import Cluster
from tests.chaos.fleets import up_again
from tests.clients import Kubectl
from tests.clusters import pid_of
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Keeper, Operator, compact, grant_own_rights
from tests.waiting import wait_until

LEASE = 4.0  # seconds
TERMS = {
    "FINETUNE_LEADER_ELECTION": "true",
    "FINETUNE_LEASE_SECONDS": f"{LEASE:g}",
    "FINETUNE_LEASE_RENEW_SECONDS": "3",
    "FINETUNE_LEASE_RETRY_SECONDS": "0.7",
}
LEFT = "this process leads no more and ends"
ALL = r"(namespaces/[^/]+/|/v1/|ray.io/v1$)"
WRITES = r"^(POST|PUT|PATCH|DELETE) "
# A create that is refused as invalid ends a job, and rightly so.
WRITES_OF_WHAT_IS = r"^(DELETE .*|PATCH .*/status.*|POST .*/events)"


class Replicas:
    """`WEIGHTS` are the faults that it knows: each is a method that does it and returns to whom."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "leader killed": 3, "operator killed": 1, "leader stands still": 2, "leader cut off": 2,
        "api server away": 2, "etcd compacted": 0.7, "storm of 429": 1.5, "storm of 409": 1.5, "storm of 500": 1.5,
        "writes refused": 3, "deletes refused": 3, "rights not synced": 1, "answers lost": 2, "watches cut": 2,
        "watches gone": 2, "watches held": 4,
    }  # fmt: skip

    def __init__(self, cluster: Cluster, kubectl: Kubectl, folder: Path, parts: Sequence[str]) -> None:
        self._cluster, self._parts = cluster, tuple(parts)
        self._folder, self._namespace = folder, kubectl.namespace
        self.proxies: list[ApiProxy] = []
        self.operators: list[Operator] = []
        self._keepers: list[Keeper] = []
        self._timers: list[threading.Timer] = []
        self._killed = 0
        grant_own_rights(kubectl)

    @property
    def addresses(self) -> list[str]:
        """Where trainers may report to."""
        return [f"http://127.0.0.1:{operator.ports['status']}" for operator in self.operators]

    @contextmanager
    def running(self, environment: dict[str, str]) -> Iterator[None]:
        try:
            for name in ("a", "b"):
                folder = self._folder / name
                folder.mkdir(parents=True)
                self.proxies.append(ApiProxy(self._cluster, folder))
                operator = Operator(
                    folder, self.proxies[-1].kubeconfig, self._namespace, **TERMS, **environment
                )
                self.operators.append(operator)
                self._keepers.append(Keeper(operator))
            wait_until(lambda: self.leader() is not None, seconds=60, what="nobody leads")
            yield
        finally:
            self.heal()
            for keeper in self._keepers:
                keeper.close()
            for proxy in self.proxies:
                proxy.close()

    def leader(self) -> int | None:
        return next((number for number, operator in enumerate(self.operators) if operator.leads()), None)

    def ends(self) -> int:
        """How often a replica ended though nobody killed it and it did not lose the Lease."""
        lost = sum(operator.log().count(LEFT) for operator in self.operators)
        starts = sum(keeper.starts for keeper in self._keepers)
        return starts - len(self._keepers) - self._killed - lost

    def heal(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for operator in self.operators:
            operator.signal(signal.SIGCONT)
        for proxy in self.proxies:
            proxy.heal()

    # ------------------------------------------------------------ faults of processes

    def leader_killed(self, pick: float) -> str:
        number = self.leader()
        return "nobody leads" if number is None else self._kill(number)

    def operator_killed(self, pick: float) -> str:
        return self._kill(int(pick * len(self.operators)))

    def leader_stands_still(self, pick: float) -> str:
        """Sometimes for so long that another one leads when it goes on."""
        number = self.leader()
        if number is None:
            return "nobody leads"
        operator = self.operators[number]
        operator.signal(signal.SIGSTOP)
        timer = threading.Timer(1 + 2 * LEASE * pick, operator.signal, [signal.SIGCONT])
        self._timers.append(timer)
        timer.start()
        return f"{operator.folder.name}, {timer.interval:.1f} s"

    def _kill(self, number: int) -> str:
        self._killed += 1
        self.operators[number].kill()
        return self.operators[number].folder.name

    # ------------------------------------------------------------ faults of the way to the API server

    def leader_cut_off(self, pick: float) -> str:
        number = self.leader()
        if number is None:
            return "nobody leads"
        self.proxies[number].stay_away(1 + 2 * LEASE * pick)
        return f"{self.operators[number].folder.name}, {1 + 2 * LEASE * pick:.1f} s"

    def api_server_away(self, pick: float) -> str:
        for proxy in self.proxies:
            proxy.stay_away(1 + 5 * pick)
        return f"{1 + 5 * pick:.1f} s"

    def etcd_compacted(self, pick: float) -> str:
        """An API server that starts anew knows no past: who goes on from before gets 410 Gone."""
        compact(self._cluster)
        os.kill(pid_of(self._cluster, "kube-apiserver"), signal.SIGKILL)
        up_again(self._cluster, self._parts)
        return "all"

    def storm_of_429(self, pick: float) -> str:
        return self._trouble(Kind.REFUSE, ALL, pick, status=429)

    def storm_of_409(self, pick: float) -> str:
        return self._trouble(Kind.REFUSE, WRITES, pick, status=409)

    def storm_of_500(self, pick: float) -> str:
        return self._trouble(Kind.REFUSE, ALL, pick, status=500)

    def writes_refused(self, pick: float) -> str:
        """By an authorizer that is not ready, by a webhook that is mistaken."""
        status = (401, 403, 422)[int(3 * pick)]
        return self._trouble(Kind.REFUSE, WRITES_OF_WHAT_IS if status == 422 else WRITES, pick, status=status)

    def deletes_refused(self, pick: float) -> str:
        status = (401, 403, 422)[int(3 * pick)]
        return self._trouble(Kind.REFUSE, r"^DELETE ", pick, status=status, chance=1.0)

    def rights_not_synced(self, pick: float) -> str:
        """An API server that has just started knows no roles yet."""
        for proxy in self.proxies:
            proxy.cut_watches()
        return self._trouble(Kind.REFUSE, "", 0.3 * pick, status=403, chance=1.0)

    def answers_lost(self, pick: float) -> str:
        return self._trouble(Kind.LOSE, WRITES, pick)

    def watches_cut(self, pick: float) -> str:
        return str(sum(proxy.cut_watches() for proxy in self.proxies))

    def watches_gone(self, pick: float) -> str:
        return str(sum(proxy.cut_watches(gone=True) for proxy in self.proxies))

    def watches_held(self, pick: float) -> str:
        """What the operators believe is seconds old."""
        return self._trouble(Kind.HOLD, "", pick, late=1 + 4 * pick)

    def _trouble(
        self,
        kind: Kind,
        pattern: str,
        pick: float,
        *,
        status: int = 0,
        chance: float = 0.5,
        late: float = 0.0,
    ) -> str:
        seconds = 1 + 5 * pick
        until = time.monotonic() + seconds
        for proxy in self.proxies:
            proxy.add(Fault(kind, pattern, status=status, chance=chance, until=until, seconds=late))
        return f"{status or kind}, {seconds:.1f} s"
