"""Ports stay what they were, and never collide."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from finetune_local import ports


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_known_ports_are_kept_and_all_differ() -> None:
    first = ports.choose(["a", "b", "c"], known={})
    assert len(set(first.values())) == 3
    assert all(ports.FIRST <= port < ports.LAST for port in first.values())
    assert ports.choose(["a", "b", "c"], known=first) == first


def test_a_port_that_a_killed_part_still_holds_for_a_moment_is_kept() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    dying = threading.Timer(0.2, listener.close)
    dying.start()
    assert ports.choose(["a"], known={"a": port}) == {"a": port}
    dying.join()


def test_a_port_that_somebody_else_took_is_replaced(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "DYING_SECONDS", 0.1)
    chosen = ports.choose(["a"], known={"a": busy})
    assert chosen["a"] != busy


def test_a_port_that_our_running_part_holds_is_kept(busy: int) -> None:
    assert ports.choose(["a"], known={"a": busy}, in_use_by_us=["a"]) == {"a": busy}


def test_forgotten_names_are_dropped_and_new_ones_added() -> None:
    chosen = ports.choose(["new"], known={"old": 20_001})
    assert set(chosen) == {"new"}
