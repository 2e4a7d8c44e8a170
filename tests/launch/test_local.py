"""What ``stoker train`` says: the command by hand before, one line with the reason after; and what it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.local import by_hand, conclude, train
from launch.supervise import causes
from launch.supervise.causes import Cause, fault
from launch.supervise.policy import Decision
from pretrain.attempt import ExitClass
from pretrain.config import load
from pretrain.rundir import attempt_path
from stoker.errors import Refusal
from tests.launch.tiny import tiny

CASES = {
    "done": (causes.DONE, "", 0),
    "refused, which a rank has said": (Cause(ExitClass.REFUSED, "refused", "no space"), "", 2),
    "stopped": (Cause(ExitClass.STOPPED, "verdict", "step 7:\n11 steps"), "stopped: step 7: 11 steps\n", 3),
    "preempted": (causes.PREEMPTED, "preempted: asked to end\n", 4),
    "a rank's fault": (fault("signal", "rank 1 was killed", rank=1), "logs/0002/rank_00001.log)\n", 1),
    "nobody's fault": (fault("unknown", "the agent ended"), "fault: the agent ended (", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exit_code_is_that_of_the_cause_and_at_most_one_line_says_why(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cause, says, code = CASES[case]
    config = load(tiny(tmp_path))
    attempt_path(config.run_dir, 2).mkdir(parents=True)
    decision = Decision(False, cause, str(cause))
    conclude(config, decision)
    err = capfd.readouterr().err
    assert says in err and err.count("\n") == bool(says), err
    assert decision.code == code


def test_the_command_by_hand_can_be_pasted_and_holds_no_secret() -> None:
    arguments = ["demo", "run.allow_change=[train.lr]", "launch.webhook=https://hooks.example/canary"]
    shown = by_hand([*arguments, "data.tokenizer=https://me:canary@host/t"], 2, {"OMP_NUM_THREADS": "1"})
    assert shown.startswith(
        "OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m pretrain demo 'run.allow_change=[train.lr]'"
    )
    assert "canary" not in shown and "launch.webhook" in shown


def test_what_is_refused_starts_no_process_and_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.Agent", None)  # to start ranks would be a TypeError
    with pytest.raises(Refusal, match=r"run\.resume=3"):
        train(str(tiny(tmp_path)), ["run.resume=3"], 2)
    assert not (tmp_path / "runs").exists()
