"""The only module with Kopf decorators: it turns watch events into keys of the queue, and nothing else.

Only `on.event` is used: Kopf then writes no annotations and no finalizers, and a restart begins with an event for
every object that exists.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import kopf
from kopf._cogs.structs.references import Insights

from finetune_operator.api import adapterdeployment, finetunejob
from finetune_operator.api.base import GROUP, VERSION
from finetune_operator.kopf_resources import look_for_missing
from finetune_operator.kopf_storage import NoDiffBase, NoMemories, NoProgress
from finetune_operator.manifests import naming
from finetune_operator.reconcile import facts
from finetune_operator.reconcile.queue import Key

KOPF = str(Path(kopf.__file__).parent)

Notice: TypeAlias = Callable[[str | None, Mapping[str, Any]], bool]
"""Takes note of an event's type and object; whether it says anything new."""


class JobChanged(Protocol):
    """Told of each event about a job or what it started: whether it says anything new, and whether nothing was ever
    done about the job."""

    def __call__(self, key: Key, is_news: bool, *, is_untouched: bool = False) -> None: ...


class CredentialsError(Exception):
    """The API server takes the operator's credentials no more, and there are no others."""


class Login:
    """Kopf's credentials. It asks for others when the API server has refused those that it has: a pod's token is
    renewed in its file. Left to itself Kopf ends, where there are none, with a traceback of each watch.

    `server` is where a pod finds the API server. Kopf would ask DNS for it, which may be away when it is needed."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._given: kopf.ConnectionInfo | None = None
        self._refused = asyncio.Event()

    async def find(self, **kwargs: Any) -> kopf.ConnectionInfo | None:
        """Those of the pod's service account or the kubeconfig. Never returns the same ones again."""
        account = kopf.login_with_service_account(**kwargs)
        found = replace(account, server=self._server) if account else kopf.login_with_kubeconfig(**kwargs)
        if found is not None and found == self._given:
            self._refused.set()
            await asyncio.Event().wait()  # until Kopf is cancelled
        self._given = found
        return found

    async def last(self) -> None:
        """Wait until there are no credentials any more. Raises CredentialsError."""
        await self._refused.wait()
        raise CredentialsError(
            "the API server refuses the operator's credentials (401): renew the token or the certificate of its"
            " service account or kubeconfig"
        )


class OtherTasks(Collection["asyncio.Task[Any]"]):
    """The tasks of this loop that Kopf must not stop. It takes all that began after it for its own: before it ends it
    waits 5 s for them, and cancels them. But most are ours, or serve connections of ours, and end when we say.

    And the watches, which it leaves behind where one of them fails, must be cancelled alone: one whose pause-waiter
    is cancelled at the same moment takes that for a pause, and goes on for ever."""

    def __contains__(self, task: object) -> bool:
        if not isinstance(task, asyncio.Task) or task.get_name().startswith("pause-waiter"):
            return True
        code = getattr(task.get_coro(), "cr_code", None)
        return code is None or not code.co_filename.startswith(KOPF)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return (task for task in asyncio.all_tasks() if task in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


async def watch(
    namespaces: Sequence[str],
    *,
    notice: Notice,
    job_changed: JobChanged,
    deployment_changed: Callable[[Key], None],
    login: Login,
) -> None:
    """Watch these namespaces, or the whole cluster where none is named, until a signal arrives."""
    registry = build_registry(
        notice=notice, job_changed=job_changed, deployment_changed=deployment_changed, login=login
    )
    insights = Insights()
    looks: list[asyncio.Task[None]] = []

    @kopf.on.startup(id="look for missing resources", registry=registry)
    async def begin_to_look(settings: kopf.OperatorSettings, **_: Any) -> None:
        looks.append(asyncio.create_task(look_for_missing(registry, insights, settings), name="resources"))

    tasks = await kopf.spawn_tasks(
        registry=registry,
        insights=insights,
        memories=NoMemories(),
        # For peering, which is not used. Kopf would ask for the user's name, and a pod's user may have none. Its type
        # is a NewType of str that Kopf does not export.
        identity=naming.MANAGER,  # type: ignore[arg-type]
        clusterwide=not namespaces,
        namespaces=namespaces,
    )
    try:
        await kopf.run_tasks(tasks, ignored=OtherTasks())
    finally:
        for look in looks:
            look.cancel()


def build_registry(
    *, notice: Notice, job_changed: JobChanged, deployment_changed: Callable[[Key], None], login: Login
) -> kopf.OperatorRegistry:
    """The handlers of this operator, in a registry of their own. `notice` says whether an event is news: our own
    writes come back as events, and the pass that wrote has already said when it wants to look again."""
    registry = kopf.OperatorRegistry()
    ours: dict[str, Any] = {naming.LABEL_JOB: kopf.PRESENT}

    @kopf.on.startup(id="configure", registry=registry)
    def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure_kopf(settings)

    kopf.on.login(id="login", registry=registry)(login.find)

    @kopf.on.event(GROUP, VERSION, finetunejob.PLURAL, registry=registry)
    async def finetunejob_changed(
        event: kopf.RawEvent, namespace: str | None, name: str | None, **_: Any
    ) -> None:
        body = event["object"]
        is_news = notice(event["type"], body)
        is_untouched = body.get("status", {}).keys() <= {"observedGeneration"}  # the CRD's default
        job_changed((namespace or "", name or ""), is_news, is_untouched=is_untouched)

    @kopf.on.event(GROUP, VERSION, adapterdeployment.PLURAL, registry=registry)
    async def adapterdeployment_changed(namespace: str | None, name: str | None, **_: Any) -> None:
        deployment_changed((namespace or "", name or ""))

    @kopf.on.event("ray.io", "v1", "rayjobs", labels=ours, registry=registry)
    @kopf.on.event("v1", "pods", labels=ours, registry=registry)
    async def child_changed(
        event: kopf.RawEvent, namespace: str | None, labels: kopf.Labels, **_: Any
    ) -> None:
        job_changed((namespace or "", labels[naming.LABEL_JOB]), notice(event["type"], event["object"]))

    # Without Kueue there is no such resource, and Kopf waits until there is one. Workloads do not carry labels of ours.
    @kopf.on.event("kueue.x-k8s.io", "v1beta2", "workloads", registry=registry)
    async def workload_changed(namespace: str | None, body: kopf.Body, **_: Any) -> None:
        if job := facts.workload_owner(dict(body)):
            job_changed((namespace or "", job), True)

    return registry


def configure_kopf(settings: kopf.OperatorSettings) -> None:
    """Our choices, each with its reason."""
    settings.persistence.finalizer = f"{GROUP}/finalizer"  # never shared with another Kopf operator
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.peering.standalone = True  # a Lease decides who leads: peering has no fence
    settings.posting.enabled = False  # events are ours: posted after the status that they tell about
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30  # the default of 300 s is too patient for a controller
    # An API server that restarts or is upgraded must not end the operator: about an hour of retries.
    settings.networking.error_backoffs = list(itertools.chain((1, 1, 2, 3, 5, 8), itertools.repeat(10, 360)))
    settings.queueing.idle_timeout = 0.2  # for which a worker keeps the last object in memory; 5 s by default
    settings.watching.chunk_size = 500  # the default lists everything at once
    settings.watching.label_selectors["ray.io", "v1", "rayjobs"] = naming.LABEL_JOB
    settings.watching.label_selectors["", "v1", "pods"] = naming.LABEL_JOB
