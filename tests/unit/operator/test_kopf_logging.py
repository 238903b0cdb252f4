"""What of Kopf's is told in the log."""

from __future__ import annotations

import logging

import pytest

from finetune_operator.kopf_logging import is_worth_a_line


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("kopf", logging.ERROR, "", 0, message, None, None)


def test_an_outage_of_an_hour_is_a_few_lines_for_each_watch() -> None:
    text = (
        "Request attempt #{}/370 failed; will retry: GET https://a/apis/x?a=50%25 -> ClientConnectorError()"
    )
    told = [number for number in range(1, 370) if is_worth_a_line(record(text.format(number)))]
    assert told == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    "message",
    [
        "Request attempt #370/370 failed; escalating: GET https://a -> TimeoutError()",
        "Request attempt #3/370 failed; SSL closed; will re-authenticate: GET https://a",
        "attempt 3 of job triage ended",
    ],
)
def test_all_else_is_told(message: str) -> None:
    assert is_worth_a_line(record(message))
