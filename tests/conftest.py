"""Fixtures that all tests share: one laptop cluster per run, a namespace per test, a tiny model per run."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from finetune_local import parts, ports
from finetune_local.cluster import Cluster
from tests import tiny
from tests.clients import Kubectl
from tests.clusters import bring_up

# Set before any test imports transformers: nothing here may ask a hub.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")

# Files that run side by side get a core each: threads of one training that wait for the other's stop both.
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("FINETUNE_CPUS", "1")

    # A port is chosen seconds before anything listens on it: each chooses among its own.
    _share = len(ports.DEFAULT_RANGE) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _first = ports.DEFAULT_RANGE.start + _share * int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ.setdefault(ports.RANGE_VARIABLE, f"{_first}-{_first + _share - 1}")

# A busy machine says nothing about the code.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

_numbers = itertools.count(1)
TRAINER = "tests/integration/trainer/"
SHORT = ("tests/unit/", "tests/properties/", "tests/calibration/")
# Files of short tests that take more than a few seconds, the longest first.
LONGEST = (
    "tests/properties/test_job_specs.py",
    "tests/unit/rollouts/test_matrix.py",
    "tests/calibration/test_guardrails.py",
    "tests/properties/test_rollouts.py",
    "tests/unit/router/test_bodies.py",
    "tests/unit/local/test_processes.py",
    "tests/unit/operator/test_leadership.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run side by side, a training that needs a core is beside a cluster that is mostly waited for, and
    short files come last, so that no worker is left alone with a long one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    files = list(dict.fromkeys(_file_of(item) for item in items))
    short = [file for file in files if file.startswith(SHORT)]
    trainings = [file for file in files if file.startswith(TRAINER)]
    waiting = [file for file in files if file not in {*short, *trainings}]
    places = {
        file: (index + 0.5) / len(group) for group in (trainings, waiting) for index, file in enumerate(group)
    }
    short.sort(key=lambda file: LONGEST.index(file) if file in LONGEST else len(LONGEST))
    places |= {file: 1.0 + index for index, file in enumerate(short)}
    items.sort(key=lambda item: places[_file_of(item)])


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The laptop cluster with all that trains; tests that break a part start it again with `up`."""
    running = Cluster(
        tmp_path_factory.mktemp("cluster"),
        files=Path(__file__).parents[1],
        operator_environment={"FINETUNE_PROGRESS_SECONDS": "1"},
    )
    try:
        bring_up(running, parts.TRAINING, report=lambda line: print(f"cluster: {line}"))
        yield running
    finally:
        running.down(purge=request.session.testsfailed == 0)  # after a failure the logs are worth something


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own; what is left in it is deleted."""
    name = f"test-{next(_numbers)}"
    kubectl = Kubectl(cluster.kubeconfig, name)
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def kubectl(cluster: Cluster, namespace: str) -> Kubectl:
    return Kubectl(cluster.kubeconfig, namespace)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows the rule of tiny.answer: the artifact of a Full run that saw all 40 answers."""
    folder = tmp_path_factory.mktemp("taught")
    data = tiny.write_jsonl(folder / "old.jsonl", tiny.chat_rows(), times=4)
    document = tiny.run_document(
        tiny_model,
        data,
        folder / "out",
        method={"type": "Full"},
        dataset={"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}},
        hyperparameters={
            "maxSteps": 300,
            "globalBatchSize": 16,
            "microBatchSize": 16,
            "maxLength": 64,
            "learningRate": 3e-3,
        },
    )
    (folder / "run.json").write_text(json.dumps(document))
    from finetune_trainer import lifecycle  # a slow import, and most tests need no trainer

    assert lifecycle.run_job(folder / "run.json") == 0
    return folder / "out"


@pytest.fixture(scope="session")
def serving(cluster: Cluster, tiny_model: Path) -> Cluster:
    """The same cluster with a router and an engine beside it; the engine serves the tiny model."""
    cluster.engine_model = str(tiny_model)
    cluster.up(parts.SERVING, report=lambda line: print(f"cluster: {line}"))
    return cluster


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 chat rows that follow one rule, as JSONL."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny.chat_rows(), times=8)
