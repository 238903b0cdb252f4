"""Which headers cross the router."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from finetune_router.headers import HeaderPolicy, answer_headers


def built(*headers: tuple[str, str], further: str = "") -> list[str]:
    lines = HeaderPolicy(further).build(CIMultiDictProxy(CIMultiDict(headers))).decode().split("\r\n")
    return sorted(line for line in lines if line)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("gzip, deflate, br, zstd", "gzip, deflate"),
        ("gzip;q=0.5, br;q=1.0, identity", "gzip;q=0.5, identity"),
        ("GZIP", "GZIP"),
        ("br", "identity"),
        ("*", "identity"),
        ("", "identity"),
        ("br, " * 100 + "gzip", "identity"),
    ],
)
@pytest.mark.parametrize("further", ["", "*", "accept-encoding"])
def test_engines_are_asked_only_for_encodings_that_can_be_read(asked: str, sent: str, further: str) -> None:
    assert built(("Accept-Encoding", asked), further=further) == [f"accept-encoding: {sent}"]


def test_several_lines_of_encodings_are_one_list() -> None:
    assert built(("Accept-Encoding", "br"), ("accept-encoding", "gzip")) == ["accept-encoding: gzip"]


def test_no_wish_is_no_header() -> None:
    assert built(("Accept", "*/*"), ("Cookie", "a=b")) == ["accept: */*"]


def test_an_engine_does_not_say_whose_answer_it_is() -> None:
    """It may be another router, and its stable revision this one's candidate."""
    own = [(b"x-adapter-arm", b"Stable"), (b"x-adapter-revision", b"base"), (b"x-adapter-fallback", b"true")]
    assert dict(answer_headers([*own, (b"x-adapter-key", b"k")])) == {"x-adapter-key": "k"}
