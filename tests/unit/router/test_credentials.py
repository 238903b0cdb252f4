"""API keys, as people write them into a file."""

from __future__ import annotations

from pathlib import Path

from finetune_router.credentials import ApiKeys, hash_key


def test_the_first_key_counts_in_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """PowerShell and Notepad write one."""
    file = tmp_path / "keys"
    file.write_text("sk-first\r\nsk-é\r\n", encoding="utf-8-sig")
    keys = ApiKeys(file)
    keys.reload()
    assert all(keys.admits(hash_key(key)) for key in ("sk-first", "sk-é"))
