"""Tokens to text: no half characters, and no part of a stop string ever shown."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_server.texts import Detokenizer, StopFilter
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer().backend_tokenizer


@pytest.mark.parametrize(
    "text", ["What colour is cup 3?", "naïve café 🦙🦙 日本語", "a  b\n\n c", " leading"]
)
def test_pieces_join_to_the_whole_text_and_hold_no_half_characters(tokenizer: Any, text: str) -> None:
    stream = Detokenizer(tokenizer, tokenizer.encode("before").ids)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_never_becomes_a_character_is_shown_at_last(tokenizer: Any) -> None:
    half = tokenizer.encode("🦙").ids[:2]
    stream = Detokenizer(tokenizer, [])
    assert [stream.push(token) for token in half] == ["", ""]
    assert "\ufffd" in stream.flush()
    assert stream.flush() == ""


def shown(text: str, stops: tuple[str, ...], cuts: list[int]) -> tuple[str, str | None]:
    """Text that a filter shows when the text comes in pieces, and the stop string that it found."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    stream, out = StopFilter(stops), ""
    for begin, end in itertools.pairwise(places):
        piece, found = stream.push(text[begin:end])
        out += piece
        if found is not None:
            return out, found
    return out + stream.flush(), None


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=12),
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    out, found = shown(text, tuple(stops), cuts)
    if not any(stop in text for stop in stops):
        assert (out, found) == (text, None)
    else:
        assert found is not None
        assert text.startswith(out + found)
        assert not any(stop in out for stop in stops)


def test_a_stop_string_across_pieces_is_not_shown() -> None:
    stream = StopFilter(("\n\nUser:",))
    assert stream.push("Yes.\n") == ("Yes.", None)
    assert stream.push("\nUs") == ("", None)
    assert stream.push("er: no") == ("", "\n\nUser:")


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    stream = StopFilter(("END",))
    assert stream.push("the E") == ("the ", None)
    assert stream.push("N") == ("", None)
    assert stream.push("gine") == ("ENgine", None)
    assert stream.push(" EN") == (" ", None)
    assert stream.flush() == "EN"
