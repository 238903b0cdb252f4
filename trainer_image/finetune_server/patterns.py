"""Which layers an adapter's regular expressions mean. They come from outside, and one may be matched for ever.

Python cannot break a match off, and nothing else in the process runs meanwhile. So what is more than a plain name is
matched in a process of its own, which can be killed: this file, run as a script.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

SECONDS = 10.0  # a hundred times what starting Python takes
_PLAIN = re.compile(r"[\w.]*")


class EndlessError(Exception):
    """The expressions were not matched within SECONDS."""


def first_matches(patterns: list[str], layers: list[str]) -> list[int | None]:
    """Returns for each layer the index of the first pattern that means it, as PEFT matches. Raises EndlessError."""
    if all(map(_PLAIN.fullmatch, patterns)):
        return _match(patterns, layers)
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps([patterns, layers]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise EndlessError from None
    return list(json.loads(done.stdout))


def compile_as_peft(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _match(patterns: list[str], layers: list[str]) -> list[int | None]:
    expressions = [compile_as_peft(pattern) for pattern in patterns]
    return [
        next((index for index, one in enumerate(expressions) if one.match(layer)), None) for layer in layers
    ]


if __name__ == "__main__":
    json.dump(_match(*json.load(sys.stdin)), sys.stdout)
