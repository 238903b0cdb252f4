"""What the process says where it cannot start: a sentence that names the setting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_local.ports import choose

ROOT = Path(__file__).parents[3]
KUBECONFIG = {
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
}


def started(folder: Path, **environment: str) -> str:
    """The log of an operator that does not start."""
    (folder / "kubeconfig").write_text(json.dumps(KUBECONFIG))
    done = subprocess.run(
        [sys.executable, "-m", "finetune_operator"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "operator"),
            "KUBECONFIG": str(folder / "kubeconfig"),
            "FINETUNE_LOG_FORMAT": "plain",
            "FINETUNE_STATUS_HOST": "127.0.0.1",
            "FINETUNE_METRICS_HOST": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ["STATUS", "METRICS"])
def test_a_port_that_is_taken_is_named(name: str, tmp_path: Path) -> None:
    ports = choose(("STATUS", "METRICS"), known={}, in_use_by_us=[])
    with socket.create_server(("127.0.0.1", ports[name])):
        log = started(tmp_path, **{f"FINETUNE_{one}_PORT": str(port) for one, port in ports.items()})
    assert f"the operator ends: FINETUNE_{name}_HOST and FINETUNE_{name}_PORT: " in log
    assert "address already in use" in log


def test_a_certificate_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tls.crt").write_text("garbage")
    file = str(tmp_path / "tls.crt")
    log = started(tmp_path, FINETUNE_TLS_CERT_FILE=file, FINETUNE_TLS_KEY_FILE=file)
    assert "the operator ends: FINETUNE_TLS_CERT_FILE and FINETUNE_TLS_KEY_FILE: " in log


def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path) -> None:
    assert "the operator ends: the kubeconfig /nowhere cannot be used: " in started(
        tmp_path, KUBECONFIG="/nowhere"
    )
