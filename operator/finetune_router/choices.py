"""Which arm a request goes to: pins first, then the draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from finetune_operator.api.routes import REVISION_HEADER, Arm
from finetune_router import assignment, errors
from finetune_router.assignment import Draw
from finetune_router.tables import Leg, Route


class Choice(NamedTuple):
    """An arm, and how it was chosen."""

    arm: Arm
    leg: Leg
    draw: Draw | None
    """None for a request that a pin put there: it is part of no comparison."""
    pin_missed: bool = False
    """The client named a revision that is not served any more."""


def choose(route: Route, headers: Mapping[str, str], texts: Mapping[str, str], api_key: str) -> Choice:
    """The arm of a request. Raises ApiError (503) when the route has no revision ready."""
    stable, candidate = route.stable, route.candidate
    if stable is None:
        raise errors.not_ready(route.alias)
    if route.is_base:
        return Choice(Arm.STABLE, stable, None)
    wanted = headers.get(REVISION_HEADER)
    if wanted:
        if wanted == stable.revision:
            return Choice(Arm.STABLE, stable, None)
        if candidate is not None and wanted == candidate.revision:
            return Choice(Arm.CANDIDATE, candidate, None)
    for pin in route.pins:
        if all(headers.get(name) == exact for name, exact in pin.headers):
            if pin.arm is Arm.CANDIDATE and candidate is not None:
                return Choice(Arm.CANDIDATE, candidate, None)
            return Choice(Arm.STABLE, stable, None)
    key = assignment.find_key(route.keys, headers, texts, api_key) if route.sticky else None
    drawn = assignment.draw_at_random() if key is None else assignment.draw(route.salt, key)
    if candidate is not None and assignment.is_candidate(drawn.place, route.weight):
        return Choice(Arm.CANDIDATE, candidate, drawn, pin_missed=bool(wanted))
    return Choice(Arm.STABLE, stable, drawn, pin_missed=bool(wanted))
