"""How ``stoker train`` ends: torchrun makes every failure 1, and the code and the line come from what is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.local import TORCHRUN_LOG, conclude
from launch.torchrun import Failure
from pretrain.attempt import Exit, ExitClass, read_exit, record_exit
from pretrain.rundir import attempt_path


@dataclass
class Ended:
    """What ``conclude`` asks of a torchrun that has ended."""

    failure: Failure | None
    report: str = "torchrun's forty lines\n"


CASES = {
    "done": (0, None, (ExitClass.DONE, "", None), 0, ""),
    "refused by all": (1, Failure(0, 2), (ExitClass.REFUSED, "no space", None), 2, ""),
    "refused before there was an attempt": (1, Failure(0, 2), None, 2, ""),
    "stopped": (1, Failure(0, 3), (ExitClass.STOPPED, "step 7: 11 steps", None), 3, "stopped: step 7: 11 steps\n"),
    "preempted": (1, Failure(1, 4), (ExitClass.PREEMPTED, "step 9 is saved", None), 4, "preempted: step 9 is saved\n"),
    "preempted, the other rank was hurried": (1, Failure(1, -15), (ExitClass.PREEMPTED, "saved", None), 4, "saved"),
    "fault of a rank": (1, Failure(1, 1), (ExitClass.FAULT, "KeyError: 'x'\nat y", 1), 1, "rank 1: KeyError: 'x' at y"),
    "killed, and the other rank says so": (
        1,
        Failure(1, -9),
        (ExitClass.FAULT, "Connection reset by peer", None),
        1,
        "fault: rank 1 was killed by SIGKILL; the same command goes on",
    ),
    "all killed": (1, Failure(0, -9), None, 1, "fault: rank 0 was killed by SIGKILL"),
    "torchrun itself": (1, None, None, 1, "fault: torchrun ended"),
    "a fault after the end": (1, Failure(0, -11), (ExitClass.DONE, "", None), 1, "rank 0 was killed by SIGSEGV"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exit_code_is_that_of_the_attempt_and_one_line_says_why(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, failure, ended, expected, says = CASES[case]
    attempt_path(tmp_path, 1).mkdir(parents=True)  # of an earlier launch: it ended well
    record_exit(attempt_path(tmp_path, 1), ExitClass.DONE)
    path = attempt_path(tmp_path, 2)
    if ended is not None:
        path.mkdir()
        record_exit(path, *ended)
    torchrun: Any = Ended(failure)
    assert conclude(tmp_path, 2, code, torchrun) == expected
    err = capfd.readouterr().err
    assert says in err and err.count("\n") == bool(says), err
    assert not path.exists() or (path / TORCHRUN_LOG).read_text() == torchrun.report


SAID = {
    "by nobody": (None, Exit(ExitClass.FAULT, "rank 1 was killed by SIGKILL", 1)),
    "by one that lost it": (
        Exit(ExitClass.FAULT, "another rank is gone (reset)", None),
        Exit(ExitClass.FAULT, "rank 1 was killed by SIGKILL", 1),
    ),
    "by the guilty one": (Exit(ExitClass.FAULT, "KeyError", 0), Exit(ExitClass.FAULT, "KeyError", 0)),
    "as no fault": (Exit(ExitClass.PREEMPTED, "saved", None), Exit(ExitClass.PREEMPTED, "saved", None)),
}


@pytest.mark.parametrize("how", SAID)
def test_a_rank_that_was_killed_stands_in_exit_json_where_no_other_was_to_blame(how: str, tmp_path: Path) -> None:
    said, stands = SAID[how]
    path = attempt_path(tmp_path, 1)
    path.mkdir(parents=True)
    if said is not None:
        record_exit(path, said.exit_class, said.cause, said.rank)
    torchrun: Any = Ended(Failure(1, -9))
    conclude(tmp_path, 1, 1, torchrun)
    assert read_exit(path) == stands
    assert sorted(entry.name for entry in path.iterdir()) == ["exit.json", TORCHRUN_LOG]
