"""RLOO and GRPO on prompts that are tokens already, repeatable from any checkpoint, with rewards of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import trl
from trl.trainer.utils import RepeatSampler

from finetune_trainer import finite, randomness, signals
from finetune_trainer.data import encoding
from finetune_trainer.data.cells import Turn
from finetune_trainer.data.encoding import PromptRow
from finetune_trainer.data.shapes import Prompt, as_turns
from finetune_trainer.failures import NotFinite, Stopped
from finetune_trainer.rewards.functions import Function
from finetune_trainer.rewards.models import Scorer
from finetune_trainer.runfile import ApplyChatTemplate

# What torch says when it is asked to draw from probabilities that are NaN.
BROKEN_PROBABILITIES = "probability tensor contains"


@dataclass
class Book:
    """All prompts of a run by number. The trainer only ever sees numbers: texts, tokens and columns are looked up."""

    rows: Sequence[PromptRow]
    choice: ApplyChatTemplate
    has_template: bool
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row.prompt.columns))
        self.columns = tuple(names)

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        return [list(self.rows[int(number)].input_ids) for number in prompts]

    def prompts(self, numbers: Sequence[str]) -> list[Prompt]:
        return [self.rows[int(number)].prompt for number in numbers]

    def turns(self, prompt: Prompt) -> tuple[Turn, ...] | None:
        return as_turns(prompt, has_template=self.has_template, choice=self.choice)


def reward_of_function(function: Function, book: Book, *, name: str) -> Callable[..., list[float]]:
    """A reward as TRL calls it. Prompts and completions reach the user's function in the shape of the row."""

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        rows = book.prompts(prompts)
        columns: dict[str, Any] = {
            column: [row.columns.get(column) for row in rows] for column in book.columns
        }
        if function.accepts is not None:  # TRL's own extras only where they are asked for by name
            columns |= {extra: more[extra] for extra in function.accepts & more.keys()}
        return function(
            [row.given if isinstance(row.given, str) else list(row.given) for row in rows],
            [
                text if isinstance(row.given, str) else [{"role": "assistant", "content": text}]
                for row, text in zip(rows, completions, strict=True)
            ],
            columns,
        )

    reward.__name__ = name
    return reward


def reward_of_model(scorer: Scorer, book: Book, *, name: str) -> Callable[..., list[float]]:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        examples = [
            encoding.answer(row, text, turns=book.turns(row))
            for row, text in zip(book.prompts(prompts), completions, strict=True)
        ]
        return scorer(examples, choice=book.choice)

    reward.__name__ = name
    return reward


class EpochSampler(RepeatSampler):  # type: ignore[misc]
    """The order of an epoch follows from seed and epoch alone, so that a resumed run meets the rows it would have."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) + epoch)


class _Sampled:
    """What both trainers get. The methods that begin with an underscore are TRL 1.16's own hooks."""

    book: Book
    give_up_step: Callable[[], None] | None = None  # set where there are checkpoints
    _before_evaluation: randomness.Randomness | None = None  # training's, while an evaluation draws its own

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.book.tokens(prompts), None, {}

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        args: Any = self.args  # type: ignore[attr-defined]
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,  # type: ignore[attr-defined]
            mini_repeat_count=args.num_generations,
            batch_size=args.generation_batch_size // args.num_generations,
            repeat_count=args.num_iterations * args.steps_per_generation,
            seed=args.seed,
        )

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        step = self.state.global_step  # type: ignore[attr-defined]
        model: Any = self.model  # type: ignore[attr-defined]
        finite.check_weights(model, step=step)
        try:
            with self._watching(model):
                return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        except RuntimeError as error:
            if BROKEN_PROBABILITIES in str(error):
                raise NotFinite(
                    f"the probabilities of the next token are not finite after step {step}; {finite.ADVICE}"
                ) from error
            raise

    @contextlib.contextmanager
    def _watching(self, model: Any) -> Iterator[None]:
        """Lets a request to stop break off the sampling of a step, which may take longer than the grace time."""
        if not model.training or self.give_up_step is None:
            yield
            return
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        handle = inner.register_forward_pre_hook(self._stop_if_asked)
        try:
            yield
        finally:
            handle.remove()

    def _stop_if_asked(self, *_: Any) -> None:
        if signals.stop_requested() and self.give_up_step is not None:
            self.give_up_step()

    def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
        model: Any = self.model  # type: ignore[attr-defined]
        if not model.training or self.give_up_step is None:
            return super()._calculate_rewards(*arguments)  # type: ignore[misc]
        self._stop_if_asked()
        try:
            with signals.breakable():  # a user's function may ask a model elsewhere, or hang
                return super()._calculate_rewards(*arguments)  # type: ignore[misc]
        except Stopped:
            self._stop_if_asked()
            raise

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Draws the same random numbers each time, so that evaluations can be compared, and leaves training's alone."""
        self._before_evaluation = before = randomness.capture()
        transformers.set_seed(self.args.seed)  # type: ignore[attr-defined]
        try:
            return dict(super().evaluate(*arguments, **options))  # type: ignore[misc]
        finally:
            randomness.restore(before)
            self._before_evaluation = None

    def _save_rng_state(self, output_dir: str) -> None:
        """A stop breaks an evaluation off and saves: what is resumed is training."""
        if self._before_evaluation is not None:
            randomness.restore(self._before_evaluation)
        super()._save_rng_state(output_dir)  # type: ignore[misc]


class RLOOTrainer(_Sampled, trl.RLOOTrainer):  # type: ignore[misc]
    """trl.RLOOTrainer; `book` is set before it trains."""


class GRPOTrainer(_Sampled, trl.GRPOTrainer):  # type: ignore[misc]
    """trl.GRPOTrainer; `book` is set before it trains."""


@dataclass(frozen=True)
class PreferenceCollator:
    """Chosen answers, then rejected ones, padded to one width; scored are the tokens that the rows mark as learnt."""

    pad: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
        learnt = [row[f"{side}_mask"] for side in ("chosen", "rejected") for row in rows]
        width = max(len(row) for row in ids)
        batch = {
            "input_ids": torch.full((len(ids), width), self.pad),
            "attention_mask": torch.zeros((len(ids), width), dtype=torch.long),
            "completion_mask": torch.zeros((len(ids), width), dtype=torch.long),
        }
        for index, (tokens, marks) in enumerate(zip(ids, learnt, strict=True)):
            batch["input_ids"][index, : len(tokens)] = torch.tensor(tokens)
            batch["attention_mask"][index, : len(tokens)] = 1
            batch["completion_mask"][index, : len(tokens)] = torch.tensor(marks)
        return batch


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """trl.DPOTrainer on rows that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset
