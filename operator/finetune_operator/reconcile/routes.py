"""The one publisher of the route snapshot.

Deployments hand in their routes; the publisher makes one snapshot of them, writes it to the ConfigMap `finetune-routes`
(the durable copy) and pushes it to every router. The base is read before anything is published, so a restarted operator
never publishes a snapshot that lacks an alias.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune_operator.adapters.api_errors import ApiError, ConflictError, UnavailableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.api.adapterdeployment import KIND
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.routes import Route, Snapshot
from finetune_operator.core.rollout_facts import RoutingFacts
from finetune_operator.manifests import routes as manifests
from finetune_operator.reconcile import deployment_facts
from finetune_operator.reconcile.aliases import Aliases, Claim, key_of
from finetune_operator.reconcile.base_names import Base, BaseNames
from finetune_operator.reconcile.durable_routes import RETRY_SECONDS, Contents, DurableCopy
from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

COALESCE_SECONDS = 0.02
HOLD_SECONDS = 10.0
ATTEMPTS = 5  # of a write that somebody else's write gets in the way of


@dataclass(frozen=True)
class Share:
    """What one deployment adds to the snapshot."""

    route: Route | None
    base: Base | None = None
    """Its base model; None: not known. Whether its engines answer for that name is for `base_names` to say."""


class Publisher:
    """Keeps the snapshot. `wake` asks for a pass over a deployment whose routing changed."""

    def __init__(
        self, *, kube: Kube, fleet: Fleet, namespace: str, served: Sequence[str], wake: Callable[[Key], None]
    ) -> None:
        self._kube = kube
        self._fleet = fleet
        self._copy = DurableCopy(kube, namespace)
        self._served = served
        self._wake = wake
        self._aliases = Aliases()
        self._base_names = BaseNames()
        self._shares: dict[Key, Share] = {}
        self._inherited: dict[str, tuple[str, ...]] = {}
        self._engines: dict[str, set[str]] = {}
        self._unrouted: dict[str, int] = {}  # alias that nobody owns -> a snapshot without it
        self._snapshot = Snapshot()
        self._since: dict[Key, int] = {}
        self._silent: set[Key] = set()
        self._hold_until = 0.0
        self._free = asyncio.Event()
        self._free.set()
        self._verified = 0
        self._started = asyncio.Event()
        self._writing = asyncio.Lock()
        self._flush: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._told = ""
        fleet.on_applied = self._applied
        fleet.on_newer = self._overtake

    @property
    def snapshot(self) -> Snapshot:
        """What is published now."""
        return self._snapshot

    async def start(self) -> None:
        """Read what there is: the durable copy, the deployments, the versions that routers apply. Waits for the API
        server."""
        while True:
            try:
                found = await self._copy.read()
                deployments = await self._kube.list_all(API_VERSION, KIND, self._served)
                break
            except ApiError as error:
                self._tell(f"the routes cannot be read yet: {error}")
                await asyncio.sleep(RETRY_SECONDS)
        self._adopt(found or Contents())
        self._begin([deployment_facts.claim(item) for item in deployments])
        await self._fleet.poll()
        if self._fleet.highest > self._snapshot.version:
            # Routers got what could not be stored: our base is older than what they apply. Wait for all deployments.
            self._hold_until = asyncio.get_running_loop().time() + HOLD_SECONDS
            self._free.clear()
        elif found is not None:
            self._fleet.offer(self._snapshot.version, manifests.to_text(self._snapshot).encode())
        self._started.set()
        self._flush_soon()

    def claim(self, claim: Claim) -> Key | None:
        """Who has the alias, when that is another deployment."""
        self._base_names.claim(claim)
        self._unrouted.pop(claim.alias, None)
        return self._aliases.claim(claim)

    async def publish(self, claim: Claim, share: Share, *, agents: Sequence[str]) -> None:
        """Take over a deployment's part. Returns when it is stored (or cannot be) and on its way to routers."""
        await self._started.wait()
        if self._aliases.holder(claim.alias) != claim.key:
            share = Share(None, share.base)
        self._heard_of(claim.key)
        known = self._engines.get(claim.alias, set())
        if self._shares.get(claim.key) == share and known.issuperset(agents) and self._is_stored():
            return
        self._shares[claim.key] = share
        if agents:
            self._engines[claim.alias] = known | set(agents)
        await asyncio.shield(self._flush_soon())

    def base_of(self, key: Key) -> Base | None:
        """What a deployment said of its base model."""
        share = self._shares.get(key)
        return share.base if share is not None else None

    async def replace(self, claim: Claim, route: Route) -> None:
        """Another route for a deployment, everything else as it is."""
        share = self._shares.get(claim.key, Share(None))
        await self.publish(claim, Share(route, share.base), agents=())

    async def withdraw(self, key: Key) -> None:
        """A deployment is gone: so are its route and its claim. Where its adapters are stays known (`left_behind`)."""
        await self._started.wait()
        self._heard_of(key)
        self._base_names.release(key)
        for other in self._aliases.release(key):
            self._wake(other)
        if self._shares.pop(key, None) is not None:
            await asyncio.shield(self._flush_soon())

    def facts(self, claim: Claim) -> RoutingFacts:
        """What the routers do about a deployment's alias. `version` is the first snapshot that has its route as it is
        now, so that other deployments' changes do not put it in doubt."""
        holder = self._aliases.holder(claim.alias)
        taken = holder is not None and holder != claim.key
        route = next((r for r in self._snapshot.routes if r.owner == claim.owner), None)
        version = self._since.get(claim.key)
        return RoutingFacts(
            published=route,
            version=version,
            replicas=len(self._fleet.replicas),
            applied=self._fleet.count_applying(version) if version is not None else 0,
            behind=self._fleet.behind(version) if version is not None else (),
            silent=self._fleet.silent(),
            not_stored=self._copy.problem,
            alias_taken_by="/".join(holder) if taken and holder else None,
            alias_is_base_of=None if route is not None else self._base_owner(claim),
            base_answered_by=None
            if self._silent  # not all have told yet what their engines serve
            else self._base_names.answered_by(claim, self._bases()),
        )

    def left_behind(self) -> dict[str, list[str]]:
        """Aliases without an owner whose adapters may still be in engines: alias -> agents. Only once every router
        applies a snapshot without them; what others publish after that does not put it in doubt."""
        if not self._started.is_set() or self._fleet.highest > self._snapshot.version:
            self._unrouted = {}
            return {}
        routed = {route.alias for route in self._snapshot.routes}
        self._unrouted = {
            alias: self._unrouted.get(alias, self._snapshot.version)
            for alias in self._engines
            if alias not in routed and not self._aliases.is_claimed(alias)
        }
        replicas = len(self._fleet.replicas)
        return {
            alias: sorted(self._engines[alias])
            for alias, version in self._unrouted.items()
            if 0 < replicas == self._fleet.count_applying(version)
        }

    def cleaned(self, alias: str, agent: str) -> None:
        """Nothing of the alias is left at the agent."""
        if self._aliases.is_claimed(alias):
            return
        agents = self._engines.get(alias, set())
        agents.discard(agent)
        if not agents:
            self._engines.pop(alias, None)
        self._flush_soon()

    def _adopt(self, found: Contents) -> None:
        """Begin with the durable copy."""
        self._snapshot = found.snapshot
        self._engines = {alias: set(agents) for alias, agents in found.engines.items()}
        for route in self._snapshot.routes:
            self._shares[key_of(route.owner)] = Share(route)
            self._since[key_of(route.owner)] = self._snapshot.version
        self._inherited = {base.name: base.upstreams for base in self._snapshot.base_models}

    def _begin(self, claims: list[Claim]) -> None:
        """Sort out who is still there. Entries of namespaces that we do not serve are not ours to judge."""
        alive = {claim.owner: claim for claim in claims}
        for key, share in list(self._shares.items()):
            route = share.route
            if (
                route is not None
                and route.owner not in alive
                and (not self._served or key[0] in self._served)
            ):
                del self._shares[key]
        holders = {share.route.alias: key for key, share in self._shares.items() if share.route}
        for key, share in self._shares.items():
            if share.route is not None and share.route.owner not in alive:
                self._aliases.claim(Claim(key, share.route.owner.split("/")[2], "", share.route.alias))
        self._aliases.claim_all(claims, holders=holders)
        for claim in claims:
            self._base_names.claim(claim)
        self._silent = {claim.key for claim in claims}

    def _heard_of(self, key: Key) -> None:
        """A deployment had its first pass since the start. After all of them nothing is inherited any more."""
        self._silent.discard(key)
        if not self._silent:
            self._inherited = {}
            self._free.set()

    def _flush_soon(self) -> asyncio.Task[None]:
        """One write for all changes of the next moment."""
        if self._flush is None:
            self._flush = asyncio.create_task(self._flush_after_pause(), name="publish")
        return self._flush

    async def _flush_after_pause(self) -> None:
        await asyncio.sleep(COALESCE_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._hold_until):
                await self._free.wait()
        self._flush = None  # what changes from here on is the next flush's
        async with self._writing:
            await self._publish_now()

    async def _publish_now(self) -> None:
        """Store first, push second: whoever starts from the durable copy must not be behind what routers apply. When
        it cannot be stored, routers still get it: a rollback does not wait for the API server."""
        snapshot = self._build()
        for _ in range(ATTEMPTS):
            snapshot = self._numbered(snapshot)
            try:
                await self._copy.store(Contents(snapshot, self._engines))
                self._told = ""
                break
            except ConflictError:
                await self._reread()
            except ApiError as error:
                is_overtaken = (
                    isinstance(error, UnavailableError) and self._fleet.highest > self._snapshot.version
                )
                do = "wait for it, as routers apply newer ones" if is_overtaken else "are pushed all the same"
                self._tell(f"the routes could not be stored, and {do}: {error}")
                if (pause := self._copy.miss(error)) is not None:
                    self._retry_later(pause)
                if is_overtaken:
                    # We are cut off, and another operator is not: what it publishes knows more than we do.
                    return
                break
        before = {key_of(route.owner): route for route in self._snapshot.routes}
        after = {key_of(route.owner): route for route in snapshot.routes}
        for key in before.keys() - after.keys():
            self._since.pop(key, None)
        for key, route in after.items():
            if before.get(key) != route or key not in self._since:
                self._since[key] = snapshot.version
        is_new = snapshot.version != self._snapshot.version
        self._snapshot = snapshot
        if is_new:
            logger.info("routes: version %d, %d aliases", snapshot.version, len(snapshot.routes))
            self._fleet.offer(snapshot.version, manifests.to_text(snapshot).encode())

    def _build(self) -> Snapshot:
        routes = [share.route for share in self._shares.values() if share.route is not None]
        found = self._base_names.published(
            self._bases(), inherited=self._inherited, silent=self._silent.__contains__
        )
        taken = {route.alias for route in routes}  # whoever has an alias had it before
        base_models = {name: urls for name, urls in found.items() if urls and name not in taken}
        return manifests.build_snapshot(version=0, routes=routes, base_models=base_models)

    def _bases(self) -> dict[Key, Base]:
        return {key: share.base for key, share in self._shares.items() if share.base is not None}

    def _base_owner(self, claim: Claim) -> str | None:
        """Who has the alias as the name of a base model that clients are answered with."""
        if all(base.name != claim.alias for base in self._snapshot.base_models):
            return None
        owner = self._base_names.owner_of(claim.alias, self._bases())
        return "/".join(owner) if owner else "another deployment"

    def _numbered(self, snapshot: Snapshot) -> Snapshot:
        """With the version of what is published, where it says the same; else with a higher one than any router's."""
        same = snapshot.model_copy(update={"version": self._snapshot.version})
        if same == self._snapshot and self._fleet.highest <= same.version and same.version > 0:
            return same
        return snapshot.model_copy(
            update={"version": max(self._snapshot.version, self._fleet.highest, snapshot.version) + 1}
        )

    async def _reread(self) -> None:
        """After a conflict: no version number twice, whoever wrote the other one."""
        with contextlib.suppress(ApiError):
            theirs = await self._copy.reread()
            if theirs is not None and theirs > self._snapshot.version:
                self._snapshot = self._snapshot.model_copy(update={"version": theirs})

    def _is_stored(self) -> bool:
        return self._flush is None and self._copy.is_settled(Contents(self._snapshot, self._engines))

    def _tell(self, trouble: str) -> None:
        """Log it once for as long as it lasts: it is tried again each second."""
        if trouble != self._told:
            logger.error("%s", trouble)
        self._told = trouble

    def _retry_later(self, pause: float) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(pause, self._flush_soon)

    def _overtake(self, version: int) -> None:
        """A router applies something newer than ours: publish again, with a higher number."""
        logger.warning("a router applies snapshot %d, newer than ours (%d)", version, self._snapshot.version)
        if self._started.is_set():
            self._flush_soon()

    def _applied(self) -> None:
        """Wake the deployments whose route is now in force everywhere."""
        before = self._verified
        versions = [replica.applied for replica in self._fleet.replicas]
        self._verified = min((version or 0 for version in versions), default=0)
        for key, version in self._since.items():
            if before < version <= self._verified:
                self._wake(key)
