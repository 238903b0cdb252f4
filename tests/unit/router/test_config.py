"""Options of the router: what no router could run with is refused by name."""

from __future__ import annotations

import pytest

from finetune_router.config import parse_config


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "99999", "is no port; they end at 65535"),  # the kernel would take it modulo 65536
        ("--admin-port", "-1", "is no port"),
        ("--workers", "0", "less than 1"),
        ("--feedback-days", "0", "less than 1"),
        ("--max-mirrors", "-1", "less than 0"),
        ("--total-timeout", "nan", "not a time above 0 seconds"),
        ("--connect-timeout", "0", "not a time above 0 seconds"),
        ("--silence-timeout", "inf", "not a time above 0 seconds"),
        ("--grace", "nan", "not a time of 0 seconds or more"),
        ("--drain-delay", "-1", "not a time of 0 seconds or more"),
        ("--log-level", "LOUD", "none of DEBUG, INFO, WARNING, ERROR"),
        ("--admin-host", "0.0.0.0", "--admin-token-file is needed"),
    ],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_what_no_router_could_run_with_is_refused_by_name(
    option: str, value: str, said: str, by_environment: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    variable = "FINETUNE_ROUTER_" + option[2:].upper().replace("-", "_")
    arguments = ["--state-dir=state"] if by_environment else ["--state-dir=state", f"{option}={value}"]
    with pytest.raises(SystemExit) as ended:
        parse_config(arguments, {variable: value} if by_environment else {})
    assert ended.value.code == 2
    refused = capsys.readouterr().err
    assert f"{option}: " in refused
    assert said in refused


def test_options_win_over_the_environment_and_that_over_defaults() -> None:
    environment = {"FINETUNE_ROUTER_PORT": "1", "FINETUNE_ROUTER_GRACE": "0"}
    config = parse_config(["--state-dir=state", "--port=2"], environment)
    assert (config.port, config.grace, config.workers) == (2, 0.0, 1)
