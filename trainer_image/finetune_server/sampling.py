"""The next token of each row. What a row gets depends on its logits, its settings and its seed alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

GREEDY = 1e-5  # temperatures below are 0, as in vLLM: dividing by them would overflow
MAX_LOGPROBS = 20  # as OpenAI and vLLM allow


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; fields are named as in the OpenAI API."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the chosen token only


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first


def make_generator(seed: int | None) -> torch.Generator:
    """Returns a random source for one sequence; without seed, another one each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose(logits: torch.Tensor, settings: Sampling, seen: Counter[int], source: torch.Generator) -> int:
    """Returns the next token for the logits [vocabulary] of one row, in float32 on the CPU."""
    if settings.presence_penalty or settings.frequency_penalty:
        logits = _penalize(logits, settings, seen)
    if settings.temperature < GREEDY:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / settings.temperature, dim=-1)
    point = float(torch.rand((), generator=source, dtype=torch.float64))
    if settings.top_p >= 1 and not settings.top_k and not settings.min_p:
        return _pick(probabilities, point)
    likeliest, tokens = _head(probabilities, settings)
    return int(tokens[_pick(likeliest, point)])


def _penalize(logits: torch.Tensor, settings: Sampling, seen: Counter[int]) -> torch.Tensor:
    """Subtracts as OpenAI's API reference says: per occurrence, and once per token that occurred."""
    if not seen:
        return logits
    logits = logits.clone()
    tokens = torch.tensor(list(seen.keys()))
    counts = torch.tensor(list(seen.values()), dtype=logits.dtype)
    logits[tokens] -= settings.frequency_penalty * counts + settings.presence_penalty
    return logits


def _head(probabilities: torch.Tensor, settings: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens that top_k, top_p and min_p leave, likeliest first, and their probabilities.

    top_p: the smallest set of likeliest tokens whose probabilities reach it (arXiv 1904.09751).
    """
    size = len(probabilities)
    count = min(size, settings.top_k) if settings.top_k else size
    if settings.top_p < 1:
        values, tokens = probabilities.topk(min(count, 1024, size))
        if len(values) < count and float(values.sum()) < settings.top_p:  # a flat distribution: look at all
            values, tokens = probabilities.topk(count)
    else:
        values, tokens = probabilities.topk(count)
    keep = len(values)
    if settings.top_p < 1:
        # topk of `count` is a distribution of its own, as in vLLM: top_p is a share of what top_k left.
        total = values.sum() if settings.top_k else 1.0
        keep = int(((values.cumsum(0) - values) < settings.top_p * total).sum())
    if settings.min_p:
        keep = min(keep, int((values >= settings.min_p * values[0]).sum()))
    keep = max(keep, 1)
    return values[:keep], tokens[:keep]


def _pick(weights: torch.Tensor, point: float) -> int:
    """Returns the index where the cumulated weights pass the share `point` of their sum."""
    cumulated = weights.double().cumsum(0)
    return min(int(torch.searchsorted(cumulated, point * float(cumulated[-1]), right=True)), len(weights) - 1)


def describe(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """Returns the log-probability of a token and of the `count` likeliest, before temperature and penalties."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(count)
    return TokenLogprob(
        token=token,
        logprob=float(logprobs[token]),
        top=tuple(zip(tokens.tolist(), values.tolist(), strict=True)),
    )
