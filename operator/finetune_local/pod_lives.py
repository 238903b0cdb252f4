"""From the preparation of a pod to its end: folders, finalizers, tokens, and the clean-up when a pod goes.

The pod carries our finalizer as long as something of it may run: who waits for the pod to be gone waits for its
processes too. Everything here is rebuilt from the folders and the API server after a restart.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import aiohttp

from finetune_local import kubeaio, kubeapi, pod_folders, pods, ray_client

LOG = logging.getLogger("ray-gateway")
FINALIZER = "finetune.dev/ray-gateway"
HEAD_PODS = "/api/v1/pods?labelSelector=ray.io%2Fnode-type%3Dhead"
Object = dict[str, Any]


class PodLives:
    """The prepared pods, by the address of their cluster's head service. `folder` holds one folder per pod."""

    def __init__(self, api: kubeaio.AsyncApi, ray: ray_client.RayClient, *, folder: Path) -> None:
        self._api = api
        self._ray = ray
        self._folder = folder
        self._folders: dict[pods.Address, pod_folders.Folder] = {}
        self._locks: dict[pods.Address, asyncio.Lock] = {}
        self._cleanups: dict[str, asyncio.Task[None]] = {}

    def find(self, address: pods.Address) -> pod_folders.Folder | None:
        return self._folders.get(address)

    def is_closing(self, folder: pod_folders.Folder) -> bool:
        """Whether the pod is being deleted: a real one is taken from its service at that moment."""
        return folder.uid in self._cleanups

    def lock(self, address: pods.Address) -> asyncio.Lock:
        """Held while a pod is prepared and submitted, or cleaned up."""
        return self._locks.setdefault(address, asyncio.Lock())

    async def prepare(self, address: pods.Address, pod: dict[str, Any]) -> pod_folders.Folder:
        """Make the pod's folder, anew unless a job in it still runs. Raises PodError, ApiError, ClientError."""
        known = self._folders.get(address)
        if known is not None and known.uid == pod["metadata"]["uid"] and await self._is_running(known):
            return known
        if known is not None and known.uid != pod["metadata"]["uid"]:
            # A new head pod of the same cluster: what the old one left is stopped before anything starts.
            await self._stop_jobs(known)
            known.remove()
        path = self._folder / f"{address.namespace}.{address.service}"
        jobs = known.jobs if known is not None and known.uid == pod["metadata"]["uid"] else []
        # The finalizer first: from here on the pod stays until we say that nothing of it runs.
        await self._set_finalizer(address.namespace, pod["metadata"]["name"], present=True)
        folder = await pod_folders.prepare(self._api, pod, service=address.service, path=path)
        folder.jobs = list(jobs)
        folder.save()
        self._folders[address] = folder
        return folder

    async def watch_pods(self) -> None:
        """Follow all head pods for ever; what is gone or going is cleaned up."""
        while True:
            try:
                listing = await self._api.call("GET", HEAD_PODS)
                present = {pod["metadata"]["uid"] for pod in listing["items"]}
                for address, folder in list(self._folders.items()):
                    if folder.uid not in present:
                        self._begin_cleanup(address, folder.uid, folder.pod)
                for pod in listing["items"]:
                    self._look_at(pod)
                version = listing["metadata"]["resourceVersion"]
                async for event in self._api.watch(HEAD_PODS, version=version):
                    if event["type"] == "ERROR":
                        break  # the version is too old: list again
                    self._look_at(event["object"], gone=event["type"] == "DELETED")
            except kubeapi.ApiError as error:
                LOG.warning("watching pods: %s", error)
                await asyncio.sleep(1)

    def _look_at(self, pod: dict[str, Any], *, gone: bool = False) -> None:
        metadata = pod["metadata"]
        going = metadata.get("deletionTimestamp") and FINALIZER in metadata.get("finalizers", [])
        if not gone and not going:
            return
        for address, folder in self._folders.items():
            if folder.uid == metadata["uid"]:
                self._begin_cleanup(address, folder.uid, folder.pod)
                return
        if going:
            # Prepared and never submitted (we died in between): nothing runs, the pod may go.
            address = pods.Address(namespace=metadata["namespace"], service="")
            self._begin_cleanup(address, metadata["uid"], metadata["name"])

    def _begin_cleanup(self, address: pods.Address, uid: str, pod: str) -> None:
        if uid not in self._cleanups:
            task = asyncio.create_task(self._clean_up(address, uid, pod))
            self._cleanups[uid] = task
            task.add_done_callback(lambda _: self._cleanups.pop(uid, None))

    async def _clean_up(self, address: pods.Address, uid: str, pod: str) -> None:
        """Stop the pod's jobs, remove its folder, let the pod go. Tried until it works."""
        pause = 0.5
        while True:
            try:
                async with self.lock(address):
                    folder = self._folders.get(address)
                    if folder is not None and folder.uid == uid:
                        await self._stop_jobs(folder)
                        folder.remove()
                        del self._folders[address]
                        LOG.info("pod %s/%s is gone: jobs stopped, folder removed", folder.namespace, pod)
                    await self._set_finalizer(address.namespace, pod, present=False)
                return
            except (kubeapi.ApiError, aiohttp.ClientError, TimeoutError) as error:
                LOG.warning("cleaning up after pod %s: %r", pod, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 10.0)

    async def _is_running(self, folder: pod_folders.Folder) -> bool:
        for job in folder.jobs:
            status = await self._ray.find_status(folder.internal(job))
            if status is not None and status not in ray_client.TERMINAL:
                return True
        return False

    async def confirm(self, address: pods.Address, folder: pod_folders.Folder) -> None:
        """Look at the pod once more after a submission: it may have gone while nobody knew of its folder."""
        pod = await self._api.get(f"/api/v1/namespaces/{folder.namespace}/pods/{folder.pod}")
        if pod is None or pod["metadata"]["uid"] != folder.uid or pod["metadata"].get("deletionTimestamp"):
            self._begin_cleanup(address, folder.uid, folder.pod)

    async def _stop_jobs(self, folder: pod_folders.Folder) -> None:
        for job in folder.jobs:
            await self._ray.stop(folder.internal(job))

    async def _set_finalizer(self, namespace: str, pod: str, *, present: bool) -> None:
        field = "finalizers" if present else "$deleteFromPrimitiveList/finalizers"
        patch = {"metadata": {field: [FINALIZER]}}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}"
        try:
            await self._api.call("PATCH", path, patch, content_type=kubeaio.STRATEGIC)
        except kubeapi.ApiError as error:
            if present or error.status != 404:
                raise

    async def renew_tokens(self) -> None:
        """Keep projected tokens fresh for ever."""
        while True:
            for folder in list(self._folders.values()):
                try:
                    await pod_folders.renew_tokens(self._api, folder, now=time.time())
                except kubeapi.ApiError as error:
                    LOG.warning("renewing the tokens of pod %s: %s", folder.pod, error)
                except FileNotFoundError:
                    continue  # removed meanwhile
            await asyncio.sleep(10)

    def restore(self) -> None:
        """Take over the folders that an earlier gateway left; half-made ones are removed."""
        for path in self._folder.iterdir():
            folder = pod_folders.Folder.load(path)
            if folder is None:
                shutil.rmtree(path, ignore_errors=True)
                continue
            self._folders[pods.Address(namespace=folder.namespace, service=folder.service)] = folder

    async def warn(self, pod: dict[str, Any], message: str) -> None:
        """A Warning event on the pod; the same message again only counts up."""
        metadata = pod["metadata"]
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"{metadata['name']}.{hashlib.sha256((metadata['uid'] + message).encode()).hexdigest()[:16]}"
        base = f"/api/v1/namespaces/{metadata['namespace']}/events"
        regarding = {"kind": "Pod", "apiVersion": "v1"} | {
            k: metadata[k] for k in ("name", "namespace", "uid")
        }
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": regarding,
            "reason": "FailedMount",
            "message": message[:1000],
            "type": "Warning",
            "source": {"component": "ray-gateway"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            found = await self._api.get(f"{base}/{name}")
            if found is None:
                await self._api.call("POST", base, event)
            else:
                patch = {"count": found.get("count", 1) + 1, "lastTimestamp": now}
                await self._api.call("PATCH", f"{base}/{name}", patch, content_type=kubeaio.STRATEGIC)
        except kubeapi.ApiError as error:  # an event is news, not state: its loss must not stop us
            LOG.warning("no event for pod %s: %s", metadata["name"], error)
