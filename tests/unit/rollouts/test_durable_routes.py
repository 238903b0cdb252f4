"""The durable copy of the routes, where the API server does not take it."""

from __future__ import annotations

from typing import Any, cast

from finetune_operator.adapters.api_errors import ApiError, UnavailableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.reconcile.durable_routes import Contents, DurableCopy


class RefusingKube:
    """An API server that refuses with `error` while there is one."""

    def __init__(self) -> None:
        self.error: ApiError | None = ApiError('namespaces "nowhere" not found')

    async def create(self, body: Any) -> Any:
        if self.error is not None:
            raise self.error
        return body | {"metadata": {"resourceVersion": "1"}}


async def test_what_is_refused_for_good_is_asked_for_less_and_less_often() -> None:
    kube = RefusingKube()
    copy = DurableCopy(cast("Kube", kube), "nowhere")

    async def pause() -> float | None:
        try:
            await copy.store(Contents())
        except ApiError as error:
            return copy.miss(error)
        return None

    assert [await pause() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert "nowhere" in (copy.problem or "")
    kube.error = UnavailableError("away")
    assert await pause() == 1, "it may be back at any moment"
    kube.error = None
    assert (await pause(), copy.problem) == (None, None)
    assert copy.miss(ApiError("again")) == 1
