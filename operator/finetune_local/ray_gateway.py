"""KubeRay's HTTP proxy on a laptop, and the stand-in for a kubelet.

KubeRay talks to `<cluster>-head-svc.<namespace>.svc…:8265`. Here all of these are one local Ray. A submission first
gets what the head pod promises (volumes, environment, tokens: pod_folders), then goes to Ray with `pod_exec` in front
of its entrypoint. When the pod is deleted, its job is stopped and its folder removed (pod_lives).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import shlex
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from finetune_local import kubeaio, kubeapi, pod_folders, pod_lives, pods, ray_client
from finetune_local.ray_client import JOBS

LOG = logging.getLogger("ray-gateway")
# Not forwarded: they belong to one connection, or aiohttp writes them itself.
HOP_HEADERS = frozenset(
    (
        "connection", "proxy-connection", "proxy-authorization", "keep-alive", "transfer-encoding", "host",
        "content-length", "content-encoding", "date", "server", "upgrade", "te", "trailer",
    )
)  # fmt: skip


class RefusedError(Exception):
    """An answer to KubeRay that is not Ray's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A submission whose pod cannot be prepared yet."""

    job: str
    submission: dict[str, Any]


class Gateway:
    """The requests. They come from KubeRay, whose client gives up after two seconds and asks again."""

    def __init__(self, api: kubeaio.AsyncApi, ray: ray_client.RayClient, lives: pod_lives.PodLives) -> None:
        self._api = api
        self._ray = ray
        self._lives = lives
        self._waiting: dict[pods.Address, Waiting] = {}

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
        except RefusedError as refusal:
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
        return await self._launch(address, submission)

    async def _launch(self, address: pods.Address, submission: dict[str, Any]) -> web.Response:
        """Prepare the pod and submit. A repetition is answered like the first time: KubeRay waits only two seconds."""
        async with self._lives.lock(address):
            pod = await self._find_head_pod(address)
            job = str(submission.get("submission_id") or submission.get("job_id") or pod["metadata"]["name"])
            known = self._lives.find(address)
            is_prepared = known is not None and known.uid == pod["metadata"]["uid"] and job in known.jobs
            # Making the folder anew would pull it away from under the running job.
            if known and is_prepared and await self._ray.find_status(known.internal(job)) is not None:
                return web.json_response({"job_id": job, "submission_id": job})
            try:
                folder = await self._lives.prepare(address, pod)
            except pods.PodError as problem:
                self._waiting[address] = Waiting(job=job, submission=submission)
                await self._lives.warn(pod, str(problem))
                raise RefusedError(500, str(problem)) from problem
            self._waiting.pop(address, None)
            internal = folder.internal(job)
            runtime_env = submission.get("runtime_env") or {}
            pod_folders.write_launch(
                folder, internal, entrypoint=submission["entrypoint"], runtime_env=runtime_env
            )
            if job not in folder.jobs:
                folder.jobs.append(job)
                folder.save()
            LOG.info("submitting %s for pod %s/%s", internal, folder.namespace, folder.pod)
            answer = await self._ray.submit(_rewrite(submission, pod, folder, internal))
            await self._lives.confirm(address, folder)
            if answer.status >= 400:
                LOG.warning("submitting %s: Ray answered %s: %s", internal, answer.status, answer.body[-800:])
            return _answer(answer, folder)

    async def _about_job(self, request: web.BaseRequest, address: pods.Address) -> web.StreamResponse:
        folder = self._lives.find(address)
        job, _, rest = request.path[len(JOBS) :].partition("/")
        if not job:
            return await self._list(folder)
        waiting = self._waiting.get(address)
        if waiting is not None and waiting.job == job:
            return await self._about_waiting_job(request, address, waiting)
        if folder is None or job not in folder.jobs:
            # KubeRay submits (again) when it hears 404.
            return web.Response(status=404, text=f"Job {job} does not exist\n")
        if self._lives.is_closing(folder):
            # Else KubeRay might hear STOPPED, which means that a person stopped the job.
            raise RefusedError(503, f"pod {folder.pod} is being deleted")
        path = f"{JOBS}{folder.internal(job)}{'/' + rest if rest else ''}"
        return await self._forward(request, path, folder, await request.read())

    async def _about_waiting_job(
        self, request: web.BaseRequest, address: pods.Address, waiting: Waiting
    ) -> web.Response:
        """Each question is a new try: KubeRay asks every three seconds, but after errors only every few minutes."""
        if request.method != "GET":
            self._waiting.pop(address, None)
            return web.json_response({"stopped": True})
        message = ""
        try:
            await self._launch(address, waiting.submission)
        except RefusedError as refusal:
            message = str(refusal)
        return web.json_response(
            {
                "type": "SUBMISSION",
                "submission_id": waiting.job,
                "status": "PENDING",
                "message": message or "The job is being submitted.",
                "entrypoint": waiting.submission["entrypoint"],
            }
        )

    async def _list(self, folder: pod_folders.Folder | None) -> web.Response:
        """Only the cluster's own jobs."""
        names = {folder.internal(job): job for job in folder.jobs} if folder else {}
        jobs = await self._ray.list_jobs()
        return web.json_response(
            [
                {**job, "submission_id": names[job["submission_id"]]}
                for job in jobs
                if job["submission_id"] in names
            ]
        )

    async def _forward(
        self, request: web.BaseRequest, path: str, folder: pod_folders.Folder | None, body: bytes
    ) -> web.Response:
        """Pass a request to Ray and its answer back, with KubeRay's names for the jobs."""
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP_HEADERS}
        return _answer(await self._ray.forward(request.method, path, body=body, headers=headers), folder)

    async def _find_head_pod(self, address: pods.Address) -> dict[str, Any]:
        """The running head pod behind a head service. Raises RefusedError."""
        base = f"/api/v1/namespaces/{address.namespace}"
        service = await self._api.get(f"{base}/services/{address.service}")
        cluster = ((service or {}).get("spec", {}).get("selector") or {}).get("ray.io/cluster")
        if not cluster:
            raise RefusedError(502, f"there is no RayCluster behind {address.service}.{address.namespace}")
        selector = f"ray.io%2Fcluster%3D{cluster},ray.io%2Fnode-type%3Dhead"
        found = await self._api.call("GET", f"{base}/pods?labelSelector={selector}")
        for pod in found["items"]:
            running = pod.get("status", {}).get("phase") == "Running"
            if running and not pod["metadata"].get("deletionTimestamp"):
                return dict(pod)
        raise RefusedError(503, f"the RayCluster {cluster} has no running head pod")


def _rewrite(
    submission: dict[str, Any], pod: dict[str, Any], folder: pod_folders.Folder, internal: str
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


def _answer(answer: ray_client.Answer, folder: pod_folders.Folder | None) -> web.Response:
    """Ray's answer with KubeRay's names of the jobs."""
    content = answer.body
    names = {folder.internal(job): job for job in folder.jobs} if folder else {}
    for internal, job in names.items():
        content = content.replace(json.dumps(internal).encode(), json.dumps(job).encode())
    headers = {key: value for key, value in answer.headers.items() if key.lower() not in HOP_HEADERS}
    return web.Response(status=answer.status, body=content, headers=headers)


async def serve(*, port: int, server: str, pki: Path, dashboard: str, folder: Path) -> None:
    """Run until SIGTERM or SIGINT."""
    context = kubeapi.client_context(pki, "ray-gateway")
    timeout = aiohttp.ClientTimeout(total=60, connect=5)
    async with kubeaio.AsyncApi(server, context) as api, aiohttp.ClientSession(timeout=timeout) as session:
        ray = ray_client.RayClient(session, dashboard)
        lives = pod_lives.PodLives(api, ray, folder=folder)
        lives.restore()
        gateway = Gateway(api, ray, lives)
        runner = web.ServerRunner(web.Server(gateway.handle, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        LOG.info("listening on 127.0.0.1:%s, Ray is %s", port, dashboard)
        try:
            await _run_until_signal(lives.watch_pods(), lives.renew_tokens())
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
