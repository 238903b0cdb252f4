"""One router for the tests that only send requests; those that stop or starve one start their own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.router import engines
from tests.integration.router.engines import Engine
from tests.integration.router.routers import Router

_names = itertools.count(1)


@pytest.fixture(scope="session")
def shared_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    router = Router(
        tmp_path_factory.mktemp("router"), "--first-byte-timeout", "1", "--total-timeout", "4",
        "--silence-timeout", "1", "--connect-timeout", "1", "--max-body-bytes", "3000000", workers=2,
    )  # fmt: skip
    router.start()
    yield router
    assert router.stop() == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text(), router.log.read_text()


@pytest.fixture
def router(shared_router: Router) -> Router:
    return shared_router


@pytest.fixture
def own_router(tmp_path: Path) -> Iterator[Callable[..., Router]]:
    """Makes routers that belong to the test; their state folder is the test's."""
    made: list[Router] = []

    def make(*flags: str, workers: int = 1) -> Router:
        made.append(Router(tmp_path / "own", *flags, workers=workers))
        return made[-1]

    yield make
    for router in made:
        router.kill()


@pytest.fixture
def alias() -> str:
    """A name of the test's own, so that counters are."""
    return f"bot-{next(_names)}"


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with engines.running() as one:
        yield one


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as one:
        yield one
