"""The batch: who joins, who leaves, and that nobody's answer depends on it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_server import models, registry
from finetune_server.engine import Dead, Engine, Limits, QueueFull
from finetune_server.sampling import Sampling
from finetune_server.sequences import Finish, Piece, Sequence
from finetune_server.telemetry import Telemetry
from tests.adapters import write_adapter

BASE = "tiny"


class Client:
    """Submits to an engine and collects whole answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inbox: queue.Queue[tuple[Sequence, Piece]] = queue.Queue()

    def sequence(self, text: str, *, model: str = BASE, **settings: Any) -> Sequence:
        base = self.engine.base
        options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **settings}
        made = Sequence(
            prompt=base.tokenizer(text)["input_ids"],
            settings=Sampling(**options),
            model=model,
            tokenizer=base.tokenizer.backend_tokenizer,
            ends=base.ends,
            sink=lambda piece: self.inbox.put((made, piece)),
        )
        return made

    def wait(self, sequences: list[Sequence], *, seconds: float = 30) -> list[Finish | None]:
        deadline = time.monotonic() + seconds
        while any(one.finish is None for one in sequences):
            self.inbox.get(timeout=max(0.01, deadline - time.monotonic()))
        return [one.finish for one in sequences]

    def answer(self, sequences: list[Sequence]) -> list[list[int]]:
        self.engine.submit(sequences)
        self.wait(sequences)
        return [one.output for one in sequences]


@pytest.fixture(scope="session")
def make_engine_base(tiny_model: Path) -> Any:
    def make(**more: Any) -> models.Base:
        options: dict[str, Any] = {"device": "cpu", "dtype": "auto", "max_length": 128, **more}
        return models.load_base(tiny_model, uri=f"file://{tiny_model}", **options)

    return make


@pytest.fixture
def make_client(make_engine_base: Any) -> Iterator[Any]:
    started = []

    def make(**limits: Any) -> Client:
        options: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_loras": 2,
            "max_lora_rank": 16,
            "max_queue": 64,
            "cache_tokens": 4 * 128,
            "prefill_tokens": 32,
        }
        engine = Engine(make_engine_base(), Limits(**{**options, **limits}), Telemetry(BASE))
        engine.registry.set_base_names(frozenset({BASE}))
        engine.start()
        started.append(engine)
        return Client(engine)

    yield make
    for engine in started:
        engine.stop()


def texts(count: int) -> list[str]:
    return [f"What colour is cup {number}? " * (1 + number % 4) for number in range(count)]


def greedy(base: models.Base, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy answer."""
    with torch.inference_mode():
        output = base.model.generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def test_answers_are_those_of_transformers_whatever_else_is_in_the_batch(
    make_client: Any, make_engine_base: Any
) -> None:
    client = make_client()
    sequences = [client.sequence(text, max_tokens=5 + 3 * (i % 5)) for i, text in enumerate(texts(14))]

    found = client.answer(sequences)

    plain = make_engine_base()
    for sequence, tokens in zip(sequences, found, strict=True):
        assert tokens == greedy(plain, sequence.prompt, len(tokens))
        assert len(tokens) == sequence.settings.max_tokens


def test_memory_for_fewer_sequences_puts_some_back_and_loses_nothing(
    make_client: Any, make_engine_base: Any
) -> None:
    client = make_client(cache_tokens=150)  # one longest sequence and a little more
    sequences = [client.sequence("What colour is cup 3?", max_tokens=60) for _ in range(4)]

    found = client.answer(sequences)

    assert found == [greedy(make_engine_base(), sequences[0].prompt, 60)] * 4
    samples = client.engine.telemetry.registry
    assert samples.get_sample_value("vllm:num_preemptions_total", {"model_name": BASE, "engine": "0"}) > 0


def test_adapters_and_base_share_a_batch(make_client: Any, tiny_adapters: dict[str, Path]) -> None:
    client = make_client()
    client.engine.load("a", tiny_adapters["all"], pinned=True)
    client.engine.load("b", tiny_adapters["attention"], pinned=True)
    alone = [client.answer([client.sequence("What colour is hat 1?", model=m)])[0] for m in (BASE, "a", "b")]

    names = [BASE, "a", "b", "a"] * 3
    mixed = client.answer([client.sequence("What colour is hat 1?", model=name) for name in names])

    assert mixed == [alone[(BASE, "a", "b").index(name)] for name in names]
    assert alone[0] != alone[1] != alone[2]


def test_a_seed_gives_the_same_answer_alone_and_in_company(make_client: Any) -> None:
    client = make_client()
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 20}
    alone = client.answer([client.sequence("What colour is pen 4?", **settings)])[0]
    company = [client.sequence(text, temperature=1.0) for text in texts(6)]

    sequence = client.sequence("What colour is pen 4?", **settings)
    client.answer([*company, sequence])
    other = client.answer([client.sequence("What colour is pen 4?", **{**settings, "seed": 8})])[0]

    assert sequence.output == alone
    assert other != alone


def test_a_cancelled_sequence_leaves_and_gives_its_place_to_the_next(make_client: Any) -> None:
    client = make_client(max_num_seqs=1)
    long, short = client.sequence("a", max_tokens=100), client.sequence("b", max_tokens=3)
    client.engine.submit([long])
    client.engine.submit([short])
    while len(long.output) < 3:
        time.sleep(0.001)

    client.engine.cancel([long])

    assert client.wait([long, short]) == [Finish.ABORT, Finish.LENGTH]
    assert len(long.output) < 100


def test_a_full_queue_refuses(make_client: Any) -> None:
    client = make_client(max_num_seqs=1, max_queue=2)
    running = client.sequence("a", max_tokens=120)
    client.engine.submit([running])
    while not running.output:
        time.sleep(0.001)
    client.engine.submit([client.sequence("b"), client.sequence("c")])

    with pytest.raises(QueueFull, match="try again later"):
        client.engine.submit([client.sequence("d")])


def test_a_request_that_cannot_be_taken_whole_holds_nothing(
    make_client: Any, tiny_adapters: dict[str, Path]
) -> None:
    """As when an unload comes in the middle of it: a user that never leaves would keep the place for ever."""
    client = make_client(max_loras=1)
    client.engine.load("first", tiny_adapters["all"], pinned=False)
    with pytest.raises(KeyError):
        client.engine.submit([client.sequence("a", model="first"), client.sequence("b", model="gone")])
    client.engine.load("second", tiny_adapters["all"], pinned=False)
    assert [one.name for one in client.engine.registry.listed()] == ["second"]


def test_the_adapter_unused_for_longest_makes_room_unless_somebody_keeps_it(
    make_client: Any, tiny_adapters: dict[str, Path]
) -> None:
    client = make_client(max_loras=2)
    engine = client.engine
    engine.load("old", tiny_adapters["all"], pinned=False)
    engine.load("new", tiny_adapters["all"], pinned=False)
    client.answer([client.sequence("a", model="old")])

    engine.load("third", tiny_adapters["attention"], pinned=True)
    assert [one.name for one in engine.registry.listed()] == ["old", "third"]

    engine.load("fourth", tiny_adapters["attention"], pinned=True)
    with pytest.raises(registry.CapacityFull, match="third, fourth"):
        engine.load("fifth", tiny_adapters["all"], pinned=False)
    with pytest.raises(registry.AlreadyLoaded):
        engine.load("third", tiny_adapters["attention"], pinned=True)
    with pytest.raises(KeyError):
        engine.submit([client.sequence("a", model="old")])


def test_unloading_lets_a_running_answer_end_with_its_adapter(
    make_client: Any, tiny_adapters: dict[str, Path]
) -> None:
    client = make_client(max_loras=1)
    engine = client.engine
    engine.load("a", tiny_adapters["all"], pinned=True)
    expected = client.answer([client.sequence("hat", model="a", max_tokens=60)])[0]
    running = client.sequence("hat", model="a", max_tokens=60)
    engine.submit([running])
    while len(running.output) < 2:
        time.sleep(0.001)

    engine.unload("a")

    with pytest.raises(KeyError):
        engine.submit([client.sequence("hat", model="a")])
    client.wait([running])
    assert running.output == expected
    engine.load("a", tiny_adapters["attention"], pinned=True)  # the place is free again, and the name is new
    assert client.answer([client.sequence("hat", model="a", max_tokens=60)])[0] != expected


def test_values_that_are_not_finite_end_one_answer_and_harm_no_other(
    make_client: Any, tiny_model: Path, tmp_path: Path
) -> None:
    # A long prompt leaves its values in more columns than a short neighbour's own, and a long neighbour makes the
    # attention read them: hidden, but 0 x NaN is NaN.
    client = make_client()
    texts = ["What colour is cup 3? " * 3, "cup", "hat"]
    expected = client.answer([client.sequence(text, max_tokens=30) for text in texts])
    client.engine.load(
        "huge", write_adapter(tiny_model, tmp_path / "huge", seed=9, lora_alpha=1e38), pinned=True
    )
    good = [client.sequence(text, max_tokens=30) for text in texts]
    bad = client.sequence("What colour is cup 3? " * 3, model="huge")
    client.engine.submit([good[0], bad, *good[1:]])

    assert client.wait([bad]) == [Finish.ERROR]
    client.wait(good)
    assert [one.output for one in good] == expected


def test_a_stopped_engine_says_so(make_client: Any) -> None:
    client = make_client(max_num_seqs=1)
    running, waiting = client.sequence("a", max_tokens=120), client.sequence("b")
    client.engine.submit([running, waiting])
    client.engine.stop()
    assert client.wait([running, waiting]) == [Finish.ABORT, Finish.ABORT]
    with pytest.raises(Dead):
        client.engine.submit([client.sequence("c")])
