"""Routers of the simulated world, and what they count."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune_operator.api.routes import Route


@dataclass
class SimulatedRouter:
    version: int = 0
    route: Route | None = None
    reachable: bool = True


@dataclass
class SimulatedRouting:
    """The stored snapshot, and the routers that take it after a while."""

    routers: list[SimulatedRouter] = field(default_factory=lambda: [SimulatedRouter(), SimulatedRouter()])
    delay_seconds: float = 1.0
    version: int = 0
    route: Route | None = None
    published_at: datetime | None = None

    def publish(self, route: Route | None, *, now: datetime) -> None:
        if route != self.route:
            self.version += 1
            self.route, self.published_at = route, now

    def tick(self, now: datetime) -> None:
        due = self.published_at is not None and now >= self.published_at + timedelta(
            seconds=self.delay_seconds
        )
        for router in self.routers:
            if router.reachable and due:
                router.version, router.route = self.version, self.route

    @property
    def applied(self) -> int:
        return sum(router.reachable and router.version == self.version for router in self.routers)

    @property
    def behind(self) -> tuple[str, ...]:
        return tuple(
            f"http://r{number}:8081"
            for number, router in enumerate(self.routers)
            if not (router.reachable and router.version == self.version)
        )

    def sends_to(self, name: str, url: str) -> bool:
        """Whether any router sends requests for this adapter to that engine."""
        for router in self.routers:
            route = router.route
            for target in (route.stable, route.candidate) if route else ():
                if target is not None and target.served_name == name and url in target.upstreams:
                    return True
        return False

    def weight(self) -> float:
        """The greatest share that any router gives the candidate."""
        return max((r.route.weight for r in self.routers if r.route and r.route.candidate), default=0.0)

    def mirror(self) -> float:
        return max((r.route.mirror for r in self.routers if r.route and r.route.candidate), default=0.0)
