"""What router, engine and operator are started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finetune_local import commands, errors, layouts, models, parts, serving


@pytest.fixture
def setting(tmp_path: Path) -> commands.Setting:
    layout = layouts.Layout(tmp_path)
    layout.create()
    return commands.Setting(
        layout=layout,
        identity="i",
        ports={name: 20_000 + number for number, name in enumerate(parts.PORTS)},
        programs={},
        ray_parameters={},
        operator_environment={},
        engine_model=serving.DEFAULT_MODEL,
    )


def test_models_by_name_by_folder_and_by_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "llama").mkdir()
    assert serving.find_model("hf://organization/model") == "hf://organization/model"
    assert serving.find_model(str(tmp_path / "llama")) == f"file://{tmp_path}/llama"
    assert serving.find_model("mine") == "pvc://models/mine"
    assert serving.find_model(models.NAME) == serving.DEFAULT_MODEL, "it is made when it is not there"
    with pytest.raises(errors.LocalClusterError, match="'other' is neither a folder nor a URI"):
        serving.find_model("other")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (serving.DEFAULT_MODEL, models.NAME),
        ("file:///models/tiny/", "tiny"),
        ("hf://organization/Model-1B", "Model-1B"),
    ],
)
def test_the_served_name_is_that_of_the_folder(model: str, name: str) -> None:
    assert serving.served_name(model) == name


def test_tokens_are_private_and_stay(setting: commands.Setting) -> None:
    serving.ensure_tokens(setting.layout)
    files = [setting.layout.token(name) for name in ("router", "agent")]
    before = [file.read_text() for file in files]
    assert len(set(before)) == 2
    assert all(len(token) == 48 for token in before)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    serving.ensure_tokens(setting.layout)
    assert [file.read_text() for file in files] == before


def test_volumes_follow_their_folders(setting: commands.Setting, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        serving.link_volumes(setting.layout, {"files": tmp_path / name})
        assert (setting.layout.volumes / "files" / "file").read_text() == name
    assert [path.name for path in setting.layout.volumes.iterdir()] == ["files"]


def test_alerts_reach_the_operator_once_there_are_any(setting: commands.Setting) -> None:
    variable = "FINETUNE_ALERT_PROVIDERS_FILE"
    part = parts.PARTS["operator"]
    assert variable not in part.environment(setting)
    before = parts.fingerprint(part, setting)
    setting.layout.alerts.write_text('{"slack": "http://127.0.0.1:9/hook"}')
    assert part.environment(setting)[variable] == str(setting.layout.alerts)
    assert parts.fingerprint(part, setting) != before, "`up` restarts it"


def test_the_operator_of_a_test_may_be_told_otherwise(setting: commands.Setting) -> None:
    told = dataclasses.replace(setting, operator_environment={"FINETUNE_ENGINE_URL": "http://other:1"})
    assert parts.PARTS["operator"].environment(told)["FINETUNE_ENGINE_URL"] == "http://other:1"


def test_every_port_belongs_to_a_part() -> None:
    assert {port for port in parts.PORTS if not any(port.startswith(name) for name in parts.ALL)} == set()
