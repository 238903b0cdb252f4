"""What an hour of a GPU costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT = "default"


@dataclass(frozen=True)
class PriceTable:
    """Prices by kind of GPU, as spec.resources.acceleratorType names it."""

    currency: str = "USD"
    gpu_hours: Mapping[str, float] = field(default_factory=dict)
    """Price of one GPU for one hour; the key `default` is for kinds that are not listed."""

    def gpu_hour(self, accelerator: str | None) -> float | None:
        """Price of one GPU for one hour; None where the table does not know it."""
        listed = {name.lower(): price for name, price in self.gpu_hours.items()}
        return listed.get((accelerator or DEFAULT).lower(), listed.get(DEFAULT))

    @classmethod
    def parse(cls, document: object) -> PriceTable:
        """A table from a parsed YAML document {currency: USD, gpuHour: {NVIDIA-L4: 0.8, default: 2.5}}. Raises
        ValueError, which names the field."""
        if not isinstance(document, Mapping):
            raise ValueError(
                "must be a mapping with currency and gpuHour, for example gpuHour: {NVIDIA-L4: 0.8}"
            )
        if unknown := sorted(str(key) for key in document if key not in ("currency", "gpuHour")):
            raise ValueError(f"{unknown[0]}: unknown field; there are currency and gpuHour")
        currency, listed = document.get("currency", "USD"), document.get("gpuHour", {})
        if not isinstance(currency, str) or not 1 <= len(currency) <= 8:
            raise ValueError(f"currency: {currency!r} must be a short text such as USD")
        if not isinstance(listed, Mapping):
            raise ValueError(
                "gpuHour: must be a mapping from kinds of GPU to prices, for example {NVIDIA-L4: 0.8}"
            )
        return cls(currency, {str(name): _price(name, value) for name, value in listed.items()})


def _price(name: object, value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(f"gpuHour.{name}: {value!r} must be a number that is not negative")
    return float(value)
