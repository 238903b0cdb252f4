"""Specs of FineTuneJobs from the CRD's own schema: valid ones, and ones with exactly one thing wrong.

Types, bounds, enums and lengths come from the schema, so a new field is covered as soon as it is there. What the schema
says in CEL is said here once more: `TEXTS` has a strategy for each text with rules, `_reconcile` sees to the rules
between fields. An optional field with rules that neither knows is left out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from finetune_operator.api import crds, finetunejob
from finetune_operator.api.finetunejob_objectives import FORMATS, GENERATIONS, SAMPLING, Objective

Json = dict[str, Any]
Path = tuple[str | int, ...]

RULES = "x-kubernetes-validations"
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", max_size=9).map(lambda rest: f"n{rest}".rstrip("-"))
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)

# Texts that have rules, by the last two parts of their path.
TEXTS: dict[str, st.SearchStrategy[str]] = {
    "spec.objective": st.sampled_from(list(Objective)),
    "reward.uri": NAMES.map(lambda name: f"s3://rewards/{name}"),
    "configMapRef.name": NAMES,
    "configMapRef.key": NAMES.map(lambda name: f"{name}.py"),
    "functions.entry": st.sampled_from(["score", "_judge", "Length2"]),
    "model.uri": NAMES.map(lambda name: f"hf://acme/{name}"),
    "sources.uri": NAMES.map(lambda name: f"s3://data/{name}.jsonl"),
    "output.uri": NAMES.map(lambda name: f"s3://out/{name}"),
    "checkpoint.uri": NAMES.map(lambda name: f"s3://checkpoints/{name}"),
    "model.revision": NAMES,
    "model.chatTemplate": PLAIN.map(lambda text: "{{ messages }}" + text),
    "secretRef.name": NAMES,
    "fineTuneJobRef.name": NAMES,
    "lora.targetModules": st.sampled_from(["q_proj", "v_proj", "mlp.down_proj"]),
    "resources.image": NAMES.map(lambda name: f"registry.example.com/{name}:1"),
    "resources.acceleratorType": st.sampled_from(["NVIDIA-L4", "NVIDIA-H200", "a_b.c"]),
    "resources.cpu": st.sampled_from(["1", "500m", "1024", 2]),
    "resources.memory": st.sampled_from(["4Gi", "64Mi", "2T", 1_073_741_824]),
    "retry.preemptions": st.sampled_from(["Unlimited", 0, "17", 1000]),
    "scheduling.queueName": NAMES,
}  # fmt: skip
# Objects whose rules between fields `_reconcile` knows.
RECONCILED = frozenset(
    {
        "spec",
        "model",
        "method",
        "sources",
        "reward",
        "hyperparameters",
        "resources",
        "backoffSeconds",
        "targetModules",
    }
)


@functools.cache
def schema() -> Json:
    """The schema of FineTuneJob's spec, as the API server gets it."""
    definition = next(crd for crd in crds.build_crds() if crd["spec"]["names"]["kind"] == finetunejob.KIND)
    root = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec: Json = root["properties"]["spec"]
    return spec


@functools.cache
def valid_specs() -> st.SearchStrategy[Json]:
    """Specs that the API server takes."""
    return _strategy(schema(), ("spec",)).map(_reconcile)


# ---------------------------------------------------------------- schema -> strategy


def _strategy(part: Json, path: tuple[str, ...]) -> st.SearchStrategy[Any]:
    key = ".".join(path[-2:])
    if key in TEXTS and part.get("type") != "array":
        return TEXTS[key]
    if "enum" in part:
        return st.sampled_from(part["enum"])
    match part.get("type"):
        case "object":
            return _objects(part, path)
        case "array":
            items = _strategy(part["items"], path)
            return st.lists(items, min_size=part.get("minItems", 0), max_size=min(3, part.get("maxItems", 3)))
        case "integer":
            return st.integers(part.get("minimum", -(2**31)), part.get("maximum", 2**31))
        case "number":
            return _numbers(part)
        case "boolean":
            return st.booleans()
        case "string":
            return PLAIN.filter(lambda text: len(text) >= part.get("minLength", 0))
    raise AssertionError(f"{'.'.join(path)}: no strategy for {part}")


def _numbers(part: Json) -> st.SearchStrategy[float]:
    return st.floats(
        part["minimum"],
        part["maximum"],
        exclude_min=part.get("exclusiveMinimum", False),
        exclude_max=part.get("exclusiveMaximum", False),
        allow_nan=False,
        allow_subnormal=False,
    )


def _objects(part: Json, path: tuple[str, ...]) -> st.SearchStrategy[Json]:
    if "additionalProperties" in part:
        values = _strategy(part["additionalProperties"], path)
        return st.dictionaries(st.sampled_from(["prompt", "completion", "text"]), values, max_size=2)
    known = {name: one for name, one in part.get("properties", {}).items() if _is_known(one, (*path, name))}
    required = set(part.get("required", ()))
    return st.fixed_dictionaries(
        {name: _strategy(one, (*path, name)) for name, one in known.items() if name in required},
        optional={name: _strategy(one, (*path, name)) for name, one in known.items() if name not in required},
    )


def _is_known(part: Json, path: tuple[str, ...]) -> bool:
    return RULES not in part or path[-1] in RECONCILED or ".".join(path[-2:]) in TEXTS


# ---------------------------------------------------------------- rules between fields


def _reconcile(spec: Json) -> Json:
    """The nearest spec that keeps the rules between fields."""
    spec = copy.deepcopy(spec)
    _reconcile_model(spec["model"])
    _reconcile_objective(spec)
    method = spec.get("method", {})
    _reconcile_method(method, spec.get("hyperparameters", {}))
    _reconcile_data(spec)
    resources = spec.get("resources", {})
    if "acceleratorType" in resources:
        resources["gpusPerWorker"] = 1
    backoff = spec.get("retry", {}).get("backoffSeconds")
    if backoff:
        low, high = sorted((backoff.get("min", 10), backoff.get("max", 600)))
        backoff |= {"min": low, "max": high}
    return spec


def _reconcile_model(model: Json) -> None:
    if ("uri" in model) == ("fineTuneJobRef" in model):
        model.pop("fineTuneJobRef", None)
        model["uri"] = model.get("uri", "hf://acme/tiny")
    if "uri" not in model:
        model.pop("revision", None)


def _reconcile_objective(spec: Json) -> None:
    objective = spec.get("objective", Objective.SFT)
    if objective != Objective.DPO:
        spec.pop("preference", None)
    if objective != Objective.SFT:
        for field in ("packing", "neftuneAlpha"):
            spec.get("hyperparameters", {}).pop(field, None)
    if objective in SAMPLING:
        _reconcile_reward(spec.setdefault("reward", {}))
        _reconcile_generation(spec)
    else:
        spec.pop("reward", None)
        spec.pop("generation", None)


def _reconcile_reward(reward: Json) -> None:
    if "uri" in reward:
        reward.pop("fineTuneJobRef", None)
    models = int("uri" in reward or "fineTuneJobRef" in reward)
    if not models and not reward.get("functions"):
        reward["uri"] = "s3://rewards/judge"
        models = 1
    judges = models + len(reward.get("functions", ()))
    if "weights" in reward:
        reward["weights"] = (reward["weights"] * judges)[:judges]


def _reconcile_generation(spec: Json) -> None:
    """The batch counts answers, and the length holds a prompt and an answer."""
    generation: Json = spec.get("generation", {})
    hyper = spec.setdefault("hyperparameters", {})
    hyper["globalBatchSize"] = generation.get("numGenerations", GENERATIONS) * 4
    length = max(hyper.get("maxLength", 1024), 16)
    hyper["maxLength"] = length
    if "generation" in spec or length <= 128:
        spec["generation"] = generation | {"maxCompletionLength": min(length // 2, 65536)}


def _reconcile_method(method: Json, hyper: Json) -> None:
    kind = method.get("type", "LoRA")
    if kind == "QLoRA":
        method.setdefault("quantization", {})
    else:
        method.pop("quantization", None)
    if kind == "Full":
        method.pop("lora", None)
    if "computeDtype" in method.get("quantization", {}):
        hyper.pop("precision", None)
    if modules := method.get("lora", {}).get("targetModules"):
        method["lora"]["targetModules"] = list(dict.fromkeys(modules))
    batch = hyper.get("globalBatchSize", 16)
    if "microBatchSize" in hyper and batch % hyper["microBatchSize"]:
        hyper["microBatchSize"] = 1
    if "evalSteps" in hyper and "maxSteps" in hyper:
        hyper["evalSteps"] = min(hyper["evalSteps"], hyper["maxSteps"])


def _reconcile_data(spec: Json) -> None:
    data = spec["dataset"]
    data["sources"] = list({source["uri"]: source for source in data["sources"]}.values())
    for source in data["sources"]:
        if source.get("format") not in ("Auto", *FORMATS[spec.get("objective", Objective.SFT)]):
            source.pop("format", None)
        allowed = finetunejob_columns(source.get("format", "Auto"))
        if "columns" in source:
            source["columns"] = {name: text for name, text in source["columns"].items() if name in allowed}
    if data.get("split", {}).get("eval") == 0:
        spec.pop("earlyStopping", None)
        spec.get("hyperparameters", {}).pop("evalSteps", None)


def finetunejob_columns(data_format: str) -> list[str]:
    """Names of columns that a format reads."""
    from finetune_operator.api.finetunejob_datasets import COLUMNS

    found = {str(name): names for name, names in COLUMNS.items()}
    return found.get(data_format, ["prompt", "completion", "text"])


# ---------------------------------------------------------------- one thing wrong


@dataclass(frozen=True)
class Broken:
    """A spec with one thing wrong."""

    spec: Json
    field: str
    """Name of the field that is wrong."""
    how: str
    known_to_models: bool
    """Whether types and bounds alone show it; otherwise only a rule of the CRD does."""


TEXT_JUNK = ("☃ \u202eevil", "a\u0000b", "../../etc/passwd", "ＦＵＬＬ", "x" * 70_000, "")
JUNK: tuple[Any, ...] = (
    *TEXT_JUNK,
    None,
    [],
    {},
    -1,
    0,
    10**30,
    1e308,
    True,
    [[[]]],
    {"a": {"b": "c"}},
    "\U0001f600" * 300,
)


def broken_specs() -> st.SearchStrategy[Broken]:
    """Valid specs in which one value was replaced, or to which one field was added."""
    whole, valid = schema(), valid_specs()

    @st.composite
    def build(draw: st.DrawFn) -> Broken:
        spec = draw(valid)
        places = [(path, part) for path, part in walk(spec, whole) if path]
        path, part = draw(st.sampled_from(places))
        value, how, known = draw(st.sampled_from(list(_wrong_values(part))))
        changed = copy.deepcopy(spec)
        if how == "unknown field":
            _at(changed, path)["namespace"] = "kube-system"
            return Broken(changed, "namespace", f"unknown field in {path}", known)
        _at(changed, path[:-1])[path[-1]] = value
        names = [str(step) for step in path if isinstance(step, str)]
        return Broken(changed, names[-1], f"{'.'.join(map(str, path))}: {how}", known)

    return build()


def walk(value: Any, part: Json, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """Every value of a document with its path and its schema."""
    yield path, part
    if isinstance(value, dict) and "properties" in part:
        for name, item in value.items():
            yield from walk(item, part["properties"][name], (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, part["items"], (*path, index))


def _wrong_values(part: Json) -> Iterator[tuple[Any, str, bool]]:
    """Values that this schema refuses: what, why, and whether the models see it too."""
    kind = part.get("type")
    if "enum" in part:
        yield "Telepathy", "unknown enum value", True
    if kind in ("integer", "number"):
        yield "many", "text instead of a number", True
        yield part.get("minimum", -(2**31)) - 1, "below the minimum", True
        yield part.get("maximum", 2**31) + 1, "above the maximum", True
        yield {"a": 1}, "object instead of a number", True
    elif kind == "string":
        yield 3.5, "number instead of a text", True
        yield ["a"], "list instead of a text", True
        if "maxLength" in part:
            yield "ü" * (part["maxLength"] + 1), "too long", True
        if part.get("minLength"):
            yield "", "empty", True
        if RULES in part:
            yield "☃ \u202eevil", "against a rule", False
    elif kind == "boolean":
        yield "perhaps", "text instead of a boolean", True
    elif kind == "array":
        yield {"a": 1}, "object instead of a list", True
        if part.get("minItems"):
            yield [], "too few", True
    elif kind == "object":
        yield "text", "text instead of an object", True
        yield [], "list instead of an object", True
        if "additionalProperties" not in part:
            yield None, "unknown field", True
    else:
        yield {"a": 1}, "object instead of a number or a text", True
        yield True, "boolean instead of a number or a text", True


def _at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def replaced(document: Json, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Json:
    """A copy with any one value replaced by junk; nothing is promised of it."""
    changed = copy.deepcopy(document)
    paths = list(_paths(changed))
    path = draw(st.sampled_from(paths))
    _at(changed, path[:-1])[path[-1]] = draw(st.sampled_from(JUNK))
    return changed


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, item in items:
        yield from _paths(item, (*path, step))
