"""What all workers of a replica have counted: one epoch for each life of a worker, ended ones included."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_operator.api.routes import EpochCounters, RouterCounters
from finetune_router import storage
from finetune_router.counters import Sample

logger = logging.getLogger(__name__)

MOST_ENDED = 64  # ended epochs that are kept for a reader who has not seen their last counts
_FILE_NAME = "epochs.json"


@dataclass
class Epoch:
    """Counts of one life of a worker."""

    name: str
    arms: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    """Kept as they came; they are made models of when somebody asks."""
    samples: dict[str, Sample] = field(default_factory=dict)

    def update(self, message: dict[str, Any]) -> None:
        """Take in a worker's report: whole values of what changed."""
        for arm in message["arms"]:
            self.arms[arm["alias"], arm["arm"], arm["revision"]] = arm
        for news in message["samples"]:
            alias, comparison = news["alias"], news["comparison"]
            sample = self.samples.get(alias)
            if sample is None or sample.comparison != comparison:
                sample = self.samples[alias] = Sample(alias, comparison)
            for value, bit in news["added"]:
                sample.add(value, bit)
            sample.take_news()

    def wire(self) -> EpochCounters:
        return EpochCounters.model_validate(
            {
                "epoch": self.name,
                "arms": list(self.arms.values()),
                "samples": [sample.wire() for sample in self.samples.values()],
            }
        )


class Ledger:
    """All epochs. Those that ended are written to disk when the router ends, so that a restart loses no evidence."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE_NAME
        self._live: dict[str, Epoch] = {}
        self._ended: OrderedDict[str, EpochCounters] = OrderedDict()

    def load(self) -> None:
        """Take up the epochs of the former life of this replica."""
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            for document in stored["epochs"]:
                epoch = EpochCounters.model_validate(document)
                self._ended[epoch.epoch] = epoch
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("the counters of the router's former life are lost: %s", type(error).__name__)

    def save(self) -> None:
        epochs = [*self._ended.values(), *(epoch.wire() for epoch in self._live.values() if epoch.arms)]
        documents = [epoch.model_dump(mode="json", by_alias=True) for epoch in epochs[-MOST_ENDED:]]
        storage.write_atomically(self._file, json.dumps({"epochs": documents}).encode())

    def begin(self, name: str) -> Epoch:
        self._live[name] = epoch = Epoch(name)
        return epoch

    def end(self, name: str) -> None:
        """The worker is gone; what it had counted stays."""
        epoch = self._live.pop(name, None)
        if epoch is not None and epoch.arms:
            self._ended[name] = epoch.wire()
            while len(self._ended) > MOST_ENDED:
                self._ended.popitem(last=False)

    def wire(self, *, instance: str, version: int, feedback: EpochCounters) -> RouterCounters:
        epochs = [*self._ended.values(), *(epoch.wire() for epoch in self._live.values())]
        return RouterCounters(instance=instance, version=version, epochs=(*epochs, feedback))
