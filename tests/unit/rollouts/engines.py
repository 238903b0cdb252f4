"""Engines of the simulated world: they load, refuse, restart, lose, fall silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune_operator.core.rollout_facts import AdapterFacts, EngineFacts


@dataclass
class Held:
    digest: str
    state: str
    reason: str | None = None
    message: str = ""
    ready_at: datetime | None = None


@dataclass
class SimulatedEngine:
    url: str
    max_loras: int = 8
    max_rank: int = 64
    load_seconds: float = 3.0
    reachable: bool = True
    ready: bool = True
    base_models: tuple[str, ...] = ("tiny",)
    refusals: dict[str, str] = field(default_factory=dict)
    """Served name -> reason for which loads of it fail."""
    held: dict[str, Held] = field(default_factory=dict)
    loads: int = 0
    """Downloads that were begun."""

    @property
    def agent_url(self) -> str:
        return self.url.replace("8000", "8001")

    def load(self, name: str, digest: str, *, now: datetime) -> None:
        known = self.held.get(name)
        if not self.reachable or (known is not None and known.state != "Failed"):
            return
        self.loads += 1
        if name in self.refusals:
            self.held[name] = Held(digest, "Failed", self.refusals[name], f"{self.refusals[name]} by design")
        elif sum(h.state != "Failed" for n, h in self.held.items() if n != name) >= self.max_loras:
            self.held[name] = Held(digest, "Failed", "CapacityFull", "no room")
        else:
            self.held[name] = Held(digest, "Loading", ready_at=now + timedelta(seconds=self.load_seconds))

    def unload(self, name: str) -> None:
        if self.reachable:
            self.held.pop(name, None)

    def tick(self, now: datetime) -> None:
        for held in self.held.values():
            if held.state == "Loading" and held.ready_at is not None and held.ready_at <= now:
                held.state = "Loaded"

    def restart(self, now: datetime) -> None:
        """The engine process restarts, and its agent loads everything again."""
        for held in self.held.values():
            if held.state == "Loaded":
                held.state, held.ready_at = "Loading", now + timedelta(seconds=self.load_seconds)

    def replace(self) -> None:
        """A new pod: engine and agent know nothing."""
        self.held = {}

    def loaded(self, name: str) -> bool:
        held = self.held.get(name)
        return held is not None and held.state == "Loaded"

    def facts(self) -> EngineFacts:
        if not self.reachable:
            return EngineFacts(self.url, self.agent_url, reachable=False, message="connection refused")
        return EngineFacts(
            self.url,
            self.agent_url,
            reachable=True,
            ready=self.ready,
            base_models=self.base_models,
            max_loras=self.max_loras,
            loaded_loras=sum(held.state == "Loaded" for held in self.held.values()),
            max_rank=self.max_rank,
            adapters={
                name: AdapterFacts(held.digest, held.state, held.reason, held.message)
                for name, held in self.held.items()
            },
        )
