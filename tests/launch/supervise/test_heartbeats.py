"""A hang is told from a step that takes long, from the run's own past; and the guilty rank from those that wait."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.supervise import stacks
from launch.supervise.heartbeats import (
    AMOUNTS,
    FIRST,
    FIRST_S,
    KNOWN_AFTER,
    LEAST_LONG_S,
    LEAST_S,
    LONG_S,
    STARTING_S,
    UNKNOWN_S,
    Hanging,
    Patience,
    Silence,
    Standstill,
    guilty,
)
from pretrain.heartbeat import PHASES, RING, SIZE, VARIABLE, Beat, Heartbeat, Pulse
from tests.house.sources import HOME


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> int:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, SIZE)
    monkeypatch.setenv(VARIABLE, f"/proc/self/fd/{descriptor}")
    return descriptor


def test_a_beat_is_read_as_it_was_said_by_any_object_of_the_process(page: int) -> None:
    pulse, one, other = Pulse(page), Heartbeat.from_environment(), Heartbeat.from_environment()
    assert pulse.read() is None and one.step is None
    before = time.monotonic()
    one.at("load")
    other.at("compute", 17)
    beat = pulse.read()
    assert beat is not None and (beat.beats, beat.phase, beat.step) == (2, "compute", 17) and one.step == 17
    assert before <= beat.since <= time.monotonic() and beat.busy_s > 0
    assert pulse.ended("load") == 1 and pulse.ended("compute") == 0
    with pytest.raises(ValueError, match="lunch"):
        one.at("lunch")


def test_durations_are_handed_over_once_and_the_newest_are_kept(page: int) -> None:
    pulse, heart = Pulse(page), Heartbeat.from_environment()
    heart.at("compute", 0)
    time.sleep(0.02)
    heart.at("record", 0)
    ((number, took, work),) = pulse.new_durations()["compute"]
    assert number == 0 and 0.02 <= took < 5 and work == 0.0 and pulse.new_durations() == {}
    for step in range(3 * RING):
        heart.at("compute", step)
        heart.at("read", step)
    found = pulse.new_durations()
    numbers = [number for number, _, _ in found["compute"]]
    assert numbers == list(range(2 * RING + 1, 3 * RING + 1)) and pulse.ended("compute") == 3 * RING + 1
    assert set(found) <= set(PHASES)


def test_a_rank_says_how_much_work_a_step_is_and_each_phase_keeps_its_own(page: int) -> None:
    pulse, heart = Pulse(page), Heartbeat.from_environment()
    heart.at("read", 0)
    heart.works(3e9, 7)
    beat = pulse.read()
    assert beat is not None and (beat.beats, beat.phase, beat.step, beat.work, beat.setup) == (1, "read", 0, 3e9, 7)
    heart.at("compute", 0)
    heart.at("read", 1)
    heart.works(5e15, 7)
    heart.at("compute", 1)
    heart.at("record", 1)
    found = {phase: [work for _, _, work in took] for phase, took in pulse.new_durations().items()}
    assert found == {"read": [3e9, 5e15], "compute": [3e9, 5e15]}


def test_without_an_agent_a_beat_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    heart = Heartbeat.from_environment()
    heart.at("compute", 3)
    heart.works(1.0, 1)
    assert heart.step is None


def test_a_reader_never_meets_half_a_beat(page: int) -> None:
    pulse, heart, stop = Pulse(page), Heartbeat.from_environment(), threading.Event()

    def beat() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            heart.at("compute", step)

    heart.at("compute", 0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for _ in range(5000):
            found = pulse.read()
            assert found is not None and found.step == found.beats - 1
    finally:
        stop.set()
        thread.join()


def took(seconds: float, times: int = 1, work: float = 0.0, number: int = FIRST) -> list[tuple[int, float, float]]:
    """Phases that are not the first of an attempt, unless ``number`` says so."""
    return [(number, seconds, work)] * times


def warm() -> Patience:
    """One that knows first steps, of a quarter of a second."""
    patience = Patience()
    patience.learn({phase: took(0.25, number=0) for phase in PHASES})
    return patience


def test_patience_is_three_times_the_99th_percentile_and_three_seconds_at_least() -> None:
    patience = warm()
    assert patience.limit("compute", 99) == UNKNOWN_S and patience.limit("load", 0) == STARTING_S
    patience.learn({"compute": took(0.01, KNOWN_AFTER - 1)})
    assert patience.limit("compute", 99) == UNKNOWN_S, "too few say nothing yet"
    patience.learn({"compute": took(0.01)})
    assert patience.limit("compute", 99) == LEAST_S
    patience.learn({"compute": took(5.0, 99) + took(60.0)})
    assert patience.limit("compute", 99) == pytest.approx(15.0), "one of a hundred that took long does not count"
    assert patience.limit("save", 0) == LONG_S, "of a disk nothing is known"
    patience.learn({"save": took(5.0, 8)})
    assert patience.limit("save", 99) == LEAST_LONG_S
    assert patience.limit("compute", 0) == FIRST_S, "the first step of an attempt may take longer"
    told = Patience(hang_s=1.5)
    assert told.limit("compute", 0) == 1.5 and told.limit("start", 0) == STARTING_S


def test_a_first_step_that_compiles_may_take_as_long_after_a_restart_and_is_not_learnt_as_what_a_step_takes() -> None:
    patience = Patience()
    patience.learn({"compute": took(45.0, number=0) + took(5.0, number=1) + took(0.1, KNOWN_AFTER, work=1.0)})
    assert patience.limit("compute", FIRST, 1.0) == LEAST_S, "once it is warm a hang is noticed as soon as ever"
    assert patience.limit("compute", 0, 1.0) == patience.limit("compute", FIRST - 1, 1.0) == pytest.approx(135.0)
    assert patience.limit("compute", 99, 2.0) == pytest.approx(135.0), "other shapes are compiled anew"
    patience.learn({"compute": took(120.0, number=0, work=2.0)}, setup=8)
    assert patience.limit("compute", 0, 2.0) == pytest.approx(360.0), "more than what is given to the unknown"
    unaware = Patience()
    unaware.learn({"compute": took(0.1, 8)})
    assert unaware.limit("compute", 0) == unaware.limit("compute", 99, 2.0) == UNKNOWN_S, "no first step was seen"


@pytest.mark.parametrize("phase", ["read", "record"])
def test_files_may_stall_as_long_as_a_slow_step_takes_and_three_seconds_at_least(phase: str) -> None:
    patience = warm()
    patience.learn(
        {"read": took(0.5, 8, work=1.0), "compute": took(7.0, 8, work=1.0), "record": took(0.01, 8, work=1.0)}
    )
    assert patience.limit(phase, 99, 1.0) == pytest.approx(22.5)
    assert patience.limit("compute", 99, 1.0) == pytest.approx(21.0)
    quick = warm()
    quick.learn({name: took(0.01, 8, work=1.0) for name in ("read", "compute", "record")})
    assert quick.limit(phase, 99, 1.0) == LEAST_S
    quick.learn({phase: took(4.0, 8, work=1.0)})
    assert quick.limit(phase, 99, 1.0) >= 12.0, "and as long as they are known to"


def test_a_step_of_more_work_has_more_time_from_the_first_and_one_of_less_not_less() -> None:
    patience = warm()
    patience.learn({"compute": took(4.0, 100, work=1e15), "save": took(40.0, 8, work=1e15)})
    assert patience.limit("compute", 99, 1e15) == pytest.approx(12.0)
    assert patience.limit("compute", 99, 16e15) == pytest.approx(16 * 12.0)
    assert patience.limit("compute", 99, 0.1e15) == FIRST_S
    assert patience.limit("save", 99, 16e15) == pytest.approx(120.0), "a checkpoint is as large as before"
    patience.learn({"compute": took(70.0, KNOWN_AFTER, work=16e15)})
    assert patience.limit("compute", 99, 16e15) == pytest.approx(210.0), "known, and not guessed any more"
    patience.learn({"compute": took(0.5, KNOWN_AFTER, work=0.1e15)})
    assert patience.limit("compute", 99, 0.1e15) == LEAST_S, "and a hang is noticed as soon as ever"


def test_another_layout_or_configuration_is_learnt_anew_and_the_same_is_not() -> None:
    patience = Patience()
    patience.learn({"compute": took(0.1, 20, work=1.0)}, setup=5)
    patience.learn({"start": took(9.0)})  # the next attempt, which has not said yet what it is
    patience.learn({"read": took(0.1, work=1.0)}, setup=5)
    assert patience.limit("compute", 99, 1.0) == LEAST_S
    patience.learn({"read": took(0.1, work=1.0)}, setup=6)
    assert patience.limit("compute", 0, 1.0) == UNKNOWN_S


def test_a_batch_that_grows_with_every_step_is_followed_and_not_remembered_for_ever() -> None:
    patience = warm()
    patience.learn({"compute": took(10.0, 50, work=100.0)})
    for work in range(101, 1000):
        assert patience.limit("compute", 99, work) == pytest.approx(max(FIRST_S, 0.3 * work)), "by what is known"
        patience.learn({"compute": took(0.1 * work, work=work)})
    assert len(patience._seen["compute"]) == AMOUNTS


def curriculum() -> list[tuple[float, float]]:
    """Seconds and work of steps: longer windows (attention costs the square), a longer batch, and back again."""
    chance, steps = random.Random(3), []
    for windows, length in ((64, 512), (64, 8192), (256, 8192), (16, 1024), (64, 512)):
        work = windows * length * (1.0 + length / 4096)
        for step in range(2000):
            seconds = (0.2 + 1e-5 * work) * math.exp(chance.gauss(0, 0.25)) + (1.0 if step % 100 == 99 else 0.0)
            steps.append((seconds, work))
    return steps


def test_ten_thousand_clean_steps_of_a_curriculum_raise_no_alarm() -> None:
    patience = Patience()
    for step, (seconds, work) in enumerate(curriculum()):
        assert seconds <= patience.limit("compute", step, work), f"step {step} took {seconds:.1f} s"
        patience.learn({"compute": [(step, seconds, work)]})
    assert patience.limit("compute", 99, curriculum()[-1][1]) < 10


def test_the_curriculum_would_be_a_hang_to_who_looks_at_seconds_alone() -> None:
    patience = Patience()
    steps = curriculum()[:2001]
    patience.learn({"compute": [(step, seconds, 0.0) for step, (seconds, _) in enumerate(steps[:2000])]})
    assert steps[-1][0] > patience.limit("compute", 99)


def test_time_in_which_the_agent_itself_was_not_running_is_no_silence_of_a_rank() -> None:
    silence, beat = Silence(), Beat(3, "compute", 1, 0.0, 0.0)
    assert silence.look(beat, 0.2) == 0
    assert silence.look(beat, 0.2) == pytest.approx(0.2)
    assert silence.look(beat, 3600.0) == pytest.approx(0.7)
    assert silence.look(Beat(4, "record", 1, 0.0, 0.0), 0.2) == 0


def test_a_process_is_stopped_when_it_was_found_so_twice_over_half_a_second() -> None:
    still = Standstill()
    assert [still.look(stopped, now) for stopped, now in ((True, 0.0), (True, 0.3), (True, 0.5))] == [
        False,
        False,
        True,
    ]
    assert not still.look(False, 0.6) and not still.look(True, 9.0)


def test_the_guilty_one_has_the_least_beats_and_does_not_wait() -> None:
    def rank(number: int, beats: int, waiting: bool) -> Hanging:
        return Hanging(number, Beat(beats, "compute", 1, 0.0, 0.0), 5.0, 3.0, waiting)

    assert guilty([rank(0, 9, False), rank(1, 8, True)]).rank == 1
    assert guilty([rank(0, 9, True), rank(1, 9, False), rank(2, 9, True)]).rank == 1


PROGRAM = """
import faulthandler, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def sums(): time.sleep(0)
def all_reduce(): faulthandler.dump_traceback(sys.stdout.fileno())
def {name}(): all_reduce()
{name}()
"""


def test_a_stack_says_what_the_main_thread_does_and_whether_it_waits_for_others(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(name="step"))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, cwd=HOME)
    found = stacks.frames(done.stdout)
    assert [function for _, _, function in found] == ["all_reduce", "step", "<module>"]
    assert stacks.waiting(found), "step calls all_reduce"
    assert stacks.place(found) == f"all_reduce ({path}:5)"
    assert not stacks.waiting([(str(path), 4, "sums"), (str(path), 3, "<module>")])
    assert stacks.waiting([("/x/torch/distributed/distributed_c10d.py", 1, "wait")])
    assert stacks.frames("") == [] and stacks.place([]) == "" and stacks.read(tmp_path / "nowhere") == []
