"""API keys, as people write them into a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_router.credentials import ApiKeys, bearer_token, hash_key


def test_the_first_key_counts_in_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """PowerShell and Notepad write one."""
    file = tmp_path / "keys"
    file.write_text("sk-first\r\nsk-é\r\n", encoding="utf-8-sig")
    keys = ApiKeys(file)
    keys.reload()
    assert all(keys.admits(hash_key(key)) for key in ("sk-first", "sk-é"))


def test_comments_hashes_and_lines_that_are_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nsk-first\nsha256:{hash_key('sk-hidden').upper()}\n")
    keys = ApiKeys(file)
    keys.reload()
    assert [keys.admits(hash_key(key)) for key in ("sk-first", "sk-hidden", "# ours", "")] == [
        True,
        True,
        False,
        False,
    ]
    file.write_text("sk-other\nsha256:12\n")
    with pytest.raises(ValueError, match=r"keys, line 2: `sha256:` must be followed by 64 hexadecimal"):
        keys.reload()
    assert keys.admits(hash_key("sk-first")), "the former keys stay"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, ""),
        ("", ""),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", ""),
        ("abc", ""),
    ],
)
def test_only_a_bearer_token_is_one(header: str | None, token: str) -> None:
    assert bearer_token(header) == token
