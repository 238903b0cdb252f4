"""JSON that clients and engines send, read fast.

orjson takes a fifth of the time, but refuses what the standard library takes: NaN, lone surrogates, a byte order mark.
"""

from __future__ import annotations

import json
from typing import Any

import orjson


def read_json(data: bytes) -> Any:
    """What json.loads makes of UTF-8, but for integers of more than 64 bits, which may come as floats.

    Raises ValueError or RecursionError.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)
