"""Every case of the table ends as the table says, and the page about them is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.operator import edge_pages
from tests.unit.operator.edge_cases import EDGE_CASES, NEEDS, PROVOKED, EdgeCase


@pytest.mark.parametrize("case", EDGE_CASES, ids=[f"{case.id} {case.title}" for case in EDGE_CASES])
def test_what_kuberay_shows_becomes_what_it_must(case: EdgeCase) -> None:
    assert edge_pages.Play(case).outcome == case.expect


def test_no_case_is_missing() -> None:
    numbers = {int(case.id.rstrip("abcde")) for case in EDGE_CASES}
    assert numbers == set(range(1, 36))


@pytest.mark.parametrize(("case", "test"), PROVOKED.items())
def test_the_tests_that_provoke_a_case_exist(case: str, test: str) -> None:
    assert case in {known.id for known in EDGE_CASES}
    place, _, name = test.rpartition(".")
    folder, _, module = place.rpartition("/")
    file = Path(__file__).parents[2] / (folder or "integration") / f"{module or 'test_attempts'}.py"
    assert f"def {name}(" in file.read_text(encoding="utf-8")


def test_a_case_is_provoked_or_says_what_that_would_need() -> None:
    assert sorted([*PROVOKED, *NEEDS]) == sorted(case.id for case in EDGE_CASES)


def test_the_committed_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / edge_pages.FILE
    assert page.read_text(encoding="utf-8") == edge_pages.render_page(), "run `make crds`"
