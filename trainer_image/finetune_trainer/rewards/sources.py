"""The reward model of a run, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import model_files, upstreams
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.runfile import Objective, Quantization, RunFile

FIELD = "reward"


@dataclass(frozen=True)
class RewardModel:
    """A sequence classification model with one output: whole, or an adapter over a base model."""

    artifact: upstreams.Artifact
    base: Path | None  # None: the artifact is the whole model
    quantization: Quantization | None  # of the base, as the adapter was trained over it

    @property
    def name(self) -> str:
        """Short name for metrics: the job that made it, else the folder's."""
        job = self.artifact.manifest.get("job", {})
        return str(job.get("name") or self.artifact.uri.rstrip("/").rsplit("/", 1)[-1])


def find(
    run: RunFile, work: Path, *, find_base: Callable[[str, str | None, Path], Path]
) -> RewardModel | None:
    """Returns the run's reward model; `find_base` gives the folder of the model that an adapter fits.

    Raises ModelNotFound, and BadConfig for what is no reward model.
    """
    if run.reward is None or run.reward.uri is None:
        return None
    uri = run.reward.uri
    found = upstreams.find(uri, work / "reward", field=FIELD, digest=run.reward.digest)
    if found.objective not in (None, Objective.REWARD_MODEL):
        raise BadConfig(
            f"{FIELD}: {uri} is the artifact of objective {found.objective}; name one of objective "
            f"{Objective.REWARD_MODEL}, or a folder with a sequence classification model"
        )
    if not found.is_adapter:
        _check_whole(found)
        return RewardModel(found, base=None, quantization=None)
    if not found.manifest:
        raise ModelNotFound(
            f"{FIELD}: {uri} is an adapter without a manifest of ours, so its base model is not known; "
            "merge it into its base model, or name an artifact of objective RewardModel"
        )
    base = find_base(*found.base(), work / "reward-base")
    quantization = found.manifest.get("quantization")
    return RewardModel(
        found, base, None if quantization is None else Quantization.model_validate(quantization)
    )


def _check_whole(found: upstreams.Artifact) -> None:
    path = model_files.check_model_files(found.path, uri=found.uri)
    config = model_files.read_config(path, uri=found.uri)
    kinds = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith("ForSequenceClassification") for name in kinds):
        raise BadConfig(
            f"{FIELD}: {found.uri} is a {', '.join(kinds) or 'model of unknown kind'}, and a reward model is a "
            "...ForSequenceClassification with one output; train one with objective RewardModel"
        )
    labels = len(config.get("id2label") or {"0": "", "1": ""})  # transformers' own default is two
    if labels != 1:
        raise BadConfig(f"{FIELD}: {found.uri} has {labels} outputs (id2label), and a reward model has one")
