"""What the handlers make of watch events, called as Kopf calls them."""

from __future__ import annotations

from typing import Any

import kopf
import pytest

from finetune_operator import handlers
from finetune_operator.reconcile.queue import Key


@pytest.mark.parametrize(
    ("status", "is_untouched"),
    [
        (None, True),
        ({}, True),
        ({"observedGeneration": -1}, True),
        ({"observedGeneration": 1, "phase": "Pending"}, False),
        ({"phase": "Pending"}, False),
        ({"attempts": []}, False),
    ],
)
async def test_a_job_of_which_nothing_is_recorded_is_told_apart(status: Any, is_untouched: bool) -> None:
    told: list[tuple[Key, bool, bool]] = []

    def job_changed(key: Key, is_news: bool, *, is_untouched: bool = False) -> None:
        told.append((key, is_news, is_untouched))

    registry = handlers.build_registry(
        notice=lambda event_type, body: event_type == "ADDED",
        job_changed=job_changed,
        deployment_changed=lambda key: None,
        login=handlers.Login("https://10.0.0.1:443"),
    )
    (handler,) = [
        one for one in registry._watching.get_all_handlers() if one.id.endswith("finetunejob_changed")
    ]
    body = {"metadata": {"name": "job"}} | ({} if status is None else {"status": status})
    notified: Any = handler.fn
    await notified(event={"type": "ADDED", "object": body}, namespace="ns", name="job")
    assert told == [(("ns", "job"), True, is_untouched)]


async def test_a_pod_asks_no_dns_for_the_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    account = kopf.ConnectionInfo(server="https://kubernetes.default.svc", token="t")
    monkeypatch.setattr(kopf, "login_with_service_account", lambda **_: account)
    found = await handlers.Login("https://10.0.0.1:443").find()
    assert found is not None
    assert (found.server, found.token) == ("https://10.0.0.1:443", "t")
