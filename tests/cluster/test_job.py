"""One job from apply to artifact, looked at from all sides while it runs: its secret, its token, its reports.

The operator that leads is killed on the way, and nobody notices.
"""

from __future__ import annotations

import base64
import json
import secrets

import pytest

from finetune_operator.manifests import naming
from tests.clients import Json, Kubectl
from tests.cluster import stories
from tests.cluster.objects import (
    JOB_SECONDS,
    LONG,
    at_work,
    head_pod,
    job,
    leader,
    run_in_head,
    run_pod,
    wait_for,
)
from tests.cluster.stories import Stage

NAME = "succeeds"
SECRET = secrets.token_hex(16)
LOOK = f"""
import json
import os
from pathlib import Path

secret = os.environ["DATASET_TOKEN"].encode()
found = {{"token": Path("{naming.TOKEN_FOLDER}/token").read_text(), "told": []}}
for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
    try:
        words = (process / "cmdline").read_bytes()
        if words.split(b"\\0")[1:3] == [b"/opt/finetune/bin/finetune-trainer", b"run"]:
            environment = (process / "environ").read_bytes().split(b"\\0")
            found["trainer"] = [word.decode() for word in environment if word.startswith(b"DATASET_")]
    except OSError:
        continue  # it has just ended, or belongs to somebody else
    if secret in words:
        found["told"].append(words.decode(errors="replace"))
for path in Path("/tmp/ray").rglob("*"):
    if path.is_file() and path.stat().st_size < 50_000_000 and secret in path.read_bytes():
        found["told"].append(str(path))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def running(stage: Stage) -> Json:
    """The job's object; it takes steps and will do so for a while."""
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "dataset"}}
    stage.team.apply({**body, "stringData": {"DATASET_TOKEN": SECRET}})
    dataset = {"sources": [{"uri": "pvc://files/chat.jsonl"}], "secretRef": {"name": "dataset"}}
    stage.team.apply(job(NAME, dataset=dataset, hyperparameters={**LONG, "maxSteps": 300}))
    return stage.team.wait_job(NAME, lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS)


@pytest.fixture(scope="module")
def seen(stage: Stage, running: Json) -> Json:
    """What a look into the running pod brings, its own log included."""
    found: Json = json.loads(run_in_head(stage.team, NAME, LOOK))
    found["pod"] = head_pod(stage.team, NAME)
    found["log"] = stage.team("logs", found["pod"]["metadata"]["name"], "--all-containers")
    return found


def test_the_trainer_has_the_datasets_secret(seen: Json) -> None:
    assert seen["trainer"] == [f"DATASET_TOKEN={SECRET}"]


def test_it_reports_over_tls_with_a_token_of_its_own(seen: Json, running: Json) -> None:
    spec = seen["pod"]["spec"]
    (head,) = (one for one in spec["containers"] if one["name"] == naming.HEAD_CONTAINER)
    environment = {entry["name"]: entry.get("value") for entry in head["env"]}
    assert environment["KUBEFLOW_TRAINER_SERVER_URL"].startswith("https://")
    assert environment["KUBEFLOW_TRAINER_SERVER_CA_CERT"]
    assert environment["KUBEFLOW_TRAINER_SERVER_TOKEN"] == f"{naming.TOKEN_FOLDER}/token"
    (mount,) = (one["name"] for one in head["volumeMounts"] if one["mountPath"] == naming.TOKEN_FOLDER)
    (volume,) = (one for one in spec["volumes"] if one["name"] == mount)
    (source,) = volume["projected"]["sources"]
    audience = naming.audience(running["metadata"]["uid"])
    assert source["serviceAccountToken"]["audience"] == audience
    claims = seen["token"].split(".")[1]
    assert json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["aud"] == [audience]


def test_the_operators_leader_is_killed_meanwhile(stage: Stage, seen: Json, installed: Kubectl) -> None:
    del seen  # first the look into the pod
    before = leader(installed)
    installed("delete", "pod", before, "--grace-period=0", "--force", "--wait=false")
    wait_for("another leader", lambda: leader(installed) not in (before, ""), seconds=60)
    step = stage.team.job(NAME)["status"]["progress"]["step"]
    stage.team.wait_job(NAME, lambda status: status["progress"]["step"] > step, seconds=60)


def test_it_succeeds_and_was_heard_on_the_way(stage: Stage, running: Json) -> None:
    del running
    status = stage.team.finished(NAME, seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert [one["class"] for one in status["attempts"]] == ["Succeeded"]
    assert status["progress"]["step"] == 300
    assert any(0 < percent < 100 for percent in stage.watcher.percents(NAME))
    stage.runs_once(NAME, 1)


def test_its_digest_is_that_of_the_manifest_on_the_volume(stage: Stage) -> None:
    artifact = stage.team.finished(NAME, seconds=JOB_SECONDS)["artifact"]
    folder = artifact["uri"].removeprefix("pvc://files/")
    script = f"import hashlib\nprint(hashlib.sha256(open('/files/{folder}/manifest.json', 'rb').read()).hexdigest())"
    printed = run_pod(stage.team, "digest", stage.settings.trainer_image, script, seconds=120)
    assert artifact["digest"] == f"sha256:{printed.strip()}"


def test_nothing_tells_the_secret(stage: Stage, seen: Json, installed: Kubectl) -> None:
    """Neither processes nor logs of the pod, nor any object but the Secret, nor the logs of submitter and operator."""
    assert seen["told"] == []
    assert SECRET not in seen["log"]
    submitter = stage.team("logs", f"job/{NAME}-a1")
    assert "rows to train on" in submitter
    assert SECRET not in submitter
    kinds = "ftj,rayjobs,rayclusters,jobs,pods,services,configmaps,events"
    assert SECRET not in stage.team("get", kinds, "-o", "json")
    assert SECRET not in installed(
        "logs", "--prefix", "--tail=-1", "-l", "app.kubernetes.io/component=operator"
    )


def test_what_it_leaves_to_read_does_not_run(stage: Stage) -> None:
    wait_for("no pod runs", lambda: not at_work(stage.team), seconds=90)
