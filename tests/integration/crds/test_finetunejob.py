"""The CRD of FineTuneJob on a real API server: what is taken, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_cli.kinds import JOB
from finetune_operator.api import finetunejob
from tests.integration.bad_jobs import BAD_JOBS, GOOD, QLORA, BadJob, good
from tests.integration.crds import offline
from tests.patches import merged

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("bad", BAD_JOBS, ids=[bad.name for bad in BAD_JOBS])
def test_bad_job_is_refused_with_words_that_help(create: Any, bad: BadJob) -> None:
    offline.assert_refused(create, JOB, merged(GOOD, bad.change), bad.expected)


def test_least_job_gets_every_default(create: Any) -> None:
    spec = create(GOOD)["spec"]
    assert spec == {
        "objective": "SFT",
        "model": {"uri": "hf://organization/model"},
        "method": {"type": "LoRA"},
        "dataset": {
            "sources": [{"uri": "pvc://files/train.jsonl"}],
            "split": {"eval": 0.05, "seed": 42},
            "applyChatTemplate": "Auto",
        },
        "hyperparameters": {
            "epochs": 3,
            "globalBatchSize": 16,
            "maxLength": 1024,
            "packing": False,
            "warmupRatio": 0.03,
            "scheduler": "Cosine",
            "weightDecay": 0,
            "maxGradNorm": 1,
            "optimizer": "AdamW",
            "precision": "Auto",
            "gradientCheckpointing": False,
            "seed": 42,
        },
        "resources": {"cpu": "1", "memory": "4Gi", "gpusPerWorker": 0, "fitCheck": "Auto"},
        "scheduling": {},
        "output": {},
        "checkpoint": {"keep": 2, "resume": "Auto"},
        "retry": {
            "maxUserRetries": 0,
            "maxInfraRetries": 5,
            "preemptions": "Unlimited",
            "onOutOfMemory": "ReduceBatch",
            "backoffSeconds": {"min": 10, "max": 600},
        },
        "deadlines": {"stallSeconds": 1800},
        "suspend": False,
    }


@pytest.mark.parametrize(
    ("spec", "path", "expected"),
    [
        ({"method": {}}, ["method"], {"type": "LoRA"}),
        (
            {"method": {"lora": {"r": 8}}},
            ["method", "lora"],
            {"r": 8, "alpha": 32, "dropout": 0.05, "targetModules": ["all-linear"]},
        ),
        ({"method": QLORA}, ["method", "quantization"], {"type": "nf4", "doubleQuant": True}),
        ({"earlyStopping": {}}, ["earlyStopping"], {"patience": 3, "minDelta": 0}),
        (
            {"resources": {"cpu": 2}},
            ["resources"],
            {"cpu": 2, "memory": "4Gi", "gpusPerWorker": 0, "fitCheck": "Auto"},
        ),
        ({"dataset": {"split": {"eval": 0}}}, ["dataset", "split"], {"eval": 0, "seed": 42}),
    ],
)
def test_parts_get_their_defaults(create: Any, spec: dict[str, Any], path: list[str], expected: Any) -> None:
    found = create(good(**spec))["spec"]
    for key in path:
        found = found[key]
    assert found == expected


GOOD_SPECS: dict[str, dict[str, Any]] = {
    "qlora": {"method": QLORA},
    "qlora-same-types": {
        "method": {"type": "QLoRA", "quantization": {"computeDtype": "bfloat16"}},
        "hyperparameters": {"precision": "BFloat16"},
    },
    "full": {"method": {"type": "Full"}},
    "modules": {"method": {"lora": {"targetModules": ["q_proj", "model.layers.0.self_attn.v_proj"]}}},
    "hub-revision": {"model": {"revision": "refs/pr/1"}},
    "private-hub": {"model": {"secretRef": {"name": "hf-token"}}},
    "chatml": {"model": {"chatTemplate": "ChatML"}},
    "jinja": {"model": {"chatTemplate": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}},
    "model-s3": {"model": {"uri": "s3://Bucket.name/a/b c"}},
    "model-file": {"model": {"uri": "file:///models/..base"}},
    "data-everywhere": {
        "dataset": {
            "sources": [
                {"uri": "hf://datasets/organization/name/data/train.parquet"},
                {"uri": "https://host:8080/a/train.csv?version=2"},
                {"uri": "s3://bucket/a.json.gz"},
                {"uri": "gs://bucket/a.jsonl"},
                {"uri": "file:///a/Train.JSONL"},
            ]
        }
    },
    "columns": {
        "dataset": {
            "sources": [
                {
                    "uri": "pvc://files/a.csv",
                    "format": "PromptCompletion",
                    "columns": {"prompt": "question", "completion": "answer"},
                },
                {"uri": "pvc://files/b.csv", "columns": {"instruction": "task", "output": "text"}},
            ]
        }
    },
    "early-stopping": {"earlyStopping": {}, "hyperparameters": {"maxSteps": 10, "evalSteps": 10}},
    "no-evaluation": {"dataset": {"split": {"eval": 0}}},
    "micro-batch": {"hyperparameters": {"globalBatchSize": 12, "microBatchSize": 4}},
    "resources": {
        "resources": {
            "cpu": "500m",
            "memory": "1.5Gi",
            "gpusPerWorker": 1,
            "image": "host:5000/a/b@sha256:ab",
        }
    },
    "output": {"output": {"uri": "s3://bucket/jobs/1", "secretRef": {"name": "s3"}}},
    "checkpoint": {"checkpoint": {"uri": "s3://bucket/c", "everySteps": 100, "everyMinutes": 0.5, "keep": 1}},
    "checkpoint-beside-output": {
        "checkpoint": {"uri": "s3://bucket/out-c"},
        "output": {"uri": "s3://bucket/out"},
    },
    "preemptions-number": {"retry": {"preemptions": 3, "maxUserRetries": 1}},
    "preemptions-zero": {"retry": {"preemptions": 0, "backoffSeconds": {"min": 0, "max": 0}}},
    "deadlines": {"deadlines": {"startSeconds": 60, "totalSeconds": 3600, "stallSeconds": 60}},
    "suspended": {"suspend": True, "ttlSecondsAfterFinished": 0},
    "chained": {"model": {"uri": None, "fineTuneJobRef": {"name": "base"}}},
    "dpo": {"objective": "DPO", "preference": {"beta": 0.3}},
    "reward-model": {
        "objective": "RewardModel",
        "dataset": {
            "sources": [{"uri": "pvc://files/a.csv", "format": "Preference", "columns": {"chosen": "a"}}]
        },
    },
    "rloo": {"objective": "RLOO", "reward": {"fineTuneJobRef": {"name": "judge"}, "beta": 0}},
    "grpo": {
        "objective": "GRPO",
        "reward": {
            "uri": "hf://organization/reward-model",
            "functions": [{"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": "polite"}],
            "weights": [1, -0.5],
            "secretRef": {"name": "hf"},
        },
        "generation": {"numGenerations": 8, "maxCompletionLength": 64, "temperature": 0.7, "topP": 0.9},
        "dataset": {"sources": [{"uri": "pvc://files/a.jsonl", "format": "PromptOnly"}]},
    },
}


@pytest.mark.parametrize("spec", GOOD_SPECS.values(), ids=GOOD_SPECS.keys())
def test_good_job_is_taken_and_read_back_by_the_models(create: Any, spec: dict[str, Any]) -> None:
    finetunejob.FineTuneJobSpec.model_validate(create(good(**spec))["spec"])


@pytest.mark.parametrize("name", ["a", "a" * 40, "a-1"])
def test_names_at_the_limits(create: Any, name: str) -> None:
    create(merged(GOOD, {"metadata": {"name": name}}))
