"""Signs of life from work that has no step: transfers, loading, evaluations.

The operator stops an attempt that has been silent for spec.deadlines.stallSeconds. So whoever moves bytes or rows says
so here after each piece: what hangs moves none, and is silent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_listener: Callable[[], None] | None = None


def beat() -> None:
    """Something was done just now. Costs nothing where nobody listens."""
    if _listener is not None:
        _listener()


def each(items: Iterable[T]) -> Iterator[T]:
    """The items, with a beat after the work on each."""
    for item in items:
        yield item
        beat()


@contextlib.contextmanager
def heard_by(listener: Callable[[], None]) -> Iterator[None]:
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def hook_bars(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For transformers' set_tqdm_hook: its progress bars, shown or not, are over the pieces of what it loads."""
    return factory(*(each(items) for items in args[:1]), *args[1:], **kwargs)
