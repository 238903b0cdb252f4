"""`finetune local` where folders and programs are not what they should be: one sentence, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_cli.local import app
from finetune_local import parts
from finetune_local.cluster import Cluster


@pytest.mark.parametrize("command", [["up", "--only", "etcd"], ["status"], ["env"], ["down"], ["logs"]])
def test_a_state_folder_that_is_a_file_is_named(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = CliRunner().invoke(app, [*command, "--state", str(file)])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.output.startswith(f"error: {file}")


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("FINETUNE_ASSETS", raising=False)
    done = CliRunner().invoke(app, ["build"])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert f"error: {tmp_path}/file/programs" in done.output


def test_a_damaged_program_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "programs" / "etcd"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("FINETUNE_ASSETS", str(program.parent))
    done = CliRunner().invoke(app, ["up", "--only", "etcd", "--state", str(tmp_path / "state")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert f"etcd cannot be started: {program}: Exec format error" in done.output
    assert "delete it" in done.output


def test_what_is_to_be_pasted_into_a_shell_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "finetune_cli.local._own_kubectl_folder", lambda announce: tmp_path / "my [b] programs"
    )
    monkeypatch.setattr(Cluster, "up", lambda *args, **kwargs: None)
    state = tmp_path / "my [b] state"
    done = CliRunner().invoke(app, ["up", "--state", str(state)])
    assert f"export KUBECONFIG='{state}/kubeconfig'" in done.output
    assert f"""export PATH="$PATH":'{tmp_path}/my [b] programs'""" in done.output


def test_nothing_to_start_is_not_a_cluster_that_is_ready(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["up", "--without", "training,serving", "--state", str(tmp_path / "state")]
    )
    assert done.exit_code == 2
    assert "training,serving leaves no part" in done.output
    assert "control-plane" in done.output
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", [["up", "--only", "etcd"], ["down"], ["status"]])
def test_a_current_folder_that_was_removed_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    done = CliRunner().invoke(app, [*command, "--state", "state"])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.output == "error: the current folder was removed: change to another one\n"


def test_names_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", "--state", str(tmp_path / "state")], env={"COLUMNS": "40"})
    assert all(f" {part} " in done.output for part in parts.ALL)


def test_the_environment_of_a_cluster_that_was_never_started_is_told_as_that(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["env", "--state", str(tmp_path / "state")])
    assert done.stdout.startswith("export KUBECONFIG=")
    assert done.stderr == "There is no cluster yet; start it first: finetune local up\n"


def test_letters_that_the_terminal_lacks_are_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "local", "status", "--state", str(tmp_path / "für mich")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"f\xfcr mich/logs/<part>.log" in done.stdout
