"""The step loop: one thread that owns the model, and sequences that join and leave its batch at every step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_server import adapters, sampling
from finetune_server.models import Base, Runner
from finetune_server.registry import LoadedAdapter, Registry
from finetune_server.sequences import Finish, Piece, Sequence
from finetune_server.telemetry import Telemetry

LOG = logging.getLogger("finetune_server.engine")
MAX_FAILURES = 3  # failed steps in a row after which the engine calls itself dead


@dataclass(frozen=True)
class Limits:
    max_num_seqs: int  # rows of the batch
    max_loras: int
    max_lora_rank: int
    max_queue: int  # sequences that may wait
    cache_tokens: int  # rows x columns of the key-value memory
    prefill_tokens: int = 256  # prompt tokens per step: what running answers wait for a new prompt


class QueueFull(Exception):  # noqa: N818  as the API reports it
    """Too many sequences wait."""


class Dead(Exception):  # noqa: N818  as the API reports it
    """The engine's thread has ended."""


class Engine:
    """Answers sequences in one batch. Public methods may be called from any thread."""

    def __init__(self, base: Base, limits: Limits, telemetry: Telemetry) -> None:
        self.base = base
        self.limits = limits
        self.telemetry = telemetry
        self.registry = Registry(max_loras=limits.max_loras)
        with torch.inference_mode():
            self._runner = Runner(base, max_rows=limits.max_num_seqs, max_tokens=limits.cache_tokens)
        self._shapes = self._runner.bank.shapes()
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._batch: list[Sequence] = []  # row i of the cache; those that wait for their prompt come last
        self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        telemetry.watch_adapters(self._used_adapters, max_loras=limits.max_loras)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; sequences in the batch end with `abort`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    # What others ask of the engine.

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues the sequences of one request. Raises QueueFull, Dead, or KeyError for a model that is not there."""
        with self._wake:
            if not self.alive or self._stopping:
                raise Dead("the engine has stopped")
            if len(self._waiting) + len(sequences) > self.limits.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            keys = self.registry.acquire(sequence.model for sequence in sequences)
            for sequence, key in zip(sequences, keys, strict=True):
                sequence.adapter = key
            self._waiting.extend(sequences)
            self._wake.notify()

    def cancel(self, sequences: list[Sequence]) -> None:
        """Takes sequences out of the batch at the next step; those that ended already are left alone."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    def load(self, name: str, path: Path, *, pinned: bool) -> LoadedAdapter:
        """Reads an adapter and adds it; returns when it can answer.

        Raises FileNotFoundError, adapters.AdapterError, registry.AlreadyLoaded or registry.CapacityFull.
        """
        self.registry.check_room(name)  # before reading what could not be added
        adapter = adapters.read_adapter(path, shapes=self._shapes, max_rank=self.limits.max_lora_rank)
        loaded = LoadedAdapter(
            name=name,
            path=str(path),
            rank=adapter.rank,
            pinned=pinned,
            template=adapters.read_template(path),
        )

        def install() -> None:
            evicted = self.registry.make_room(name)
            if evicted is not None:
                LOG.info("adapter %s evicted to make room for %s", evicted.name, name)
                self._runner.bank.remove(evicted.key)
            self._runner.bank.add(loaded.key, adapter)
            self.registry.insert(loaded)

        self._call(install)
        LOG.info("adapter %s loaded (rank %d)", name, adapter.rank)
        return loaded

    def unload(self, name: str) -> None:
        """Takes an adapter out of the list; running answers keep it until they end. Raises KeyError."""

        def remove() -> None:
            key = self.registry.retire(name)
            if key is not None:
                self._runner.bank.remove(key)

        self._call(remove)
        LOG.info("adapter %s unloaded", name)

    def _call(self, command: Callable[[], None]) -> None:
        """Runs a command between two steps and waits for it."""
        done: Future[None] = Future()
        with self._wake:
            if not self.alive or self._stopping:
                raise Dead("the engine has stopped")
            self._commands.append((command, done))
            self._wake.notify()
        done.result()

    def _used_adapters(self) -> tuple[set[str], set[str]]:
        with self._wake:
            running, waiting = list(self._batch), list(self._waiting)
        return (
            {sequence.model for sequence in running if sequence.adapter},
            {sequence.model for sequence in waiting if sequence.adapter},
        )

    # The thread.

    def _run(self) -> None:
        with torch.inference_mode():
            self._loop()
        self._end()

    def _loop(self) -> None:
        while self._wait_for_work():
            self._run_commands()
            try:
                self._drop_cancelled()
                self._admit()
                self._prefill()
                self._decode()
                self._failures = 0
            except Exception as error:  # the border of the model: a failed step must not end the engine
                LOG.exception("a step failed")
                self._fail_batch(f"{type(error).__name__}: {error}")
            self._observe()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._commands or self._waiting or self._batch):
                self._wake.wait()
            return not self._stopping and self._failures < MAX_FAILURES

    def _run_commands(self) -> None:
        while True:
            with self._wake:
                if not self._commands:
                    return
                command, done = self._commands.popleft()
            try:
                command()
            except Exception as error:  # handed to the caller as it is
                done.set_exception(error)
            else:
                done.set_result(None)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [sequence for sequence in self._waiting if sequence.cancelled]
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
        for sequence in [*gone, *(sequence for sequence in self._batch if sequence.cancelled)]:
            self._finish(sequence, Piece("", finish=Finish.ABORT))

    def _admit(self) -> None:
        """Gives rows to those that wait, first come first served, while prompts and answers so far fit."""
        with self._wake:
            while self._waiting and self._fits(extra=self._waiting[0].length):
                sequence = self._waiting.popleft()
                if sequence.started is None:
                    sequence.started = time.monotonic()
                    self.telemetry.queue_time.observe(sequence.started - sequence.arrived)
                self._batch.append(sequence)

    def _fits(self, *, extra: int = 0) -> bool:
        """Whether the batch (and one more sequence of `extra` tokens) can each take one more token."""
        lengths = [sequence.length for sequence in self._batch] + ([extra] if extra else [])
        return self._runner.cache.fits(len(lengths), min(max(lengths) + 1, self.base.max_length))

    def _prefill(self) -> None:
        """Lets the model read the prompts of new rows, at most `prefill_tokens` of them in one step."""
        first = self._reading()
        group: list[Sequence] = []
        for sequence in self._batch[first:]:
            width = max([len(sequence.pending()), *(len(one.pending()) for one in group)])
            # A prompt of which a part is stored goes alone: rows of a group begin at the same column.
            apart = sequence.computed > 0 or (group and group[0].computed > 0)
            if group and (apart or width * (len(group) + 1) > self.limits.prefill_tokens):
                break
            group.append(sequence)
        if not group:
            return
        tokens = [sequence.pending()[: self.limits.prefill_tokens] for sequence in group]
        logits = self._forward(group, tokens, first=first)
        done = []
        for row, (sequence, part) in enumerate(zip(group, tokens, strict=True)):
            if len(part) == len(sequence.pending()):
                done.append((sequence, logits[row]))
            sequence.computed += len(part)
            self.telemetry.prompt_tokens.inc(len(part) if not sequence.output else 0)
        self._choose(done)

    def _reading(self) -> int:
        """Returns the first row whose prompt the model has not read to its end."""
        rows = range(len(self._batch))
        return next((row for row in rows if not self._is_decoding(self._batch[row])), len(self._batch))

    @staticmethod
    def _is_decoding(sequence: Sequence) -> bool:
        return sequence.computed == sequence.length - 1 and bool(sequence.output)

    def _decode(self) -> None:
        """Adds one token to every answer."""
        while self._batch and not self._fits():
            self._preempt()
        group = self._batch[: self._reading()]
        if group:
            logits = self._forward(group, [sequence.output[-1:] for sequence in group], first=0)
            for sequence in group:
                sequence.computed += 1
            self._choose(list(zip(group, logits, strict=True)))

    def _preempt(self) -> None:
        """Puts the sequence that came last back to the queue's head; its keys and values are computed again."""
        victim = max(self._batch, key=lambda sequence: sequence.arrived)
        self._leave(victim)
        victim.computed = 0
        self.telemetry.preemptions.inc()
        with self._wake:
            self._waiting.appendleft(victim)

    def _forward(self, group: list[Sequence], tokens: list[list[int]], *, first: int) -> torch.Tensor:
        return self._runner.forward(
            tokens,
            first=first,
            starts=[sequence.computed for sequence in group],
            adapters=[sequence.adapter for sequence in group],
            rows=len(self._batch),
        )

    def _choose(self, rows: list[tuple[Sequence, torch.Tensor]]) -> None:
        for sequence, logits in rows:
            if not bool(torch.isfinite(logits.sum())):
                self._runner.cache.wipe(self._batch.index(sequence))
                message = f"model {sequence.model} gave values that are not finite"
                self._finish(sequence, Piece("", finish=Finish.ERROR, message=message))
                continue
            settings = sequence.settings
            token = sampling.choose(logits, settings, sequence.seen, sequence.random)
            wanted = settings.logprobs
            logprob = None if wanted is None else sampling.describe(logits, token, wanted)
            piece = sequence.add(token, logprob, max_length=self.base.max_length)
            self.telemetry.observe_token(sequence)
            if piece.finish is None:
                sequence.sink(piece)
            else:
                self._finish(sequence, piece)

    def _finish(self, sequence: Sequence, piece: Piece) -> None:
        if sequence in self._batch:
            self._leave(sequence)
        key = self.registry.release(sequence.adapter)
        if key is not None:
            self._runner.bank.remove(key)
        sequence.finish = piece.finish
        self.telemetry.observe_end(sequence, str(piece.finish))
        sequence.sink(piece)

    def _leave(self, sequence: Sequence) -> None:
        """Frees a row. Rows stay neighbours, and rows that decode stay before rows that read."""
        row, reading, last = self._batch.index(sequence), self._reading(), len(self._batch) - 1
        if row < reading:
            self._move(reading - 1, row)
            row = reading - 1
        self._move(last, row)
        with self._wake:
            self._batch.pop()
        if not self._batch:
            self._runner.cache.clear()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            moved = self._batch[source]
            self._runner.cache.move(source, target, moved.computed)
            self._batch[target] = moved

    def _fail_batch(self, message: str) -> None:
        self._failures += 1
        self._runner.cache.clear()  # first: nothing of a failed step is moved about
        for sequence in list(self._batch):
            self._finish(sequence, Piece("", finish=Finish.ERROR, message=message))

    def _end(self) -> None:
        """Tells everybody who still waits that nothing more comes."""
        with self._wake:
            self._stopping = True
            left, self._waiting = list(self._waiting), deque()
            commands, self._commands = list(self._commands), deque()
        for _, done in commands:
            done.set_exception(Dead("the engine has stopped"))
        for sequence in [*self._batch, *left]:
            self._finish(sequence, Piece("", finish=Finish.ABORT))
        self._observe()

    def _observe(self) -> None:
        self.telemetry.running.set(len(self._batch))
        self.telemetry.waiting.set(len(self._waiting))
        used = sum(sequence.computed for sequence in self._batch)
        self.telemetry.cache_usage.set(used / self.limits.cache_tokens)
