"""Which headers cross the router."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from finetune_router.headers import HeaderPolicy


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
