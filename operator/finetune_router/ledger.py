"""What all workers of a replica have counted: one epoch for each life of a worker, ended ones included.

The answer to the operator has a size that does not grow with the number of lives: of a comparison there is one sample
for all workers, and of ended lives only so many arms are kept. Documents are kept and given out as the workers sent
them; with a thousand aliases, making models of them would hold up the parent for a second.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from finetune_operator.api.routes import COUNTERS_VERSION, EpochCounters, KeySample
from finetune_router import storage
from finetune_router.counters import CANDIDATE_BIT, STABLE_BIT, Sample

logger = logging.getLogger(__name__)

MOST_ENDED = 64  # ended epochs that are kept for a reader who has not seen their last counts
MOST_ENDED_ARMS = 20_000  # of all ended epochs together, 10 to 20 MB; the oldest epochs go first
_SAMPLES_EPOCH = "samples"  # has no counts
_FILE_NAME = "epochs.json"


@dataclass
class Epoch:
    """Counts of one life of a worker."""

    name: str
    arms: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    """Kept as they came."""

    def document(self) -> dict[str, Any]:
        return {"epoch": self.name, "arms": list(self.arms.values())}


class Ledger:
    """All epochs. Those that ended are written to disk when the router ends, so that a restart loses no evidence."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE_NAME
        self._live: dict[str, Epoch] = {}
        self._ended: OrderedDict[str, Epoch] = OrderedDict()
        self._samples: dict[str, Sample] = {}
        """By alias: of the keys that any worker has seen in the present comparison."""
        self._comparisons: Mapping[str, str] | None = None

    def load(self) -> None:
        """Take up the epochs of the former life of this replica."""
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            epochs = [EpochCounters.model_validate(document) for document in stored["epochs"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("the counters of the router's former life are lost: %s", type(error).__name__)
            return
        for told in epochs:
            arms = [arm.model_dump(mode="json", by_alias=True) for arm in told.arms]
            if arms:
                self._ended[told.epoch] = Epoch(told.epoch, {_key(arm): arm for arm in arms})
            for sample in told.samples:
                self._merge(sample)
        self._forget_oldest()

    def save(self) -> None:
        epochs = [*self._ended.values(), *(epoch for epoch in self._live.values() if epoch.arms)]
        documents = [epoch.document() for epoch in epochs[-MOST_ENDED:]]
        storage.write_atomically(self._file, orjson.dumps({"epochs": [*documents, self._sampled()]}))

    def begin(self, name: str) -> Epoch:
        self._live[name] = epoch = Epoch(name)
        return epoch

    def update(self, epoch: Epoch, message: dict[str, Any]) -> None:
        """Take in a worker's report: whole values of the arms that changed, and keys that are new in a sample."""
        for arm in message["arms"]:
            epoch.arms[_key(arm)] = arm
        for news in message["samples"]:
            sample = self._sample(news["alias"], news["comparison"])
            if sample is not None:
                for value, bit in news["added"]:
                    sample.add(value, bit)
                sample.take_news()

    def end(self, name: str) -> None:
        """The worker is gone; what it had counted stays."""
        epoch = self._live.pop(name, None)
        if epoch is not None and epoch.arms:
            self._ended[name] = epoch
            self._forget_oldest()

    def compare(self, comparisons: Mapping[str, str]) -> None:
        """From now on these are under way, by alias; samples of others tell nobody anything."""
        self._comparisons = comparisons
        self._samples = {
            alias: sample
            for alias, sample in self._samples.items()
            if comparisons.get(alias) == sample.comparison
        }

    def wire(self, *, instance: str, version: int, feedback: EpochCounters | None) -> bytes:
        """A RouterCounters as JSON. For its reader, an epoch that is not told of has not changed."""
        epochs = [epoch.document() for epoch in (*self._ended.values(), *self._live.values())]
        told = [] if feedback is None else [feedback.model_dump(mode="json", by_alias=True)]
        return orjson.dumps(
            {
                "apiVersion": COUNTERS_VERSION,
                "instance": instance,
                "version": version,
                "epochs": [*epochs, *told, self._sampled()],
            }
        )

    def _sampled(self) -> dict[str, Any]:
        return {
            "epoch": _SAMPLES_EPOCH,
            "samples": [sample.wire() for sample in self._samples.values()],
        }

    def _sample(self, alias: str, comparison: str) -> Sample | None:
        """None for a comparison that is over: a worker may apply a snapshot later than another one."""
        if self._comparisons is not None and self._comparisons.get(alias) != comparison:
            return None
        sample = self._samples.get(alias)
        if sample is None or sample.comparison != comparison:
            sample = self._samples[alias] = Sample(alias, comparison)
        return sample

    def _merge(self, told: KeySample) -> None:
        sample = self._sample(told.alias, told.comparison)
        if sample is not None:
            for values, bit in ((told.stable, STABLE_BIT), (told.candidate, CANDIDATE_BIT)):
                for value in values:
                    sample.add(value, bit)
            sample.take_news()

    def _forget_oldest(self) -> None:
        arms = sum(_room(epoch) for epoch in self._ended.values())
        while len(self._ended) > MOST_ENDED or (arms > MOST_ENDED_ARMS and len(self._ended) > 1):
            _, epoch = self._ended.popitem(last=False)
            arms -= _room(epoch)


def _room(epoch: Epoch) -> int:
    """In arms. A quantity that is summed by group of keys takes as much as another arm."""
    quantities = ("seconds", "ttftSeconds", "completionTokens")
    return sum(
        1 + sum(bool(arm[quantity].get("groups")) for quantity in quantities) for arm in epoch.arms.values()
    )


def _key(arm: dict[str, Any]) -> tuple[str, str, str]:
    return arm["alias"], arm["arm"], arm["revision"]
