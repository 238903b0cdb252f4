"""Which engines have which revision, and what they should load and unload.

What an engine tells is believed, nothing is assumed: an adapter is routed to an engine only while that engine says
Loaded. The one exception is an agent that does not answer: that is no proof of a loss, so what is published stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from finetune_operator.api.adapterdeployment_status import LoadedAdapter, Stage
from finetune_operator.api.routes import Route
from finetune_operator.core.rollout_facts import Action, AdapterFacts, EngineFacts, Load, Observed, Unload
from finetune_operator.core.rollout_turns import OVER, Turn

LOADED, LOADING, FAILED = "Loaded", "Loading", "Failed"
HOPELESS = frozenset({"DigestMismatch", "IncompatibleBase", "RankTooLarge"})  # another try changes nothing


def served_name(alias: str, revision: str) -> str:
    return f"{alias}--{revision}"


def _published(route: Route | None, name: str) -> frozenset[str]:
    """Engines that the newest snapshot sends requests for this adapter to."""
    targets = (route.stable, route.candidate) if route is not None else ()
    return frozenset(
        url for target in targets if target and target.served_name == name for url in target.upstreams
    )


def has(engine: EngineFacts, adapter: LoadedAdapter) -> bool:
    told = _loaded(engine, adapter.served_name)
    return told is not None and told.digest == adapter.digest


def _loaded(engine: EngineFacts, name: str) -> AdapterFacts | None:
    told = engine.adapters.get(name)
    is_loaded = engine.reachable and engine.ready and told is not None and told.state == LOADED
    return told if is_loaded else None


def upstreams(seen: Observed, adapter: LoadedAdapter) -> tuple[str, ...]:
    """Engines that requests for the adapter may go to. Those that spec no longer names, and pods that were replaced,
    keep them until one of the others has it, or, for a candidate, has stable."""
    published = _published(seen.routing.published, adapter.served_name)
    found = {
        engine.url
        for engine in seen.engines
        if has(engine, adapter) or (not engine.reachable and engine.url in published)
    }
    if not found and (seen.engines or seen.engines_problem) and not _stable_moved(seen, adapter):
        found = set(published - {engine.url for engine in seen.engines})
    return tuple(sorted(found))


def _stable_moved(seen: Observed, candidate: LoadedAdapter) -> bool:
    """Whether stable can answer in place of this candidate. On a pod that is gone, the candidate's requests would fail,
    and look like its own failures beside stable's on a new one."""
    route = seen.routing.published
    if route is None or route.stable is None or route.candidate is None:
        return False
    is_candidate = route.candidate.served_name == candidate.served_name
    return is_candidate and any(_loaded(engine, route.stable.served_name) for engine in seen.engines)


def in_service(seen: Observed) -> list[EngineFacts]:
    """Engines that should have what is served: those that are ready, and silent ones that requests still go to."""
    route = seen.routing.published
    targets = [t for t in (route.stable, route.candidate) if t] if route else []
    routed = {url for target in targets for url in target.upstreams}
    return [e for e in seen.engines if (e.ready if e.reachable else e.url in routed)]


def silence(seen: Observed) -> str | None:
    """Which engines in service have agents that do not answer, so that nobody knows what those engines have by now."""
    silent = [engine for engine in in_service(seen) if not engine.reachable]
    if not silent:
        return None
    first = f"{silent[0].url} ({silent[0].message or 'no message'})"
    more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    return f"the agent of {first}{more} does not answer; requests go on there, and the weight is held until it does"


@dataclass(frozen=True)
class Coverage:
    """Where an adapter is, and where it should be."""

    upstreams: tuple[str, ...]
    lacking: tuple[EngineFacts, ...]
    desired: int
    served_name: str
    kept: bool
    """No engine that spec names has it; what is published stays, and nothing is known of it."""

    @property
    def complete(self) -> bool:
        return bool(self.upstreams) and not self.lacking and not self.kept

    @property
    def lost(self) -> bool:
        return not self.upstreams

    @property
    def hopeless(self) -> str | None:
        """Why no engine will ever load it; None while some may."""
        told = [(e, e.adapters.get(self.served_name)) for e in self.lacking]
        if self.upstreams or not told or any(t is None or t.reason not in HOPELESS for _, t in told):
            return None
        engine, fact = told[0]
        return f"{engine.url}: {fact.reason}: {fact.message}" if fact else None

    @property
    def failing(self) -> bool:
        """Whether some engine tried to load it and failed."""
        facts = (engine.adapters.get(self.served_name) for engine in self.lacking)
        return any(fact is not None and fact.state == FAILED for fact in facts)

    def numbers(self) -> str:
        if self.kept and self.upstreams:
            places = ", ".join(self.upstreams[:3])
            return f"requests for {self.served_name} go on to {places} until an engine that spec names has it"
        return f"{len(self.upstreams)} of {self.desired} engines have {self.served_name}"

    def why(self) -> str:
        """What the engines that lack it say, the first few of them."""
        texts = []
        for engine in self.lacking[:3]:
            fact = engine.adapters.get(self.served_name)
            if not engine.reachable:
                texts.append(f"{engine.url}: its agent does not answer ({engine.message or 'no message'})")
            elif fact is None:
                texts.append(f"{engine.url}: not loaded yet")
            else:
                reason = f" ({fact.reason}: {fact.message})" if fact.reason else ""
                texts.append(f"{engine.url}: {fact.state}{reason}")
        more = len(self.lacking) - 3
        return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def coverage(seen: Observed, adapter: LoadedAdapter) -> Coverage:
    urls = upstreams(seen, adapter)
    engines = in_service(seen)
    lacking = tuple(engine for engine in engines if engine.url not in urls)
    desired = len({*urls, *(engine.url for engine in engines)})
    kept = not any(engine.url in urls for engine in seen.engines)
    return Coverage(urls, lacking, desired, adapter.served_name, kept)


def refresh(turn: Turn) -> Turn:
    """The adapters' entries with what the engines tell now."""
    for adapter in turn.status.adapters:
        found = coverage(turn.seen, adapter)
        wanted = adapter.unload_at is None
        turn = turn.with_adapter(
            adapter.model_copy(
                update={
                    "loaded_replicas": len(found.upstreams),
                    "desired_replicas": found.desired if wanted else 0,
                    "message": found.why()[:1000] or None if wanted and found.lacking else None,
                }
            )
        )
    return turn


# ---------------------------------------------------------------- loads and unloads


def needed(turn: Turn) -> list[LoadedAdapter]:
    """Adapters that every engine should have, the stable one first."""
    candidate = turn.candidate if turn.status.stage not in OVER else None
    return [adapter for adapter in (turn.stable, candidate) if adapter is not None]


def settle(turn: Turn) -> Turn:
    """Order loads of what is needed and unloads of what is not, and forget what is gone."""
    keep = {adapter.revision for adapter in needed(turn)}
    canary = turn.spec.strategy.canary
    delay = max(canary.scale_down_delay_seconds, canary.abort_scale_down_delay_seconds)
    latest = turn.now + timedelta(seconds=delay)  # later only where the clock was set back
    for adapter in turn.status.adapters:
        due = None if adapter.revision in keep else min(adapter.unload_at or turn.now, latest)
        if due != adapter.unload_at:
            turn = turn.with_adapter(adapter.model_copy(update={"unload_at": due}))
    turn = _unload_due(turn)
    for engine in turn.seen.engines:
        if engine.reachable and engine.ready:
            turn = turn.act(*_loads(turn, engine))
    return turn


def _unload_due(turn: Turn) -> Turn:
    for adapter in turn.status.adapters:
        if adapter.unload_at is None:
            continue
        if adapter.unload_at > turn.now:
            turn = turn.again_in((adapter.unload_at - turn.now).total_seconds())
        elif may_unload(turn, adapter):
            holders = [e for e in turn.seen.engines if e.reachable and adapter.served_name in e.adapters]
            if not holders:
                turn = turn.update(adapters=[a for a in turn.status.adapters if a is not adapter])
            turn = turn.act(*(Unload(engine.agent_url, adapter.served_name) for engine in holders))
    return turn


def may_unload(turn: Turn, adapter: LoadedAdapter) -> bool:
    """Whether every router said that it sends no more requests to it. No router that answers says nothing."""
    routing = turn.seen.routing
    return routing.verified and not _published(routing.published, adapter.served_name)


def _loads(turn: Turn, engine: EngineFacts) -> Iterable[Action]:
    free = None if engine.max_loras is None else engine.max_loras - used_slots(engine)
    for adapter in needed(turn):
        told = engine.adapters.get(adapter.served_name)
        if told is not None and not (told.state == FAILED and _worth_another_try(turn, adapter, told)):
            continue
        if rank_problem(turn, engine, adapter):
            continue
        if free is not None and free <= 0:
            spare = next(iter(retained(turn, engine)), None)
            if spare is not None:
                yield Unload(engine.agent_url, spare.served_name)
            return
        free = None if free is None else free - 1
        yield Load(engine.agent_url, adapter.served_name, adapter.uri, adapter.digest)


def _worth_another_try(turn: Turn, adapter: LoadedAdapter, told: AdapterFacts) -> bool:
    """A candidate that no try will help is tried once per rollout; what serves is tried as long as it is missing."""
    began = turn.status.stage is Stage.LOADING and turn.status.stage_start_time == turn.now
    return told.reason not in HOPELESS or began or adapter.revision == turn.status.stable_revision


def used_slots(engine: EngineFacts) -> int:
    known = sum(fact.state in (LOADED, LOADING) for fact in engine.adapters.values())
    return max(engine.loaded_loras, known)


def retained(turn: Turn, engine: EngineFacts) -> list[LoadedAdapter]:
    """Former revisions that only wait for their unloading, and that nobody is sent to."""
    return [
        adapter
        for adapter in turn.status.adapters
        if adapter.unload_at is not None
        and adapter.served_name in engine.adapters
        and may_unload(turn, adapter)
    ]


def capacity_problem(turn: Turn) -> str | None:
    """Which engine has no room for what it should load, with its numbers."""
    for engine in turn.seen.engines:
        if not (engine.reachable and engine.ready) or engine.max_loras is None:
            continue
        for adapter in needed(turn):
            told = engine.adapters.get(adapter.served_name)
            full = told.reason == "CapacityFull" if told else used_slots(engine) >= engine.max_loras
            if full and not (told and told.state == LOADED) and not retained(turn, engine):
                return (
                    f"{engine.url} has {used_slots(engine)} of {engine.max_loras} adapters loaded and no room for "
                    f"{adapter.served_name}: raise the engine's --max-loras, or delete AdapterDeployments on it"
                )
    return None


def rank_problem(turn: Turn, engine: EngineFacts, adapter: LoadedAdapter) -> str | None:
    artifact = turn.seen.wanted.artifact
    if artifact is None or artifact.revision != adapter.revision:
        return None
    if artifact.rank is None or engine.max_rank is None or artifact.rank <= engine.max_rank:
        return None
    return (
        f"{adapter.served_name} has rank {artifact.rank} and {engine.url} takes at most {engine.max_rank}: restart the "
        f"engine with --max-lora-rank {artifact.rank}, or train with a smaller rank"
    )


def base_problem(turn: Turn) -> str | None:
    """Which engine serves another base model than the one of spec.baseModelRef."""
    name = turn.spec.base_model_ref.name
    for engine in turn.seen.engines:
        if engine.reachable and engine.ready and engine.base_models and name not in engine.base_models:
            return (
                f"{engine.url} serves {', '.join(engine.base_models)} and not {name}: correct spec.baseModelRef.name "
                "or spec.serving"
            )
    return None
