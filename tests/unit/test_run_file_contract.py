"""Operator and trainer share no code; this is what holds them together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_operator.api import finetunejob as api
from finetune_operator.core import failures, reports
from finetune_operator.manifests import runfiles
from finetune_trainer import failures as trainer_failures
from finetune_trainer import runfile, runparts

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, exclude_min=True, exclude_max=True)


LORA = optional(
    r=st.integers(1, 1024),
    alpha=st.integers(1, 4096),
    dropout=numbers(0, 1),
    targetModules=st.lists(TEXTS, min_size=1, max_size=4),
)
QUANTIZATION = optional(
    type=st.sampled_from(["nf4", "fp4"]),
    doubleQuant=st.booleans(),
    computeDtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
METHODS = st.one_of(
    st.fixed_dictionaries({"type": st.just("LoRA")}, optional={"lora": LORA}),
    st.fixed_dictionaries({"type": st.just("QLoRA"), "quantization": QUANTIZATION}, optional={"lora": LORA}),
    st.just({"type": "Full"}),
)
SOURCES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"uri": NAMES.map(lambda name: f"s3://bucket/{name}.jsonl")},
    optional={
        "columns": st.fixed_dictionaries({"text": TEXTS}),
    },
)
HYPERPARAMETERS = optional(
    learningRate=numbers(0, 1),
    epochs=numbers(0, 1000),
    maxSteps=st.integers(1, 10_000_000),
    globalBatchSize=st.integers(1, 65536),
    microBatchSize=st.just(1),
    maxLength=st.integers(8, 1_048_576),
    packing=st.booleans(),
    warmupRatio=numbers(0, 1),
    scheduler=st.sampled_from([str(item) for item in api.Scheduler]),
    weightDecay=numbers(0, 1),
    maxGradNorm=numbers(0, 1000),
    neftuneAlpha=numbers(0, 100),
    optimizer=st.sampled_from([str(item) for item in api.Optimizer]),
    precision=st.sampled_from([str(item) for item in api.Precision]),
    gradientCheckpointing=st.booleans(),
    evalSteps=st.just(1),
    seed=st.integers(0, 2**31 - 1),
)
FUNCTIONS = st.fixed_dictionaries(
    {"configMapRef": st.fixed_dictionaries({"name": NAMES, "key": NAMES.map(lambda name: f"{name}.py")})}
).flatmap(lambda one: NAMES.map(lambda name: one | {"entry": name.replace("-", "_")}))
REWARDS = st.fixed_dictionaries(
    {},
    optional={
        "uri": NAMES.map(lambda name: f"s3://bucket/{name}"),
        "functions": st.lists(FUNCTIONS, max_size=3),
        "beta": st.floats(0, 1000),
    },
).filter(lambda reward: "uri" in reward or reward.get("functions"))
GENERATIONS = optional(
    numGenerations=st.sampled_from([2, 4, 8]),
    maxCompletionLength=st.integers(1, 127),
    temperature=numbers(0, 10),
    topP=numbers(0, 1),
)
# What an objective needs and may have; its batches and lengths fit together.
OBJECTIVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.sampled_from(["SFT", "RewardModel"]).map(lambda name: {"objective": name}),
    st.fixed_dictionaries(
        {"objective": st.just("DPO")}, optional={"preference": optional(beta=numbers(0, 1000))}
    ),
    st.fixed_dictionaries(
        {"objective": st.sampled_from(["RLOO", "GRPO"]), "reward": REWARDS, "generation": GENERATIONS}
    ),
)
UPSTREAMS = st.builds(
    api.Upstream,
    uri=NAMES.map(lambda name: f"s3://bucket/{name}"),
    digest=st.just("sha256:" + "0" * 64),
    base_model=st.none() | NAMES.map(lambda name: f"hf://{name}/{name}"),
)
SPECS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"uri": NAMES.map(lambda name: f"hf://{name}/{name}")},
            optional={
                "revision": NAMES,
                "chatTemplate": TEXTS,
                "secretRef": st.fixed_dictionaries({"name": NAMES}),
            },
        ),
        "dataset": st.fixed_dictionaries(
            {"sources": st.lists(SOURCES, min_size=1, max_size=3, unique_by=lambda source: source["uri"])},
            optional={
                "split": optional(eval=numbers(0, 0.5), seed=st.integers(0, 2**31 - 1)),
                "applyChatTemplate": st.sampled_from([str(item) for item in api.ApplyChatTemplate]),
            },
        ),
    },
    optional={
        "method": METHODS,
        "hyperparameters": HYPERPARAMETERS,
        "earlyStopping": optional(patience=st.integers(1, 1000), minDelta=numbers(0, 1000)),
        "output": st.fixed_dictionaries({"uri": NAMES.map(lambda name: f"gs://bucket/{name}")}),
        "checkpoint": optional(
            uri=NAMES.map(lambda name: f"gs://bucket/{name}-c"),
            everySteps=st.integers(1, 10_000_000),
            everyMinutes=st.floats(0.1, 10_080),
            keep=st.integers(1, 100),
            resume=st.sampled_from([str(item) for item in api.ResumePolicy]),
        ),
        "retry": optional(
            maxInfraRetries=st.integers(0, 1000), preemptions=st.sampled_from(["Unlimited", 0, 3])
        ),
        "deadlines": optional(totalSeconds=st.integers(1, 1000)),
        "suspend": st.booleans(),
        "ttlSecondsAfterFinished": st.integers(0, 1000),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    document=SPECS,
    objective=OBJECTIVES,
    overrides=st.none() | st.just(api.Overrides(micro_batch_size=1, memory="8Gi")),
    upstreams=st.tuples(st.none() | UPSTREAMS, st.none() | UPSTREAMS),
)
def test_every_run_file_that_the_operator_builds_is_one_that_the_trainer_accepts(
    document: dict[str, Any],
    objective: dict[str, Any],
    overrides: api.Overrides | None,
    upstreams: tuple[api.Upstream | None, api.Upstream | None],
) -> None:
    document = document | objective
    spec = api.FineTuneJobSpec.model_validate(document)
    built = runfiles.build_run_file(
        namespace="team",
        name="job",
        uid="uid-1",
        attempt=2,
        spec=spec,
        places=runfiles.Places(
            spec.model.uri or "",
            "s3://bucket/out",
            spec.checkpoint.uri or "s3://bucket/c",
            adapter=upstreams[0],
            reward=upstreams[1] if "reward" in document else None,
        ),
        overrides=overrides,
    )
    parsed = runfile.RunFile.model_validate(json.loads(json.dumps(built)))
    # Nothing is lost on the way: what the user wrote is what the trainer reads.
    told = parsed.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert told["objective"] == document.get("objective", "SFT")
    assert ("generation" in told) == (told["objective"] in ("RLOO", "GRPO"))
    assert ("preference" in told) == (told["objective"] == "DPO")
    assert (told.get("overrides") or None) == ({"microBatchSize": 1} if overrides else None)
    assert told["checkpoint"].keys() >= {"uri", "keep", "resume"}
    assert "everySteps" in told["checkpoint"] or "everyMinutes" in told["checkpoint"]
    if upstreams[0] is not None:
        assert told["model"]["adapter"] == {"uri": upstreams[0].uri, "digest": upstreams[0].digest}
    if upstreams[1] is not None and "reward" in document:
        assert (told["reward"].pop("uri"), told["reward"].pop("digest")) == (
            upstreams[1].uri,
            upstreams[1].digest,
        )
        document["reward"] = {name: value for name, value in document["reward"].items() if name != "uri"}
    for section in (
        "model",
        "method",
        "dataset",
        "hyperparameters",
        "earlyStopping",
        "checkpoint",
        *objective,
    ):
        if section != "objective":
            for field, value in document.get(section, {}).items():
                if field != "secretRef":
                    assert contains(told[section][field], value), (section, field)


@pytest.mark.parametrize("objective", list(api.Objective))
def test_both_sides_know_the_objectives_and_their_formats(objective: api.Objective) -> None:
    ours = [str(one) for one in api_formats(objective)]
    assert ours == [str(one) for one in runparts.FORMATS_OF[runfile.Objective(str(objective))]]


def api_formats(objective: api.Objective) -> tuple[api.DataFormat, ...]:
    from finetune_operator.api.finetunejob_objectives import FORMATS

    return FORMATS[objective]


def test_both_sides_have_the_same_defaults_of_sampling() -> None:
    ours = api.GenerationSpec().model_dump(by_alias=True)
    assert runfile.Generation().model_dump(by_alias=True) == ours


def contains(told: Any, asked: Any) -> bool:
    """Whether everything asked is told; defaults may have been added."""
    if isinstance(asked, dict):
        return all(name in told and contains(told[name], value) for name, value in asked.items())
    if isinstance(asked, list):
        return len(told) == len(asked) and all(contains(a, b) for a, b in zip(told, asked, strict=True))
    return bool(told == asked)


def test_a_field_that_the_trainer_does_not_know_is_refused_there() -> None:
    with pytest.raises(ValidationError):
        runfile.Lora.model_validate({"rank": 8})


def test_only_the_check_is_told_of_the_gpu_as_older_trainers_refuse_that() -> None:
    """A job keeps the image that it began with, also when the operator is upgraded."""
    gpu = {"resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4"}}
    source = {"dataset": {"sources": [{"uri": "file:///data.jsonl"}]}}
    spec = api.FineTuneJobSpec.model_validate({"model": {"uri": "file:///model"}, **source, **gpu})
    places = runfiles.Places("file:///model", "file:///out", None)
    check, first = (
        runfiles.build_run_file(
            namespace="team", name="job", uid="uid-1", attempt=attempt, spec=spec, places=places
        )
        for attempt in (0, 1)
    )
    assert (check.get("accelerator"), first.get("accelerator")) == ("NVIDIA-L4", None)


def test_both_sides_number_the_classes_of_failure_alike() -> None:
    failing = [one for one in trainer_failures.EXIT_CODES if one is not trainer_failures.ErrorClass.CHECKED]
    theirs = {trainer_failures.EXIT_CODES[name]: str(name) for name in failing}
    ours = {code: str(name) for code, name in failures.CLASS_OF_EXIT_CODE.items()}
    assert ours | theirs == ours
    assert set(ours.values()) - set(theirs.values()) <= {"EvaluationGate"}, "no trainer evaluates gates yet"


def test_the_last_report_of_the_trainer_is_one_that_the_operator_accepts() -> None:
    from finetune_trainer import progress

    state = progress.State(step=10, total_steps=10, metrics={"loss": 1.5})
    artifact = {"uri": "file:///x", "digest": "sha256:1", "sizeBytes": 1, "baseModel": "hf://a/b", "rank": 8}
    result = {"class": "Succeeded", "exitCode": 0, "message": "done", "step": 10, "artifact": artifact}
    report = reports.Report.model_validate(state.to_body(result))
    assert report.result is not None
    assert report.number("loss") == 1.5
