"""The private folder of a pod: its volumes, its environment and its tokens, prepared as a kubelet would."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

from finetune_local import kubeaio, layouts, pods

Object = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Token:
    """A projected service-account token: where it goes, for whom, and when it is renewed (seconds since the epoch)."""

    file: str
    audience: str | None
    expiration_seconds: int
    renew_at: float


@dataclasses.dataclass
class Folder:
    """What is known about a prepared pod; saved as pod.json, so that a restarted gateway goes on."""

    path: Path
    namespace: str
    service: str
    pod: str
    uid: str
    service_account: str
    jobs: list[str] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.path / "root"

    def save(self) -> None:
        fields = dataclasses.asdict(self)
        del fields["path"]
        layouts.write_private(self.path / "pod.json", json.dumps(fields))

    @classmethod
    def load(cls, path: Path) -> Folder | None:
        """None when the folder is not whole: the gateway died while it was made, nothing was submitted."""
        try:
            fields = json.loads((path / "pod.json").read_text())
            tokens = [Token(**token) for token in fields.pop("tokens")]
            return cls(path=path, tokens=tokens, **fields)
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            return None

    def internal(self, job: str) -> str:
        """The job's name in Ray: KubeRay's, made unique per pod, because all clusters share one Ray here."""
        return f"{job}.{self.uid[:8]}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


async def prepare(api: kubeaio.AsyncApi, pod: Object, *, service: str, path: Path) -> Folder:
    """Make the folder anew. Raises pods.PodError or ApiError; a half-made folder is then removed."""
    metadata = pod["metadata"]
    folder = Folder(
        path=path,
        namespace=metadata["namespace"],
        service=service,
        pod=metadata["name"],
        uid=metadata["uid"],
        service_account=pod["spec"].get("serviceAccountName", "default"),
    )
    folder.remove()
    for part in (path, path / "volumes", path / "work", folder.root):
        part.mkdir(mode=0o700, parents=True)
    try:
        mounts = pods.mounts_of(pod)
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        made: dict[str, Path] = {}
        for name in {mount.volume for mount in mounts}:
            made[name] = await _make_volume(api, pod, folder, volumes[name])
        for mount in mounts:
            _link(folder.root, mount, made[mount.volume])
        environment = pods.environment_of(pod, await _read_references(api, pod))
        root = str(folder.root)
        relocated = {name: pods.relocate(value, mounts, root) for name, value in environment.items()}
        layouts.write_private(path / "environment.json", json.dumps(relocated))
        folder.save()
    except BaseException:
        folder.remove()
        raise
    return folder


def write_launch(folder: Folder, job: str, *, entrypoint: str, runtime_env: Object) -> None:
    """What pod_exec needs to know about one submission."""
    launch = {
        "entrypoint": entrypoint,
        "keep": sorted(runtime_env.get("env_vars") or {}),
        "has_working_dir": bool(runtime_env.get("working_dir")),
    }
    layouts.write_private(folder.path / f"{job}.launch.json", json.dumps(launch))


async def renew_tokens(api: kubeaio.AsyncApi, folder: Folder, *, now: float) -> None:
    """Replace the tokens that are due. Raises ApiError."""
    renewed = []
    for token in folder.tokens:
        renewed.append(token if token.renew_at > now else await _write_token(api, folder, token))
    if renewed != folder.tokens:
        folder.tokens = renewed
        folder.save()


def _link(root: Path, mount: pods.Mount, volume: Path) -> None:
    """Put the volume at its mount path below `root`."""
    place = root / mount.path.lstrip("/")
    for parent in place.relative_to(root).parents:
        if (root / parent).is_symlink():
            raise pods.PodError(
                f"the mount {mount.path} lies inside the mount /{parent}: the laptop cluster cannot do that, "
                "because it would write into that volume; mount them side by side"
            )
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = volume / pods.safe_path(mount.sub_path) if mount.sub_path else volume
    if mount.sub_path and not target.exists():
        target.mkdir(mode=0o700, parents=True)
    place.symlink_to(target)


async def _make_volume(api: kubeaio.AsyncApi, pod: Object, folder: Folder, volume: Object) -> Path:
    path = folder.path / "volumes" / str(volume["name"])
    if "persistentVolumeClaim" in volume:
        return await _resolve_claim(api, folder.namespace, volume["persistentVolumeClaim"]["claimName"])
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    path.mkdir(mode=0o700)
    if "emptyDir" in volume:
        return path
    if "configMap" in volume or "secret" in volume:
        kind = "configMap" if "configMap" in volume else "secret"
        await _write_data(api, folder.namespace, kind, volume[kind], path)
        return path
    if "downwardAPI" in volume:
        _write_fields(pod, volume["downwardAPI"], path)
        return path
    if "projected" not in volume:
        kinds = ", ".join(sorted(key for key in volume if key != "name"))
        raise pods.PodError(
            f"the volume {volume['name']} is of the kind {kinds}, which the laptop cluster does not have; it has "
            "configMap, secret, projected, downwardAPI, emptyDir, hostPath and claims bound to hostPath volumes"
        )
    for source in volume["projected"].get("sources", []):
        await _project(api, pod, folder, source, path)
    return path


async def _project(api: kubeaio.AsyncApi, pod: Object, folder: Folder, source: Object, path: Path) -> None:
    if "serviceAccountToken" in source:
        wanted = source["serviceAccountToken"]
        token = Token(
            file=str(path / pods.safe_path(wanted["path"])),
            audience=wanted.get("audience"),
            expiration_seconds=int(wanted.get("expirationSeconds", 3600)),
            renew_at=0.0,
        )
        folder.tokens.append(await _write_token(api, folder, token))
    elif "configMap" in source or "secret" in source:
        kind = "configMap" if "configMap" in source else "secret"
        await _write_data(api, folder.namespace, kind, source[kind], path)
    elif "downwardAPI" in source:
        _write_fields(pod, source["downwardAPI"], path)
    else:
        raise pods.PodError(
            f"a projected volume has a source that the laptop cluster does not have: {', '.join(source)}"
        )


async def _write_token(api: kubeaio.AsyncApi, folder: Folder, token: Token) -> Token:
    """Ask for a token that dies with the pod, and put it in place atomically."""
    spec: Object = {
        "expirationSeconds": token.expiration_seconds,
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": folder.pod, "uid": folder.uid},
    }
    if token.audience:
        spec["audiences"] = [token.audience]
    base = f"/api/v1/namespaces/{folder.namespace}/serviceaccounts/{folder.service_account}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = await api.call("POST", base, body)
    file = Path(token.file)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    layouts.write_private(file, answer["status"]["token"])
    expires = datetime.datetime.fromisoformat(answer["status"]["expirationTimestamp"]).timestamp()
    now = datetime.datetime.now(datetime.UTC).timestamp()
    # A kubelet renews when a fifth of the lifetime is left.
    return dataclasses.replace(token, renew_at=now + 0.8 * (expires - now))


def _write_fields(pod: Object, source: Object, path: Path) -> None:
    for item in source.get("items", []):
        if "fieldRef" not in item:
            raise pods.PodError(f"the file {item['path']} of a downwardAPI volume has no fieldRef")
        value = pods.field_of(pod, item["fieldRef"]["fieldPath"])
        _write(path / pods.safe_path(item["path"]), value.encode())


async def _write_data(api: kubeaio.AsyncApi, namespace: str, kind: str, source: Object, path: Path) -> None:
    name = source.get("name") or source.get("secretName")
    title = "ConfigMap" if kind == "configMap" else "Secret"
    data = await _read_data(api, namespace, f"{kind.lower()}s", str(name))
    if data is None:
        if source.get("optional"):
            return
        raise pods.PodError(f"{title} {name} does not exist in namespace {namespace}; create it")
    texts = dict.fromkeys(data, "")
    for file, key in pods.pick_items(texts, source, f"{title} {name}").items():
        _write(path / file, data[key])


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    layouts.write_private(path, data)


async def _read_data(
    api: kubeaio.AsyncApi, namespace: str, plural: str, name: str
) -> dict[str, bytes] | None:
    """Key -> content of a ConfigMap or Secret, or None when it does not exist."""
    found = await api.get(f"/api/v1/namespaces/{namespace}/{plural}/{name}")
    if found is None:
        return None
    plain = found.get("data") or {}
    if plural == "secrets":
        return {key: base64.b64decode(value) for key, value in plain.items()}
    binary = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
    return {**{key: value.encode() for key, value in plain.items()}, **binary}


async def _read_references(api: kubeaio.AsyncApi, pod: Object) -> pods.References:
    namespace = pod["metadata"]["namespace"]

    async def read(plural: str, names: set[str]) -> dict[str, dict[str, str] | None]:
        found: dict[str, dict[str, str] | None] = {}
        for name in names:
            data = await _read_data(api, namespace, plural, name)
            found[name] = None if data is None else {k: os.fsdecode(v) for k, v in data.items()}
        return found

    config_maps, secrets = pods.named_references(pod)
    return pods.References(
        config_maps=await read("configmaps", config_maps), secrets=await read("secrets", secrets)
    )


async def _resolve_claim(api: kubeaio.AsyncApi, namespace: str, name: str) -> Path:
    """The folder behind a claim: claim -> bound volume -> hostPath."""
    claim = await api.get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
    if claim is None:
        raise pods.PodError(
            f"PersistentVolumeClaim {name} does not exist in namespace {namespace}; create it"
        )
    volume_name = claim["spec"].get("volumeName")
    if not volume_name or claim.get("status", {}).get("phase") != "Bound":
        raise pods.PodError(
            f"PersistentVolumeClaim {name} is not bound; create a PersistentVolume with hostPath for it"
        )
    volume = await api.get(f"/api/v1/persistentvolumes/{volume_name}")
    host_path = ((volume or {}).get("spec", {}).get("hostPath") or {}).get("path")
    if not host_path:
        raise pods.PodError(
            f"PersistentVolume {volume_name} of the claim {name} has no hostPath, "
            "and the laptop cluster can mount nothing else"
        )
    kind = (volume or {})["spec"]["hostPath"].get("type")
    return _existing(Path(host_path), claim=name, create=kind == "DirectoryOrCreate")


def _existing(path: Path, *, claim: str, create: bool) -> Path:
    if create:
        path.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        raise pods.PodError(
            f"the folder {path} behind the claim {claim} does not exist on this machine; create it"
        )
    return path
