"""Keys and values of all running sequences: one row each, every row beginning at column 0.

A sequence joins by taking the next row and leaves by letting the last row take its place, so that a step always works
on neighbouring rows and nothing is copied for those that stay.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

GRAIN = 256  # columns that are added at a time


class SlotCache(transformers.Cache):  # type: ignore[misc]  # transformers is not typed here
    """What a transformers model takes for its cache. Only the thread that runs the model may call it."""

    def __init__(self, *, max_rows: int, max_length: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.max_length = max_length
        self.max_tokens = max_tokens  # rows x columns that may be allocated; at least one row of max_length
        self.rows = 0
        self.columns = 0
        self._stored: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # layer -> [rows, heads, columns, size]
        self._first = 0
        self._positions = torch.zeros(0, 0, dtype=torch.long)
        self._length = 0

    def fits(self, rows: int, length: int) -> bool:
        return rows <= self.max_rows and length <= self.max_length and rows * length <= self.max_tokens

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for `rows` rows of `length` columns, which must fit; keeps what is stored."""
        if rows <= self.rows and length <= self.columns:
            return
        columns = min(self.max_length, -(-max(length, self.columns) // GRAIN) * GRAIN)
        wanted = min(self.max_rows, max(rows, 2 * self.rows if rows > self.rows else self.rows))
        if wanted * columns > self.max_tokens:
            wanted, columns = rows, min(columns, max(length, self.max_tokens // rows))
        for layer, (keys, values) in self._stored.items():
            self._stored[layer] = (_resized(keys, wanted, columns), _resized(values, wanted, columns))
        self.rows, self.columns = wanted, columns

    def clear(self) -> None:
        """Gives all memory back."""
        self._stored.clear()
        self.rows = self.columns = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` columns of one row to another."""
        for keys, values in self._stored.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def wipe(self, row: int) -> None:
        """Overwrites a row that may hold NaN: a hidden column still counts as 0 x NaN in the attention."""
        for keys, values in self._stored.values():
            keys[row].zero_()
            values[row].zero_()

    def prepare(self, first: int, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Says which rows and columns the next forward pass writes; returns its attention mask.

        `positions` is [rows, tokens]; row i of the pass is stored in row first + i. The mask is
        [rows, 1, tokens, length], true where a token may look.
        """
        self._first, self._positions, self._length = first, positions, length
        columns = torch.arange(length, device=positions.device)
        return columns[None, None, None, :] <= positions[:, None, :, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values [rows, heads, tokens, size]; returns all columns of these rows."""
        if layer_idx not in self._stored:
            self._stored[layer_idx] = (self._allocate(key_states), self._allocate(value_states))
        first, count = self._first, key_states.shape[0]
        found = []
        for stored, new in zip(self._stored[layer_idx], (key_states, value_states), strict=True):
            rows = stored[first : first + count]
            if new.shape[2] == 1:
                rows[torch.arange(count, device=new.device), :, self._positions[:, 0]] = new[:, :, 0]
            else:
                for row, start in enumerate(self._positions[:, 0].tolist()):
                    rows[row, :, start : start + new.shape[2]] = new[row]
            found.append(rows[:, :, : self._length])
        return found[0], found[1]

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not whatever the memory held: see `wipe`.
        return like.new_zeros(self.rows, like.shape[1], self.columns, like.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def __len__(self) -> int:
        return len(self._stored)


def _resized(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    wider = stored.new_zeros(rows, stored.shape[1], columns, stored.shape[3])
    kept, width = min(rows, stored.shape[0]), min(columns, stored.shape[2])
    wider[:kept, :, :width] = stored[:kept, :, :width]
    return wider
