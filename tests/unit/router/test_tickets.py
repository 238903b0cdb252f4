"""Signed response ids."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.routes import GROUPS, Arm
from finetune_router import tickets
from finetune_router.tickets import BadTicketError, TicketOffice

OFFICE = TicketOffice(b"0123456789abcdef")


@given(
    st.text(min_size=1, max_size=63), st.sampled_from(list(Arm)), st.booleans(), st.integers(0, GROUPS - 1)
)
def test_what_was_minted_is_read(alias: str, arm: Arm, counted: bool, group: int) -> None:
    try:
        name = alias.encode()
    except UnicodeEncodeError:
        return
    text = OFFICE.mint(name, arm, b"ab12cd34", counted=counted, group=group)
    for prefix in ("", "chatcmpl-", "cmpl-", "embd-", "rerank-", "score-", "classify-", "pool-"):
        ticket = OFFICE.read(prefix + text)
        assert (ticket.alias, ticket.arm, ticket.revision) == (alias, arm, "ab12cd34")
        assert (ticket.counted, ticket.group) == (counted, group)


def test_a_base_revision_is_read_as_it_is() -> None:
    assert OFFICE.read(OFFICE.mint(b"bot", Arm.STABLE, b"base", counted=True)).revision == "base"


@given(st.integers(0, 200), st.integers(1, 255))
def test_no_changed_bit_passes(position: int, flip: int) -> None:
    text = OFFICE.mint(b"support-bot", Arm.CANDIDATE, b"ab12cd34", counted=True)
    position %= len(text)
    changed = text[:position] + chr((ord(text[position]) ^ flip) & 0x7F) + text[position + 1 :]
    if changed != text:
        with pytest.raises(BadTicketError):
            OFFICE.read(changed)


@pytest.mark.parametrize("alias", [b"bot", b"bots", b"robot"])
def test_an_id_has_one_spelling(alias: bytes) -> None:
    """Each other one would be another response to the feedback store, and count again."""
    text = next(
        minted
        for _ in range(1000)
        if {"-", "_"} <= set(minted := OFFICE.mint(alias, Arm.STABLE, b"ab12cd34", counted=True))
    )
    last = (text[:-1] + sign for sign in string.ascii_letters + string.digits + "-_")
    others = {text + "=", text + "==", text.replace("-", "+"), text.replace("_", "/"), *last} - {text}
    for other in others:
        with pytest.raises(BadTicketError):
            OFFICE.read(other)


@pytest.mark.parametrize(
    "text", ["", "chatcmpl-", "chatcmpl-123", "x" * 5000, "é", "AAAA", "chatcmpl-" + "A" * 80]
)
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(BadTicketError):
        OFFICE.read(text)


def test_another_key_does_not_sign() -> None:
    text = TicketOffice(b"another key ....").mint(b"bot", Arm.STABLE, b"base", counted=True)
    with pytest.raises(BadTicketError, match="another key"):
        OFFICE.read(text)


def test_ids_differ() -> None:
    minted = {OFFICE.mint(b"bot", Arm.STABLE, b"base", counted=True) for _ in range(1000)}
    assert len(minted) == 1000


def test_a_replica_without_a_key_makes_one_and_keeps_it(tmp_path: Path) -> None:
    key = tickets.load_key(None, tmp_path)
    assert key == tickets.load_key(None, tmp_path)
    assert len(key) >= 32
    assert (tmp_path / "signing.key").stat().st_mode & 0o077 == 0


def test_a_key_that_a_full_disk_left_empty_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "signing.key").touch(mode=0o600)
    key = tickets.load_key(None, tmp_path)
    assert len(key) >= 32
    assert key == tickets.load_key(None, tmp_path)


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        tickets.load_key(file, tmp_path)
