"""KubeRay's HTTP proxy on a laptop, and the stand-in for a kubelet.

KubeRay talks to `<cluster>-head-svc.<namespace>.svc…:8265`. Here all of these are one local Ray. A submission first
gets what the head pod promises (volumes, environment, tokens: pod_folders), then goes to Ray with `pod_exec` in front
of its entrypoint. The pod carries our finalizer as long as something of it may run: who waits for the pod to be gone
waits for the processes too. When the pod is deleted, its job is stopped, its folder removed, the finalizer taken off.

All of it is rebuilt from the folders and the API server after a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import hashlib
import json
import logging
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from finetune_local import kubeaio, kubeapi, pod_folders, pods

LOG = logging.getLogger("ray-gateway")
FINALIZER = "finetune.dev/ray-gateway"
HEAD_PODS = "/api/v1/pods?labelSelector=ray.io%2Fnode-type%3Dhead"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
JOBS = "/api/jobs/"
# Not forwarded: they belong to one connection, or aiohttp writes them itself.
HOP_HEADERS = frozenset(
    ("connection", "proxy-connection", "proxy-authorization", "keep-alive", "transfer-encoding", "host")
    + ("content-length", "content-encoding", "date", "server", "upgrade", "te", "trailer")
)


class Refused(Exception):
    """An answer to KubeRay that is not Ray's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """`folder` holds one folder per prepared pod; `dashboard` is Ray's URL."""

    def __init__(self, api: kubeaio.AsyncApi, ray: aiohttp.ClientSession, *, dashboard: str, folder: Path) -> None:
        self._api = api
        self._ray = ray
        self._dashboard = dashboard
        self._folder = folder
        self._folders: dict[pods.Address, pod_folders.Folder] = {}
        self._locks: dict[pods.Address, asyncio.Lock] = {}
        self._cleanups: dict[str, asyncio.Task[None]] = {}

    # -- requests ---------------------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request: for a head service, or for ourselves (/healthz)."""
        address = pods.parse_host(request.host)
        if address is None:
            if request.path == "/healthz":
                return web.Response(text="ok\n")
            return web.Response(status=403, text=f"{request.host} is not a service of this cluster\n")
        try:
            if request.method == "POST" and request.path == JOBS:
                return await self._submit(request, address)
            if request.path.startswith(JOBS):
                return await self._about_job(request, address)
            return await self._forward(request, request.path_qs, None, await request.read())
        except Refused as refusal:
            LOG.warning("%s %s for %s: %s", request.method, request.path, address.service, refusal)
            return web.Response(status=refusal.status, text=f"{refusal}\n")
        except kubeapi.ApiError as error:
            LOG.warning("%s %s for %s: %s", request.method, request.path, address.service, error)
            return web.Response(status=503, text=f"{error}\n")
        except (aiohttp.ClientError, TimeoutError) as error:
            LOG.warning("%s %s for %s: Ray: %r", request.method, request.path, address.service, error)
            return web.Response(status=502, text=f"the local Ray does not answer: {error!r}\n")

    async def _submit(self, request: web.BaseRequest, address: pods.Address) -> web.StreamResponse:
        submission = json.loads(await request.read())
        async with self._locks.setdefault(address, asyncio.Lock()):
            pod = await self._find_head_pod(address)
            try:
                folder = await self._prepare(address, pod)
            except pods.PodProblem as problem:
                await self._warn(pod, str(problem))
                raise Refused(500, str(problem)) from problem
            job = str(submission.get("submission_id") or submission.get("job_id") or pod["metadata"]["name"])
            internal = folder.internal(job)
            runtime_env = submission.get("runtime_env") or {}
            pod_folders.write_launch(
                folder, internal, entrypoint=submission["entrypoint"], runtime_env=runtime_env
            )
            if job not in folder.jobs:
                folder.jobs.append(job)
                folder.save()
            body = self._rewrite(submission, pod, folder, internal)
            LOG.info("submitting %s for pod %s/%s", internal, folder.namespace, folder.pod)
            return await self._forward(request, JOBS, folder, json.dumps(body).encode())

    def _rewrite(
        self, submission: dict[str, Any], pod: dict[str, Any], folder: pod_folders.Folder, internal: str
    ) -> dict[str, Any]:
        """The submission as Ray gets it."""
        wrapper = (sys.executable, "-m", "finetune_local.pod_exec", str(folder.path), internal)
        body = {key: value for key, value in submission.items() if key != "job_id"}
        body["submission_id"] = internal
        body["entrypoint"] = f"exec {shlex.join(wrapper)}"
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        runtime_env = dict(submission.get("runtime_env") or {})
        # Ray's supervisor waits that long between SIGTERM and SIGKILL.
        runtime_env["env_vars"] = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(max(1, int(grace))),
            **(runtime_env.get("env_vars") or {}),
        }
        body["runtime_env"] = runtime_env
        if gpus := pods.gpus_of(pod):
            body["entrypoint_num_gpus"] = gpus
        return body

    async def _prepare(self, address: pods.Address, pod: dict[str, Any]) -> pod_folders.Folder:
        known = self._folders.get(address)
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

    async def _about_job(self, request: web.BaseRequest, address: pods.Address) -> web.StreamResponse:
        folder = self._folders.get(address)
        job, _, rest = request.path[len(JOBS) :].partition("/")
        if not job:
            return await self._list(folder)
        if folder is None or job not in folder.jobs:
            # KubeRay submits (again) when it hears 404.
            return web.Response(status=404, text=f"Job {job} does not exist\n")
        path = f"{JOBS}{folder.internal(job)}{'/' + rest if rest else ''}"
        return await self._forward(request, path, folder, await request.read())

    async def _list(self, folder: pod_folders.Folder | None) -> web.Response:
        """Only the cluster's own jobs."""
        names = {folder.internal(job): job for job in folder.jobs} if folder else {}
        async with self._ray.get(self._dashboard + JOBS) as answer:
            jobs = await answer.json()
        own = [{**job, "submission_id": names[job["submission_id"]]} for job in jobs if job["submission_id"] in names]
        return web.json_response(own)

    async def _forward(
        self, request: web.BaseRequest, path: str, folder: pod_folders.Folder | None, body: bytes
    ) -> web.Response:
        """Pass a request to Ray and its answer back, with KubeRay's names for the jobs."""
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP_HEADERS}
        async with self._ray.request(
            request.method, self._dashboard + path, data=body or None, headers=headers
        ) as answer:
            content = await answer.read()
        for job in folder.jobs if folder else []:
            assert folder is not None
            content = content.replace(f'"{folder.internal(job)}"'.encode(), json.dumps(job).encode())
        if answer.status >= 400 and answer.status != 404:
            LOG.warning("%s %s: Ray answered %s: %s", request.method, path, answer.status, content[:500])
        kept = {key: value for key, value in answer.headers.items() if key.lower() not in HOP_HEADERS}
        return web.Response(status=answer.status, body=content, headers=kept)

    async def _find_head_pod(self, address: pods.Address) -> dict[str, Any]:
        """The running head pod behind a head service. Raises Refused."""
        base = f"/api/v1/namespaces/{address.namespace}"
        service = await self._api.get(f"{base}/services/{address.service}")
        cluster = ((service or {}).get("spec", {}).get("selector") or {}).get("ray.io/cluster")
        if not cluster:
            raise Refused(502, f"there is no RayCluster behind {address.service}.{address.namespace}")
        selector = f"ray.io%2Fcluster%3D{cluster},ray.io%2Fnode-type%3Dhead"
        found = await self._api.call("GET", f"{base}/pods?labelSelector={selector}")
        for pod in found["items"]:
            running = pod.get("status", {}).get("phase") == "Running"
            if running and not pod["metadata"].get("deletionTimestamp"):
                return dict(pod)
        raise Refused(503, f"the RayCluster {cluster} has no running head pod")

    # -- the life of pods -------------------------------------------------------------------------------------------

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
                return self._begin_cleanup(address, folder.uid, folder.pod)
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
                async with self._locks.setdefault(address, asyncio.Lock()):
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

    async def _stop_jobs(self, folder: pod_folders.Folder) -> None:
        """Return when no job of the folder runs any more. Raises ClientError while Ray is away."""
        for job in folder.jobs:
            url = f"{self._dashboard}{JOBS}{folder.internal(job)}"
            asked = False
            while True:
                async with self._ray.get(url) as answer:
                    if answer.status == 404:
                        break  # a new Ray: the old one took its processes along
                    answer.raise_for_status()
                    status = (await answer.json())["status"]
                if status in TERMINAL:
                    break
                if not asked:
                    async with self._ray.post(f"{url}/stop") as answer:
                        asked = answer.status < 400
                await asyncio.sleep(0.3)

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

    async def _warn(self, pod: dict[str, Any], message: str) -> None:
        """A Warning event on the pod; the same message again only counts up."""
        metadata = pod["metadata"]
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"{metadata['name']}.{hashlib.sha256((metadata['uid'] + message).encode()).hexdigest()[:16]}"
        base = f"/api/v1/namespaces/{metadata['namespace']}/events"
        regarding = {"kind": "Pod", "apiVersion": "v1"} | {k: metadata[k] for k in ("name", "namespace", "uid")}
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
        with contextlib.suppress(kubeapi.ApiError):  # an event is news, not state
            found = await self._api.get(f"{base}/{name}")
            if found is None:
                await self._api.call("POST", base, event)
            else:
                patch = {"count": found.get("count", 1) + 1, "lastTimestamp": now}
                await self._api.call("PATCH", f"{base}/{name}", patch, content_type=kubeaio.STRATEGIC)


async def serve(*, port: int, server: str, pki: Path, dashboard: str, folder: Path) -> None:
    """Run until SIGTERM or SIGINT."""
    context = kubeapi.client_context(pki, "ray-gateway")
    timeout = aiohttp.ClientTimeout(total=60, connect=5)
    async with kubeaio.AsyncApi(server, context) as api, aiohttp.ClientSession(timeout=timeout) as ray:
        gateway = Gateway(api, ray, dashboard=dashboard, folder=folder)
        gateway.restore()
        runner = web.ServerRunner(web.Server(gateway.handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        LOG.info("listening on 127.0.0.1:%s, Ray is %s", port, dashboard)
        try:
            await _run_until_signal(gateway.watch_pods(), gateway.renew_tokens())
        finally:
            await runner.cleanup()


async def _run_until_signal(*loops: Coroutine[Any, Any, None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tasks = [asyncio.create_task(loop) for loop in loops]
    waiting = asyncio.create_task(stop.wait())
    done, pending = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done - {waiting}:
        task.result()  # a loop never ends by itself but by a defect: die loudly


def main() -> None:
    parser = argparse.ArgumentParser(prog="ray-gateway")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--pki", type=Path, required=True)
    parser.add_argument("--dashboard", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    arguments = parser.parse_args()
    asyncio.run(serve(**vars(arguments)))


if __name__ == "__main__":
    main()
