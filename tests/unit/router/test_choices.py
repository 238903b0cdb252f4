"""Which arm a request goes to, and which of the arm's engines."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from finetune_operator.api.routes import Arm
from finetune_router import assignment, choices
from finetune_router.assignment import KeySource
from finetune_router.counters import ArmMetrics
from finetune_router.errors import ApiError
from finetune_router.tables import Leg, Pin, Route
from finetune_router.upstreams import Upstream, parse_address


def leg(revision: str, *engines: Upstream) -> Leg:
    metrics = ArmMetrics(("bot", revision, revision))
    return Leg(revision, revision.encode(), f"bot--{revision}", b'"bot"', engines, metrics, state=None)


PINS = (
    Pin((("x-team", "ml"), ("x-stage", "test")), Arm.CANDIDATE),
    Pin((("x-team", "billing"),), Arm.STABLE),
)
KEYS = (KeySource.parse("header:x-adapter-key"), KeySource.parse("body:user"), KeySource.parse("apiKey"))
ROUTE = Route(
    "bot", b"bot", leg("old"), leg("new"), weight=50, pins=PINS, salt=b"s\0", keys=tuple(k for k in KEYS if k)
)
BELOW, ABOVE = "user-0", "user-3"


def test_the_keys_of_these_tests_belong_to_different_arms() -> None:
    assert assignment.draw(b"s\0", BELOW).place < 0.5 <= assignment.draw(b"s\0", ABOVE).place


@pytest.mark.parametrize(
    ("headers", "route", "arm", "compared", "missed"),
    [
        ({"x-adapter-key": BELOW}, ROUTE, Arm.STABLE, True, False),
        ({"x-adapter-key": ABOVE}, ROUTE, Arm.CANDIDATE, True, False),
        ({"x-adapter-key": ABOVE}, replace(ROUTE, weight=0), Arm.STABLE, True, False),
        ({"x-adapter-key": BELOW}, replace(ROUTE, weight=100), Arm.CANDIDATE, True, False),
        ({"x-adapter-key": ABOVE}, replace(ROUTE, candidate=None), Arm.STABLE, True, False),
        ({"x-adapter-key": ABOVE}, replace(ROUTE, is_base=True), Arm.STABLE, False, False),
        # A pin by revision is before a pin by rule; one that is not served any more is told.
        ({"x-adapter-key": BELOW, "x-adapter-revision": "new"}, ROUTE, Arm.CANDIDATE, False, False),
        ({"x-adapter-key": ABOVE, "x-adapter-revision": "old"}, ROUTE, Arm.STABLE, False, False),
        ({"x-team": "billing", "x-adapter-revision": "new"}, ROUTE, Arm.CANDIDATE, False, False),
        ({"x-adapter-key": BELOW, "x-adapter-revision": "gone"}, ROUTE, Arm.STABLE, True, True),
        ({"x-adapter-key": ABOVE, "x-adapter-revision": "gone"}, ROUTE, Arm.CANDIDATE, True, True),
        (
            {"x-adapter-key": ABOVE, "x-adapter-revision": "new"},
            replace(ROUTE, candidate=None),
            Arm.STABLE,
            True,
            True,
        ),
        ({"x-adapter-key": BELOW, "x-team": "ml", "x-stage": "test"}, ROUTE, Arm.CANDIDATE, False, False),
        ({"x-adapter-key": ABOVE, "x-team": "billing"}, ROUTE, Arm.STABLE, False, False),
        ({"x-adapter-key": BELOW, "x-team": "ml"}, ROUTE, Arm.STABLE, True, False),
        (
            {"x-adapter-key": BELOW, "x-team": "ml", "x-stage": "test"},
            replace(ROUTE, candidate=None),
            Arm.STABLE,
            False,
            False,
        ),
    ],
)
def test_pins_come_first_then_the_place_of_the_key(
    headers: dict[str, str], route: Route, arm: Arm, compared: bool, missed: bool
) -> None:
    choice = choices.choose(route, headers, {}, "")
    assert (choice.arm, choice.draw is not None, choice.pin_missed) == (arm, compared, missed)
    assert choice.leg is (route.candidate if arm is Arm.CANDIDATE else route.stable)


def test_without_a_key_or_stickiness_each_request_is_drawn_anew() -> None:
    for route, headers in ((ROUTE, {}), (replace(ROUTE, sticky=False), {"x-adapter-key": ABOVE})):
        assert {choices.choose(route, headers, {}, "").arm for _ in range(99)} == {Arm.STABLE, Arm.CANDIDATE}
    assert {choices.choose(ROUTE, {}, {"user": ABOVE}, BELOW).arm for _ in range(99)} == {Arm.CANDIDATE}
    assert {choices.choose(ROUTE, {}, {}, BELOW).arm for _ in range(99)} == {Arm.STABLE}


def test_a_route_without_stable_answers_nobody() -> None:
    with pytest.raises(ApiError):
        choices.choose(replace(ROUTE, stable=None), {"x-adapter-revision": "new"}, {}, "")


def engines(*outstanding: int) -> list[Upstream]:
    found = [Upstream(parse_address(f"http://engine-{number}")) for number in range(len(outstanding))]
    for engine, count in zip(found, outstanding, strict=True):
        engine.outstanding = count
    return found


def test_the_engine_with_the_fewest_requests_is_taken_unless_it_is_down_or_was_tried() -> None:
    one, two, three = engines(5, 1, 3)
    arm = leg("old", one, two, three)
    assert arm.pick([]) is two
    assert arm.pick([two]) is three
    two.down_until = time.perf_counter() + 60
    assert arm.pick([]) is three
    assert arm.pick([three, one]) is two, "there is no other"
    one.down_until = three.down_until = two.down_until
    assert arm.pick([]) is two, "all are down"
    assert arm.pick([one, two, three]) is None
    assert leg("old", one).pick([]) is one
    assert leg("old", one).pick([one]) is None
    equal = engines(2, 2, 3)
    assert {id(leg("old", *equal).pick([])) for _ in range(99)} == {id(engine) for engine in equal[:2]}
