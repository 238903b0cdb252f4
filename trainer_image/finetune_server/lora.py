"""Low-rank adapters beside untouched base weights, each row of a batch with its own.

Every linear layer keeps the A and B of all loaded adapters one behind the other. A step multiplies the span that its
rows use, hides from each row what is not its adapter's, and adds the rest: two multiplications per layer however many
adapters are mixed (the idea of Punica, arXiv 2310.18547, for a CPU). The base weights are never written, so that a row
without adapter gives what the bare model gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune_server.adapters import Adapter


@dataclass(frozen=True)
class Span:
    """Columns low .. high of the concatenated ranks; `hidden` is [rows, 1, high - low], true where a column is another
    row's adapter, None: all rows use all of it."""

    low: int
    high: int
    hidden: torch.Tensor | None


class _Step:
    """What the layers of one model read during a forward pass."""

    span: Span | None = None


class LoraLinear(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer plus the adapters' deltas for the rows that the current span names."""

    down: torch.Tensor | None  # [ranks, in]: the A of every adapter
    up: torch.Tensor | None  # [ranks, out]: the B of every adapter, transposed and scaled

    def __init__(self, base: nn.Module, step: _Step) -> None:
        super().__init__()
        self.base = base
        self.step = step
        self.down = None
        self.up = None

    @property
    def weight(self) -> Any:
        """Some models look at a layer's dtype."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns base(x) plus each row's delta; x is [rows, tokens, in]."""
        result: torch.Tensor = self.base(x)
        span = self.step.span
        if span is None or self.down is None or self.up is None:
            return result
        inner = nn.functional.linear(x, self.down[span.low : span.high])
        if span.hidden is not None:
            # Filled, not multiplied: another adapter's overflow must not become this row's NaN.
            inner.masked_fill_(span.hidden, 0.0)
        # In place on what the base layer has just made: a sum of its own would be written and read once more.
        up = self.up[span.low : span.high]
        result.view(-1, result.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up)
        return result


class AdapterBank:
    """The adapters of one model. Only the thread that runs the model may call it."""

    def __init__(self, model: nn.Module) -> None:
        """Wraps every linear layer of the model but its head."""
        self._step = _Step()
        self._places: dict[str, tuple[int, int]] = {}
        self._layers: dict[str, LoraLinear] = {}
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, last = name.rpartition(".")
                layer = LoraLinear(module, self._step)
                setattr(model.get_submodule(parent), last, layer)
                self._layers[name] = layer

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (in, out) of every layer that an adapter can target, by the layer's name."""
        return {
            name: (int(layer.weight.shape[1]), int(layer.weight.shape[0]))
            for name, layer in self._layers.items()
        }

    def names(self) -> list[str]:
        return list(self._places)

    def add(self, name: str, adapter: Adapter) -> None:
        """Appends an adapter that was checked against `shapes`. Layers that it does not target get zeros."""
        low = max((high for _, high in self._places.values()), default=0)
        ready = []
        for layer_name, layer in self._layers.items():
            part = adapter.parts.get(layer_name)
            if part is None and layer.down is None:
                continue
            weight = layer.weight
            down, up = (
                torch.zeros(adapter.rank, int(size), dtype=weight.dtype, device=weight.device)
                for size in (weight.shape[1], weight.shape[0])
            )
            if part is not None:
                down[: part.rank] = part.down.to(down)
                up[: part.rank] = (part.up.T.float() * part.scale).to(up)  # 8-bit types cannot multiply
            joined = (
                torch.cat([_padded(layer.down, low, down), down]),
                torch.cat([_padded(layer.up, low, up), up]),
            )
            ready.append((layer, *joined))
        for layer, down, up in ready:  # all or nothing: memory may have run out above
            layer.down, layer.up = down, up
        self._places[name] = (low, low + adapter.rank)

    def remove(self, name: str) -> None:
        """Gives the adapter's memory back and moves those behind it together."""
        low, high = self._places.pop(name)
        for layer in self._layers.values():
            if layer.down is None or layer.up is None:
                continue
            if self._places:
                layer.down = torch.cat([layer.down[:low], layer.down[high:]])
                layer.up = torch.cat([layer.up[:low], layer.up[high:]])
            else:
                layer.down = layer.up = None
        width = high - low
        self._places = {
            other: (start - width, end - width) if start >= high else (start, end)
            for other, (start, end) in self._places.items()
        }

    def select(self, names: list[str | None], *, device: Any) -> None:
        """Sets the adapter of each row of the next forward pass; None is the base model."""
        used = {name: self._places[name] for name in names if name is not None}
        if not used:
            self._step.span = None
            return
        low, high = min(place[0] for place in used.values()), max(place[1] for place in used.values())
        if len(used) == 1 and None not in names:
            self._step.span = Span(low, high, None)
            return
        hidden = torch.ones(len(names), 1, high - low, dtype=torch.bool)
        for row, name in enumerate(names):
            if name is not None:
                start, end = used[name]
                hidden[row, 0, start - low : end - low] = False
        self._step.span = Span(low, high, hidden.to(device))


def _padded(stored: torch.Tensor | None, ranks: int, like: torch.Tensor) -> torch.Tensor:
    """Returns what is stored, or zeros for the adapters that came before this layer's first one."""
    return torch.zeros(ranks, like.shape[1]).to(like) if stored is None else stored
