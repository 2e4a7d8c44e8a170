"""The fault matrix on real runs: after every fault the five oracles hold. How fast is `make faults`' business."""

from __future__ import annotations

import pytest

from tests.faults.bench import Bench
from tests.faults.matrix import NEEDS, ROWS, Case, lacking
from tests.house.sources import HOME

pytestmark = pytest.mark.timeout(900)


CASES = [
    pytest.param(case, id=f"{row.number} {case.name}", marks=() if case.quick else pytest.mark.verify)
    for row in ROWS
    for case in row.cases
]


@pytest.mark.parametrize("case", CASES)
def test_p5_after_a_fault_the_run_is_the_one_without(case: Case, bench: Bench) -> None:
    if (why := lacking(case)) is not None:
        pytest.skip(why)
    outcome = case.play(bench)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert set(outcome.oracles) == {"O1", "O2", "O3", "O4", "O5"}


def test_the_matrix_is_whole_and_what_it_names_is_there() -> None:
    assert [row.number for row in ROWS] == list(range(1, 27))
    for row in ROWS:
        assert row.cases or row.tests or row.not_yet, row
        assert all((HOME / path).exists() for path in row.tests), row
        assert all(need in NEEDS for case in row.cases for need in case.needs)
