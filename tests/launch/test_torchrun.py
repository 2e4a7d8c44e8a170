"""torchrun's forty lines never bury a rank's one, and ranks are chosen to fit layout and machine."""

from __future__ import annotations

import pytest

from launch import machine
from launch.torchrun import Failure, Sorter, command_line, failure
from pretrain.config import load

AGENT = "E1122 12:07:16.051000 18388 lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2)\n"
SUMMARY = """\
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
pretrain FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 18287)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_12:06:28
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 18288)
============================================================
"""
OF_A_RANK = """\
refused: rank 1: the disk is full
Traceback (most recent call last):
  File "pretrain/run.py", line 90, in _attempt
    1 / 0
ZeroDivisionError: division by zero
"""


def sort(text: str) -> tuple[str, str]:
    """(what is passed on, what is torchrun's own)"""
    sorter = Sorter()
    passed = "".join(sorter.take(line) for line in text.splitlines(keepends=True)) + sorter.rest()
    return passed, "".join(sorter.own)


@pytest.mark.parametrize(
    "text", [OF_A_RANK + AGENT + SUMMARY, AGENT + OF_A_RANK + SUMMARY, SUMMARY + AGENT + OF_A_RANK]
)
def test_a_rank_is_heard_and_torchrun_is_kept_apart(text: str) -> None:
    passed, own = sort(text)
    assert passed == OF_A_RANK
    assert sorted(own.splitlines()) == sorted((AGENT + SUMMARY).splitlines())


def test_two_tracebacks_in_each_other_are_passed_on_whole() -> None:
    lines = [line for pair in zip(OF_A_RANK.splitlines(True), OF_A_RANK.splitlines(True)) for line in pair]
    passed, own = sort("".join(lines))
    assert sorted(passed.splitlines()) == sorted(OF_A_RANK.splitlines() * 2) and not own


def test_a_traceback_that_is_cut_off_is_not_lost() -> None:
    cut = "".join(OF_A_RANK.splitlines(True)[:3])
    assert sort(cut) == (cut, "")


def test_the_rank_that_failed_first_is_told_from_those_that_followed() -> None:
    found = failure(sort(SUMMARY)[1])
    assert found == Failure(rank=1, exit_code=-9) and str(found) == "rank 1 was killed by SIGKILL"
    assert str(Failure(0, 3)) == "rank 0 ended with exit code 3"
    assert failure("") is None


def test_a_printed_command_can_be_pasted() -> None:
    assert command_line(["python", "run.allow_change=[train.lr]"], {"OMP_NUM_THREADS": "1"}) == (
        "OMP_NUM_THREADS=1 python 'run.allow_change=[train.lr]'"
    )


@pytest.mark.parametrize(
    ("overrides", "cores", "devices", "ranks"),
    [
        ([], 1, 0, 1),
        ([], 64, 0, 2),
        (["parallel.ep=3"], 2, 0, 3),
        (["parallel.pp=2", "parallel.tp=2", "parallel.ep=4", "parallel.sequence_parallel=true"], 2, 0, 8),
        ([], 64, 8, 8),
        (["parallel.tp=3", "parallel.sequence_parallel=true"], 64, 8, 6),
        (["parallel.ep=16"], 64, 8, 8),  # left to the plan, which refuses it by name
    ],
)
def test_ranks_fit_the_layout_and_the_machine(
    overrides: list[str], cores: int, devices: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "cuda_devices", lambda: devices)
    told: list[str] = []
    assert machine.choose_ranks(load("demo", overrides), told.append) == ranks
    assert bool(told) == (not devices and ranks > cores), "more ranks than cores is said"


def test_what_the_caller_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(machine, "cuda_devices", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.environment_for(load("demo"), 2) == {"OMP_NUM_THREADS": "3", **machine.KEEP_MEMORY}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.environment_for(load("demo"), 2) == machine.KEEP_MEMORY
