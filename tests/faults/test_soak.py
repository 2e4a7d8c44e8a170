"""What the soak deals and what it says; the soak itself is `make soak`."""

from __future__ import annotations

import random
from itertools import islice, pairwise
from statistics import median

import pytest

from pretrain import events
from tests.faults.bench import QUICK_STEPS, Bench
from tests.faults.soak import APART, Soaked, dealt, page
from tests.faults.strikes import NO_MEMORY, ONE_NODE, SEVERAL, Fault


@pytest.mark.parametrize("faults", [ONE_NODE, SEVERAL])
def test_every_fault_comes_as_often_as_any_other_and_memory_never_twice_in_a_row(faults: list[Fault]) -> None:
    rounds = 50
    names = [fault.name for fault in islice(dealt(faults, random.Random(3)), rounds * len(faults))]
    assert all(names.count(fault.name) == rounds for fault in faults)
    at = [index for index, name in enumerate(names) if name == NO_MEMORY]
    assert all(later - earlier >= APART for earlier, later in pairwise(at))
    assert len({tuple(names[i : i + len(faults)]) for i in range(0, len(names), len(faults))}) > rounds // 2


def test_useful_is_the_time_of_steps_that_stand_and_what_does_not_hold_fails(bench: Bench) -> None:
    run = bench.whole(2, QUICK_STEPS)
    took = [event.timing.step_time_s or 0.0 for event in events.read(run.root)]
    stood = sum(min(seconds, median(took)) for seconds in took)
    soaked = Soaked("A title", run, ONE_NODE, {"another": "no such device"}, seconds=stood / 0.75, wrong={"O1": []})
    assert not soaked.good, "nothing was tried"
    soaked.said["SIGKILL"] = 3
    assert soaked.useful == pytest.approx(0.75) and soaked.good
    assert "Useful: **0.750**" in page("a command", [soaked], {}) and "- O1: holds" in page("a command", [soaked], {})
    soaked.wrong["O1"] = ["step 3 differs"]
    assert not soaked.good and "- O1: step 3 differs" in page("a command", [soaked], {})
    soaked.wrong["O1"], soaked.seconds = [], stood / 0.65
    assert not soaked.good
    text = page("a command", [soaked], {"nodes": "no switch"})
    assert "not tried here, another: no such device" in text and "spare: not run, no switch" in text
