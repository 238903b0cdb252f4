"""Ports stay what they were, and never collide."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from finetune_local import ports
from finetune_local.errors import LocalClusterError


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_known_ports_are_kept_and_all_differ() -> None:
    first = ports.choose(["a", "b", "c"], known={})
    assert len(set(first.values())) == 3
    assert all(port in ports.allowed() for port in first.values())
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


def test_ports_come_from_the_range_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LOCAL_PORTS", "31990-31992")
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    assert sorted(ports.pick(3)) == [31990, 31991, 31992]
    with pytest.raises(LocalClusterError, match=r"no free port on .* between 31990 and 31992"):
        ports.pick(4)


@pytest.mark.parametrize("text", ["many", "31992-31990", "0-10", "20000-70000", "20000", "-1-5"])
def test_a_range_that_is_none_is_refused_with_an_example(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FINETUNE_LOCAL_PORTS", text)
    with pytest.raises(LocalClusterError, match=f"FINETUNE_LOCAL_PORTS is '{text}'"):
        ports.pick(1)


def test_a_port_is_not_handed_out_twice_before_anything_listens_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINETUNE_LOCAL_PORTS", "31900-31939")
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    monkeypatch.setattr(ports, "_picked", set())
    assert sorted(ports.pick(20) + ports.pick(20)) == list(range(31900, 31940))
    assert ports.pick(1)  # there is no other
