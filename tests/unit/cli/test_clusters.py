"""What the commands say where there is no cluster, or no such object, whatever they were given."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_cli.__main__ import app

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {}}]
"""


def run(*arguments: str, code: int = 2) -> str:
    result = CliRunner().invoke(app, ["jobs", *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "content", [b"- a", b"a: b: c", b"hello", b"\xd0\x00", b"contexts: 1\ncurrent-context: x"]
)
def test_a_file_that_is_no_kubeconfig_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(content)
    told = run("list", "--kubeconfig", str(tmp_path / "config"))
    assert f"error: {tmp_path}/config is no kubeconfig" in told.replace("\n", "")


@pytest.mark.parametrize("name", ["", ".", "..", "ftj/triage"])
@pytest.mark.parametrize("command", ["describe", "watch"])
def test_what_cannot_be_a_name_is_asked_of_no_cluster(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(KUBECONFIG)
    told = run(command, name, "--kubeconfig", str(tmp_path / "config"))
    assert f"error: {name!r} is no name of a FineTuneJob; see: finetune jobs list -A" in told


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = run("list", "--kubeconfig", str(tmp_path / "none")).replace("\n", "")
    assert told.startswith(f"error: {tmp_path}/none: ")


def test_a_context_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(KUBECONFIG)
    told = run("list", "--context", "y", "--kubeconfig", str(tmp_path / "config")).replace("\n", "")
    assert told == f"error: --context: {tmp_path}/config has no context 'y'; there are x"


def test_a_folder_is_no_kubeconfig(tmp_path: Path) -> None:
    told = run("list", "--kubeconfig", str(tmp_path)).replace("\n", "")
    assert told == f"error: {tmp_path}: Is a directory; set KUBECONFIG or --kubeconfig to a file"


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("server:", "certificate-authority-data: a, server:", "in it is no base64"),
        ("user: {}", "user: {tokenFile: /nowhere/token}", "error: /nowhere/token: No such file"),
    ],
    ids=["no base64", "no file"],
)
def test_credentials_that_cannot_be_used_are_told(
    before: str, after: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(KUBECONFIG.replace(before, after))
    assert complaint in run("list", "--kubeconfig", str(tmp_path / "config")).replace("\n", "")


def test_a_certificate_that_is_none_is_not_taken_for_a_cluster_that_is_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        authority = f'certificate-authority-data: Z2FyYmFnZQ==, server: "https://127.0.0.1:{port}"'
        (tmp_path / "config").write_text(KUBECONFIG.replace('server: "https://127.0.0.1:1"', authority))
        told = run("list", "--kubeconfig", str(tmp_path / "config")).replace("\n", "")
    assert told.startswith(f"error: no TLS with https://127.0.0.1:{port}: ")
    assert told.endswith("; check its certificates in the kubeconfig")


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing of it into the test's output."""


def test_credentials_that_have_run_out_are_told(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "config").write_text(KUBECONFIG.replace("https://127.0.0.1:1", here))
        told = run("list", "--kubeconfig", str(tmp_path / "config")).replace("\n", "")
        server.shutdown()
    assert told.startswith("error: the API server refuses the credentials (401): sign in anew")


class Busy(Refusing):
    """As the API server answers for a second after a CRD came: 429, the storage is (re)initializing."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.asked > 2:
            body = b'{"items": []}'
            self.send_response(200)
        else:
            body = b'{"kind": "Status", "code": 429}'
            self.send_response(429)
            self.send_header("Retry-After", "0")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "config").write_text(KUBECONFIG.replace("https://127.0.0.1:1", here))
        told = run("list", "--kubeconfig", str(tmp_path / "config"), "-o", "json", code=0)
        server.shutdown()
    assert json.loads(told) == []
    assert Busy.asked == 3


def test_an_exec_plugin_that_fails_is_told(tmp_path: Path) -> None:
    plugin = "{exec: {apiVersion: client.authentication.k8s.io/v1, command: no-such-plugin, interactiveMode: Never}}"
    (tmp_path / "config").write_text(KUBECONFIG.replace("user: {}", f"user: {plugin}"))
    told = run("list", "--kubeconfig", str(tmp_path / "config")).replace("\n", "")
    assert told.startswith(f"error: the credentials of {tmp_path}/config cannot be had: ")
    assert "no-such-plugin" in told


@pytest.mark.parametrize("namespace", ["A/../x", "..", "Team", "-a", "a" * 64])
def test_what_cannot_be_a_namespace_is_asked_of_no_cluster(namespace: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(KUBECONFIG)
    told = run("list", f"--namespace={namespace}", "--kubeconfig", str(tmp_path / "config"))
    assert "is no name of a namespace" in " ".join(told.replace("│", "").split())


def test_a_cluster_that_takes_connections_and_never_answers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_cli.watches.REQUEST_TIMEOUT", (0.2, 0.2))
    (tmp_path / "job.yaml").write_text(
        "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "config").write_text(KUBECONFIG.replace("https://127.0.0.1:1", address))
        for command in (
            ["list"],
            ["list", "-A"],
            ["describe", "a"],
            ["validate", "-f", f"{tmp_path}/job.yaml"],
        ):
            told = run(*command, "--kubeconfig", str(tmp_path / "config")).replace("\n", "")
            assert f"{address} does not answer" in told
