"""FineTuneJobs that must be refused: id, what is changed in a good one, and what the message must say.

The change is a JSON merge patch on GOOD (None removes a field; lists are replaced).
Every message names the field and the remedy.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from tests.patches import merged

GOOD: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "good"},
    "spec": {
        "model": {"uri": "hf://organization/model"},
        "dataset": {"sources": [{"uri": "pvc://files/train.jsonl"}]},
    },
}


def good(**spec: Any) -> dict[str, Any]:
    """GOOD with the merge patch `spec`."""
    result: dict[str, Any] = merged(GOOD, {"spec": spec})
    return copy.deepcopy(result)


class BadJob(NamedTuple):
    name: str
    change: dict[str, Any]
    expected: tuple[str, ...]


def _spec(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return BadJob(name, {"spec": change}, expected)


def _model(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return _spec(name, {"model": change}, "spec.model", *expected)


def _method(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return _spec(name, {"method": change}, "spec.method", *expected)


def _source(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    source = {"uri": "pvc://files/train.jsonl", **change}
    return _spec(name, {"dataset": {"sources": [source]}}, "spec.dataset.sources[0]", *expected)


def _hyper(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return _spec(name, {"hyperparameters": change}, "spec.hyperparameters", *expected)


def _resources(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return _spec(name, {"resources": change}, "spec.resources", *expected)


def _output(name: str, uri: str, *expected: str) -> BadJob:
    return _spec(name, {"output": {"uri": uri}}, "spec.output.uri", *expected)


QLORA = {"type": "QLoRA", "quantization": {}}
REWARD = {"uri": "s3://bucket/reward-model"}


def _reward(name: str, change: dict[str, Any], *expected: str) -> BadJob:
    return _spec(name, {"objective": "RLOO", "reward": {**REWARD, **change}}, *expected)


BAD_JOBS = [
    # names
    BadJob(
        "name-too-long",
        {"metadata": {"name": "a" * 41}},
        ("metadata.name", "a" * 41, "at most 40 characters"),
    ),
    BadJob(
        "name-starts-with-digit", {"metadata": {"name": "1st"}}, ("metadata.name", "must begin with a letter")
    ),
    BadJob(
        "name-with-dot",
        {"metadata": {"name": "a.b"}},
        ("metadata.name", "lower-case letters, digits and '-'"),
    ),
    BadJob("no-spec", {"spec": None}, ("spec", "Required value")),
    # objective
    _spec("ppo", {"objective": "PPO"}, "spec.objective", "RLOO or GRPO"),
    _spec(
        "objective-lower-case",
        {"objective": "sft"},
        "spec.objective",
        '"sft"',
        "must be written as one of SFT",
    ),
    _spec(
        "objective-unknown",
        {"objective": "KTO"},
        "spec.objective",
        "KTO is not an objective of this version",
        "SFT, DPO, RewardModel, RLOO, GRPO",
    ),
    _spec("rloo-without-reward", {"objective": "RLOO"}, "spec.reward", "learn from rewards", "functions"),
    _spec("empty-reward", {"objective": "GRPO", "reward": {}}, "spec.reward", "nothing that could judge"),
    _spec("reward-for-sft", {"reward": REWARD}, "spec.reward", "only RLOO and GRPO learn from rewards"),
    _spec(
        "generation-for-dpo", {"objective": "DPO", "generation": {}}, "spec.generation", "only RLOO and GRPO"
    ),
    _spec("preference-for-sft", {"preference": {}}, "spec.preference", "only DPO reads preference"),
    _spec("preference-beta-zero", {"objective": "DPO", "preference": {"beta": 0}}, "spec.preference.beta"),
    _spec(
        "packing-for-dpo",
        {"objective": "DPO", "hyperparameters": {"packing": True}},
        "spec.hyperparameters.packing",
        "only SFT",
    ),
    _spec(
        "neftune-for-reward-model",
        {"objective": "RewardModel", "hyperparameters": {"neftuneAlpha": 5}},
        "spec.hyperparameters.neftuneAlpha",
        "only SFT",
    ),
    _reward(
        "reward-twice",
        {"fineTuneJobRef": {"name": "judge"}},
        "spec.reward.uri",
        "either fineTuneJobRef or uri",
    ),
    _reward("reward-weights", {"weights": [1, 2]}, "spec.reward.weights", "one weight for each reward"),
    _reward("reward-scheme", {"uri": "ftp://host/rm"}, "spec.reward.uri", "hf://"),
    _reward(
        "reward-of-itself", {"uri": None, "fineTuneJobRef": {"name": "good"}}, "spec.reward", "wait for ever"
    ),
    _reward(
        "reward-of-another-namespace",
        {"uri": None, "fineTuneJobRef": {"name": "judge", "namespace": "other"}},
        "namespace",
    ),
    _reward(
        "reward-entry",
        {"functions": [{"configMapRef": {"name": "r", "key": "r.py"}, "entry": "a.b"}]},
        "spec.reward.functions[0].entry",
        "name of a Python function",
    ),
    _reward(
        "reward-key",
        {"functions": [{"configMapRef": {"name": "r", "key": "../r.py"}, "entry": "f"}]},
        "spec.reward.functions[0].configMapRef.key",
        "key of a ConfigMap",
    ),
    _spec(
        "odd-groups",
        {"objective": "RLOO", "reward": REWARD, "hyperparameters": {"globalBatchSize": 6}},
        "spec.hyperparameters.globalBatchSize",
        "multiple of generation.numGenerations",
    ),
    _spec(
        "no-room-for-prompts",
        {"objective": "RLOO", "reward": REWARD, "hyperparameters": {"maxLength": 128}},
        "spec.hyperparameters.maxLength",
        "maxCompletionLength",
    ),
    _spec(
        "format-of-another-objective",
        {"objective": "DPO", "dataset": {"sources": [{"uri": "pvc://files/a.csv", "format": "Alpaca"}]}},
        "spec.dataset.sources",
        "DPO reads the format Preference",
    ),
    _spec(
        "preferences-for-sft",
        {"dataset": {"sources": [{"uri": "pvc://files/a.csv", "format": "Preference"}]}},
        "spec.dataset.sources",
        "SFT reads the format Messages or PromptCompletion",
    ),
    _spec("objective-empty", {"objective": ""}, "spec.objective", "at least 1"),
    # model
    _spec("no-model", {"model": None}, "spec.model", "Required value"),
    _model("model-without-uri", {"uri": None}, "name exactly one of uri and fineTuneJobRef"),
    _model("model-twice", {"fineTuneJobRef": {"name": "base"}}, "name exactly one of uri and fineTuneJobRef"),
    _model(
        "model-of-itself",
        {"uri": None, "fineTuneJobRef": {"name": "good"}},
        "fineTuneJobRef",
        "wait for ever",
    ),
    _model(
        "revision-of-a-job",
        {"uri": None, "fineTuneJobRef": {"name": "base"}, "revision": "main"},
        "model.revision",
        "hf://",
    ),
    # attempts
    _spec("retries-negative", {"retry": {"maxInfraRetries": -1}}, "spec.retry.maxInfraRetries"),
    _spec(
        "preemptions-word",
        {"retry": {"preemptions": "Many"}},
        "spec.retry.preemptions",
        "Unlimited or a number",
    ),
    _spec(
        "preemptions-negative",
        {"retry": {"preemptions": -1}},
        "spec.retry.preemptions",
        "Unlimited or a number",
    ),
    _spec("preemptions-too-many", {"retry": {"preemptions": 1001}}, "spec.retry.preemptions", "0 to 1000"),
    _spec(
        "backoff-upside-down",
        {"retry": {"backoffSeconds": {"min": 60, "max": 10}}},
        "spec.retry.backoffSeconds.min",
        "min is more than max",
    ),
    _spec(
        "out-of-memory-word", {"retry": {"onOutOfMemory": "Pray"}}, "spec.retry.onOutOfMemory", "ReduceBatch"
    ),
    _spec("deadline-zero", {"deadlines": {"totalSeconds": 0}}, "spec.deadlines.totalSeconds"),
    _spec("keep-nothing", {"checkpoint": {"keep": 0}}, "spec.checkpoint.keep"),
    _spec("resume-word", {"checkpoint": {"resume": "Maybe"}}, "spec.checkpoint.resume", "Auto"),
    _spec("checkpoint-over-http", {"checkpoint": {"uri": "https://host/c"}}, "spec.checkpoint.uri", "s3://"),
    _spec(
        "checkpoint-in-output",
        {"checkpoint": {"uri": "s3://bucket/out/c"}, "output": {"uri": "s3://bucket/out"}},
        "spec.checkpoint.uri",
        "lie in one another",
    ),
    _spec("ttl-negative", {"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    _model("model-without-scheme", {"uri": "organization/model"}, "has no scheme", "hf://organization/model"),
    _model("model-path-without-scheme", {"uri": "/models/base"}, "write file:///models/base"),
    _model(
        "model-over-http",
        {"uri": "https://host/model"},
        "one of the schemes hf://, s3://, gs://, pvc://, file://",
    ),
    _model(
        "model-hub-subfolder",
        {"uri": "hf://organization/model/part"},
        "hf://organization/model and nothing behind",
    ),
    _model("model-hub-revision-in-uri", {"uri": "hf://organization/model@main"}, "goes into revision"),
    _model("model-hub-no-organization", {"uri": "hf://model"}, "hf://organization/model"),
    _model("model-file-two-slashes", {"uri": "file://models/base"}, "three slashes"),
    _model("model-bucket-only", {"uri": "s3://bucket"}, "must be s3://bucket/path"),
    _model("model-claim-upper-case", {"uri": "pvc://Models/base"}, "PersistentVolumeClaim"),
    _model(
        "model-credentials",
        {"uri": "s3://key:secret@bucket/model"},
        "must not carry credentials",
        "secretRef",
    ),
    _model("model-parent-folder", {"uri": "pvc://models/../other"}, "'..'"),
    _model("model-blank-at-end", {"uri": "pvc://models/base "}, "begin or end with a blank"),
    _model("model-line-break", {"uri": "pvc://models/base\n"}, "line breaks"),
    _model("model-uri-too-long", {"uri": "file:///" + "a" * 1020}, "1024"),
    _model(
        "revision-without-hub", {"uri": "s3://bucket/model", "revision": "main"}, "model.revision", "hf://"
    ),
    _model("revision-with-blank", {"revision": "my branch"}, "branch, tag or commit"),
    _model("chat-template-file-name", {"chatTemplate": "chat.jinja"}, "chatTemplate", "ChatML"),
    _model("secret-as-text", {"secretRef": "hf-token"}, "secretRef", "must be of type object"),
    _model("secret-without-name", {"secretRef": {}}, "secretRef.name", "Required value"),
    _model(
        "secret-name-wrong", {"secretRef": {"name": "HF_TOKEN"}}, "secretRef.name", "for example hf-token"
    ),
    # method
    _method("method-unknown", {"type": "DoRA"}, '"DoRA"', "LoRA", "QLoRA", "Full"),
    _method("method-wrong-case", {"type": "lora"}, '"lora"', "supported values", '"LoRA"'),
    _method("qlora-without-quantization", {"type": "QLoRA"}, "method.quantization", "quantization: {}"),
    _method(
        "lora-with-quantization", {"quantization": {}}, "method.quantization", "method LoRA does not quantize"
    ),
    _method(
        "full-with-quantization",
        {"type": "Full", "quantization": {}},
        "method Full does not quantize",
        "QLoRA",
    ),
    _method("full-with-lora", {"type": "Full", "lora": {"r": 8}}, "method.lora", "remove lora"),
    _method("rank-zero", {"lora": {"r": 0}}, "method.lora.r", "greater than or equal to 1"),
    _method("rank-too-high", {"lora": {"r": 4096}}, "method.lora.r", "less than or equal to 1024"),
    _method("rank-as-text", {"lora": {"r": "16"}}, "method.lora.r", "must be of type integer"),
    _method("rank-fraction", {"lora": {"r": 1.5}}, "method.lora.r", "must be of type integer"),
    _method("dropout-one", {"lora": {"dropout": 1}}, "method.lora.dropout", "less than 1"),
    _method("all-linear-and-more", {"lora": {"targetModules": ["all-linear", "q_proj"]}}, "use it alone"),
    _method("modules-twice", {"lora": {"targetModules": ["q_proj", "q_proj"]}}, "same module twice"),
    _method("modules-empty", {"lora": {"targetModules": []}}, "targetModules", "at least 1"),
    _method(
        "modules-expression",
        {"lora": {"targetModules": [".*_proj"]}},
        "regular expressions are not supported",
    ),
    _method(
        "modules-as-text", {"lora": {"targetModules": "all-linear"}}, "targetModules", "must be of type array"
    ),
    _method(
        "quantization-type", {"type": "QLoRA", "quantization": {"type": "int8"}}, '"int8"', '"nf4"', '"fp4"'
    ),
    _method(
        "compute-dtype", {"type": "QLoRA", "quantization": {"computeDtype": "bf16"}}, '"bf16"', '"bfloat16"'
    ),
    _spec(
        "precision-against-dtype",
        {
            "method": {"type": "QLoRA", "quantization": {"computeDtype": "float16"}},
            "hyperparameters": {"precision": "BFloat16"},
        },
        "spec.method.quantization.computeDtype",
        "computeDtype float16 and hyperparameters.precision BFloat16",
        "leave computeDtype out",
    ),
    # data
    _spec("no-dataset", {"dataset": None}, "spec.dataset", "Required value"),
    _spec("no-sources", {"dataset": {"sources": []}}, "spec.dataset.sources", "at least 1"),
    _spec("sources-absent", {"dataset": {"sources": None}}, "spec.dataset.sources", "Required value"),
    _spec(
        "too-many-sources",
        {"dataset": {"sources": [{"uri": f"pvc://files/{number}.csv"} for number in range(17)]}},
        "spec.dataset.sources",
        "at most 16",
    ),
    _spec(
        "source-twice",
        {"dataset": {"sources": [{"uri": "pvc://files/a.csv"}, {"uri": "pvc://files/a.csv"}]}},
        "spec.dataset.sources",
        "same file twice",
    ),
    _source("data-path", {"uri": "/data/train.jsonl"}, "write file:///data/train.jsonl"),
    _source("data-relative", {"uri": "train.jsonl"}, "one of the schemes", "pvc://"),
    _source("data-ftp", {"uri": "ftp://host/train.jsonl"}, "one of the schemes"),
    _source("data-extension", {"uri": "pvc://files/train.xlsx"}, ".jsonl, .json, .csv"),
    _source("data-parquet-gz", {"uri": "pvc://files/train.parquet.gz"}, ".parquet"),
    _source("data-folder", {"uri": "pvc://files/train/"}, "is a folder"),
    _source("data-pattern", {"uri": "pvc://files/*.jsonl"}, "patterns with * are not expanded"),
    _source(
        "data-hub-model", {"uri": "hf://organization/name/train.jsonl"}, "hf://datasets/organization/name"
    ),
    _source("data-presigned", {"uri": "https://host/a.csv?X-Amz-Signature=abc"}, "pre-signed", "secretRef"),
    _source("data-credentials", {"uri": "https://me:pw@host/a.csv"}, "must not carry credentials"),
    _source("data-parent-folder", {"uri": "pvc://files/../../etc/a.json"}, "'..'"),
    _source("format-unknown", {"format": "ShareGPT"}, "format", '"ShareGPT"', '"Messages"'),
    _source("columns-unknown", {"columns": {"question": "prompt"}}, "columns", "{prompt: question"),
    _source(
        "columns-of-other-format",
        {"format": "Text", "columns": {"prompt": "a"}},
        "format Text reads only text",
    ),
    _source("column-empty", {"columns": {"text": ""}}, "columns.text", "at least 1"),
    _spec(
        "eval-too-large",
        {"dataset": {"split": {"eval": 0.9}}},
        "spec.dataset.split.eval",
        "less than or equal to 0.5",
    ),
    _spec(
        "eval-negative",
        {"dataset": {"split": {"eval": -0.1}}},
        "spec.dataset.split.eval",
        "greater than or equal to 0",
    ),
    _spec(
        "chat-template-use",
        {"dataset": {"applyChatTemplate": True}},
        "applyChatTemplate",
        "must be of type string",
    ),
    # hyperparameters
    _hyper("learning-rate-zero", {"learningRate": 0}, "learningRate", "greater than 0"),
    _hyper("learning-rate-negative", {"learningRate": -1e-4}, "learningRate", "greater than 0"),
    _hyper("learning-rate-large", {"learningRate": 2}, "learningRate", "less than or equal to 1"),
    _hyper("learning-rate-text", {"learningRate": "2e-4"}, "learningRate", "must be of type number"),
    _hyper("epochs-zero", {"epochs": 0}, "epochs", "greater than 0"),
    _hyper("max-steps-zero", {"maxSteps": 0}, "maxSteps", "greater than or equal to 1"),
    _hyper("batch-not-divided", {"microBatchSize": 5}, "microBatchSize", "must divide globalBatchSize"),
    _hyper(
        "batch-larger",
        {"globalBatchSize": 4, "microBatchSize": 8},
        "microBatchSize",
        "must divide globalBatchSize",
    ),
    _hyper("eval-after-the-end", {"maxSteps": 10, "evalSteps": 20}, "evalSteps", "more than maxSteps"),
    _hyper("max-length", {"maxLength": 1}, "maxLength", "greater than or equal to 8"),
    _hyper("warmup-as-steps", {"warmupRatio": 100}, "warmupRatio", "less than 1"),
    _hyper("scheduler", {"scheduler": "cosine"}, "scheduler", '"cosine"', '"Cosine"'),
    _hyper("optimizer", {"optimizer": "adam"}, "optimizer", '"adam"', '"AdamW"'),
    _hyper("precision", {"precision": "fp16"}, "precision", '"fp16"', '"BFloat16"'),
    _hyper("packing-text", {"packing": "yes"}, "packing", "must be of type boolean"),
    _hyper("seed-negative", {"seed": -1}, "seed", "greater than or equal to 0"),
    _spec(
        "early-stopping-without-eval",
        {"earlyStopping": {}, "dataset": {"split": {"eval": 0}}},
        "spec.earlyStopping",
        "dataset.split.eval",
        "remove earlyStopping",
    ),
    _spec(
        "eval-steps-without-eval",
        {"hyperparameters": {"evalSteps": 5}, "dataset": {"split": {"eval": 0}}},
        "spec.hyperparameters.evalSteps",
        "remove evalSteps",
    ),
    _spec(
        "patience-zero",
        {"earlyStopping": {"patience": 0}},
        "spec.earlyStopping.patience",
        "greater than or equal to 1",
    ),
    # resources
    _resources("cpu-zero", {"cpu": 0}, "resources.cpu", "from 10m to 1024"),
    _resources("cpu-negative", {"cpu": "-1"}, "resources.cpu", "from 10m to 1024"),
    _resources("cpu-words", {"cpu": "two"}, "resources.cpu", "quantity"),
    _resources("cpu-fraction", {"cpu": 0.5}, "resources.cpu", "integer"),
    _resources("memory-without-unit", {"memory": 8}, "resources.memory", "8Gi"),
    _resources("memory-unit", {"memory": "8GB"}, "resources.memory", "8Gi"),
    _resources("gpus", {"gpusPerWorker": 8}, "resources.gpusPerWorker", "less than or equal to 1"),
    _resources("image", {"image": "my image"}, "resources.image", "container image"),
    # output
    _output("output-hub", "hf://organization/model", "one of the schemes s3://, gs://, pvc://, file://"),
    _output("output-path", "/results", "write file:///results"),
    _output("output-credentials", "s3://a:b@bucket/x", "must not carry credentials"),
    _output("output-parent-folder", "pvc://claim/a/../../b", "'..'"),
    _spec(
        "output-over-model",
        {"model": {"uri": "pvc://models/base"}, "output": {"uri": "pvc://models/base"}},
        "spec.output.uri",
        "overwritten",
    ),
    # spelling; kubectl's default (strict) field validation
    _spec("snake-case", {"early_stopping": {}}, 'unknown field "spec.early_stopping"'),
    _spec("unknown-field", {"hyperparameters": {"lr": 1}}, 'unknown field "spec.hyperparameters.lr"'),
]
