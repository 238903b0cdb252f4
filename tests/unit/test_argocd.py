"""The scripts for Argo CD, run by the Lua version that Argo CD has (5.1)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa import lua51

from finetune_operator.api.adapterdeployment_status import RolloutPhase
from finetune_operator.api.base import ACTION_ANNOTATION
from finetune_operator.api.finetunejob import Phase

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "rollouts" / "gitops-promotion" / "argocd" / "argocd-cm.yaml"
SCRIPTS: dict[str, str] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["data"]
ACTIONS, JOB_ACTIONS = (
    yaml.safe_load(SCRIPTS[f"resource.customizations.actions.finetune.dev_{kind}"])
    for kind in ("AdapterDeployment", "FineTuneJob")
)


def call(script: str, body: dict[str, Any]) -> dict[str, Any]:
    """What Argo CD gets: `obj` is the live object, the script returns a table."""
    runtime = lua51.LuaRuntime(unpack_returned_tuples=True)
    runtime.globals().obj = runtime.table_from(body, recursive=True)
    result = runtime.execute(script)
    return {key: dict(value) if lua51.lua_type(value) == "table" else value for key, value in result.items()}


def deployment(phase: str | None, **status: Any) -> dict[str, Any]:
    full = {"observedGeneration": 2, "phase": phase, "message": "so it is", **status}
    return {
        "metadata": {"name": "a", "generation": 2},
        "status": {key: value for key, value in full.items() if value is not None},
    }


def health(body: dict[str, Any], kind: str = "AdapterDeployment") -> dict[str, Any]:
    return call(SCRIPTS[f"resource.customizations.health.finetune.dev_{kind}"], body)


@pytest.mark.parametrize("phase", RolloutPhase)
def test_every_phase_has_a_health(phase: RolloutPhase) -> None:
    expected = {"Pending": "Progressing", "Paused": "Suspended"}
    assert health(deployment(phase)) == {"status": expected.get(phase, phase), "message": "so it is"}


@pytest.mark.parametrize("stalled", ["True", "False"])
def test_a_spec_that_cannot_be_acted_on_is_not_waited_for(stalled: str) -> None:
    """For example one whose alias another deployment has: it stays Pending until somebody changes it."""
    conditions = [{"type": "Reconciling", "status": "False"}, {"type": "Stalled", "status": stalled}]
    expected = "Degraded" if stalled == "True" else "Progressing"
    assert health(deployment("Pending", conditions=conditions))["status"] == expected


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {"generation": 1}},
        deployment(None),
        deployment("Healthy", observedGeneration=1),
    ],
    ids=["no-status", "no-phase", "older-spec"],
)
def test_a_status_that_is_not_about_this_spec_is_progressing(body: dict[str, Any]) -> None:
    assert health(body)["status"] == "Progressing"


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("Running", "Progressing"),
        ("Succeeded", "Healthy"),
        ("Failed", "Degraded"),
        ("Cancelled", "Suspended"),
    ],
)
def test_health_of_a_finetunejob(phase: str, expected: str) -> None:
    assert health(deployment(phase), "FineTuneJob")["status"] == expected


@pytest.mark.parametrize(
    ("body", "offered"),
    [
        ({"metadata": {}}, set()),
        (deployment("Progressing"), {"promote", "promote-full", "abort", "pause"}),
        (deployment("Paused"), {"promote", "promote-full", "abort", "resume"}),
        (deployment("Healthy"), set()),
        (deployment("Degraded"), set()),
        (deployment("Degraded", abort={"reason": "GuardrailBreached"}), {"retry"}),
    ],
    ids=["new", "progressing", "paused", "healthy", "degraded", "aborted"],
)
def test_actions_are_offered_where_they_make_sense(body: dict[str, Any], offered: set[str]) -> None:
    found = call(ACTIONS["discovery.lua"], body)
    assert set(found) == {definition["name"] for definition in ACTIONS["definitions"]}
    assert {name for name, action in found.items() if not action["disabled"]} == offered


@pytest.mark.parametrize("phase", [None, *Phase])
def test_a_job_can_be_cancelled_until_it_has_ended(phase: Phase | None) -> None:
    found = call(JOB_ACTIONS["discovery.lua"], deployment(phase) if phase else {"metadata": {}})
    ended = phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)
    assert {name: action["disabled"] for name, action in found.items()} == {"cancel": ended}


@pytest.mark.parametrize(
    "definition",
    [*ACTIONS["definitions"], *JOB_ACTIONS["definitions"]],
    ids=lambda definition: str(definition["name"]),
)
@pytest.mark.parametrize("annotations", [{}, {"annotations": {"team": "a"}}], ids=["none", "some"])
def test_an_action_sets_the_annotation_and_nothing_else(
    definition: dict[str, str], annotations: dict[str, Any]
) -> None:
    changed = call(definition["action.lua"], {"metadata": {"name": "a", **annotations}})
    found = dict(changed["metadata"]["annotations"])
    assert found == {**annotations.get("annotations", {}), ACTION_ANNOTATION: definition["name"]}


def test_scripts_use_no_library() -> None:
    """Argo CD opens none unless told to."""
    text = "\n".join(SCRIPTS.values())
    assert not re.search(r"\b(require|os|string|table|io)[.(]", text)
