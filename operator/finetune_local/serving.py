"""The serving side of the laptop cluster: one engine, one router, and what they need on disk before they start."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune_local import errors, layouts, models
from finetune_local.commands import Setting

DEFAULT_MODEL = f"pvc://models/{models.NAME}"
DEFAULT_LENGTH = 2048  # tokens of prompt and answer: a quarter of what the model can, in memory as well


def router(setting: Setting) -> list[str]:
    layout, numbers = setting.layout, setting.ports
    return [
        sys.executable, "-m", "finetune_router", "--host=127.0.0.1", f"--port={numbers['router']}",
        "--admin-host=127.0.0.1", f"--admin-port={numbers['router-admin']}", "--workers=1",
        f"--state-dir={layout.router}", f"--admin-token-file={layout.token('router')}", "--grace=5",
    ]  # fmt: skip


def engine(setting: Setting) -> list[str]:
    layout, numbers, model = setting.layout, setting.ports, setting.engine_model
    return [
        sys.executable, "-m", "finetune_server", f"--model={model}", f"--served-model-name={served_name(model)}",
        *([f"--max-model-len={DEFAULT_LENGTH}"] if model == DEFAULT_MODEL else []),
        "--host=127.0.0.1", f"--port={numbers['engine']}",
        f"--agent-port={numbers['engine-agent']}", f"--agent-token-file={layout.token('agent')}",
        f"--state-dir={layout.engine / 'state'}", f"--cache-dir={layout.engine / 'adapters'}",
    ]  # fmt: skip


def engine_environment(setting: Setting) -> dict[str, str]:
    return {"FINETUNE_VOLUMES": str(setting.layout.volumes)}


def operator_environment(setting: Setting) -> dict[str, str]:
    """Where the operator finds routers and engine, and its tokens for them."""
    layout, numbers = setting.layout, setting.ports
    alerts = {"FINETUNE_ALERT_PROVIDERS_FILE": str(layout.alerts)} if layout.alerts.is_file() else {}
    return {
        **alerts,
        "FINETUNE_NAMESPACE": "finetune-system",
        "FINETUNE_ROUTER_ADMIN_URLS": f"http://127.0.0.1:{numbers['router-admin']}",
        "FINETUNE_ROUTER_TOKEN_FILE": str(layout.token("router")),
        "FINETUNE_ENGINE_URL": f"http://127.0.0.1:{numbers['engine']}",
        "FINETUNE_AGENT_URL": f"http://127.0.0.1:{numbers['engine-agent']}",
        "FINETUNE_AGENT_TOKEN_FILE": str(layout.token("agent")),
    }


def served_name(model: str) -> str:
    """The name of a model's folder or repository."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def find_model(text: str) -> str:
    """What `--engine-model` means, as a URI: a URI, a folder, or the name of a folder in the cache.

    Raises LocalClusterError when there is no such model.
    """
    cached = layouts.cache_folder() / "models"
    if "://" in text:
        return text
    if Path(text).expanduser().is_dir():
        return f"file://{Path(text).expanduser().absolute()}"
    if "/" not in text and (text == models.NAME or (cached / text).is_dir()):
        return f"pvc://models/{text}"
    raise errors.LocalClusterError(
        f"the engine's model {text!r} is neither a folder nor a URI nor the name of a folder in {cached}",
        remedy=f"Name one of these, or leave it out for {models.NAME}.",
    )


def prepare_model(model: str, report: Callable[[str], None]) -> None:
    """Have the default model in the cache; another one is the user's own. Raises LocalClusterError."""
    if model != DEFAULT_MODEL:
        return
    try:
        models.prepare_smollm2(layouts.cache_folder(), report)
    except models.ModelPreparationError as error:
        raise errors.LocalClusterError(
            str(error), remedy="Or name another model: finetune local up --engine-model FOLDER."
        ) from error


def ensure_tokens(layout: layouts.Layout) -> None:
    """The shared secrets of operator, router and agent; made once, readable by the user only."""
    for name in ("router", "agent"):
        if not layout.token(name).exists():
            layouts.write_private(layout.token(name), secrets.token_hex(24))


def link_volumes(layout: layouts.Layout, volumes: Mapping[str, Path]) -> None:
    """Folders by the names of their claims, for pvc:// URIs: what a pod would have mounted."""
    for name, folder in volumes.items():
        place = layout.volumes / name
        if place.is_symlink() and place.readlink() == folder:
            continue
        temporary = place.with_name(f".{name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder)
        temporary.replace(place)  # the engine may be reading through it
