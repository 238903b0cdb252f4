"""What programs and people wrote, as a part of a sentence of ours."""

from __future__ import annotations

import re

LONGEST = 4000  # characters of a message in a status, which may quote what other programs said at any length
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # and all else that a terminal is told (ECMA-48, CSI)


def one_line(text: str) -> str:
    """The text in one line that no terminal and no reader of a log takes for more than text."""
    plain = _COLOURS.sub("", text)
    return " ".join("".join(one if one.isprintable() else " " for one in plain).split())
