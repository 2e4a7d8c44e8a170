"""``stoker checkpoint`` on a run whose checkpoints are whole, damaged, set aside, and not checkpoints at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.planning.layout import Layout
from pretrain.checkpoint import folders
from pretrain.checkpoint.store import ALONE, CheckpointStore
from tests.checkpoint.whole import flip
from tests.launch.test_cli import stoker


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 to 4 of a run; 2 was set aside, 3 has lost COMMIT, 4 has a damaged manifest."""
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 4):
        tensors = {name: (Layout((65,)), torch.full((65,), float(step))) for name in ("head", "optim.exp_avg/head")}
        CheckpointStore(root).save(step, tensors | {"same": (Layout((3,)), torch.ones(3))}, {}, ALONE, 1).wait()
    folders.set_aside(root, 2, "quarantined")
    (root / "step_00000003" / "COMMIT").unlink()
    flip(root / "step_00000004" / "manifest.json", 20)
    return root


def test_verify_looks_at_every_folder_and_ends_with_1(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("checkpoint", "verify", root.parent) == 1
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert lines[:2] == ["step 1: whole", "step 3: COMMIT: missing"]
    assert lines[2].startswith("step 4: manifest.json: ")
    assert lines[3:] == ["step_00000002.quarantined: set aside as damaged"]
    assert "damaged: 3 of the checkpoints" in said.err
    assert stoker("checkpoint", "verify", root / "step_00000001") == 0
    assert stoker("checkpoint", "verify", root / "step_00000003") == 1


def test_verify_finds_what_is_left_of_a_run_without_a_whole_checkpoint(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders.remove(root, 1)
    (root / "step_00000004" / "COMMIT").unlink()
    assert stoker("checkpoint", "verify", root.parent) == 1
    assert "step 4: COMMIT: missing" in capfd.readouterr().out
    assert stoker("checkpoint", "diff", root.parent, root.parent) == 2


def test_ls_goes_on_behind_a_damaged_checkpoint(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("checkpoint", "ls", root.parent) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [("damaged" in line) for line in lines] == [False, True, True, True]
    assert "3 tensors" in lines[0] and "COMMIT" in lines[1] and "manifest.json" in lines[2] and "step_0" in lines[3]


@pytest.mark.parametrize("name", ["step_final", "step_00000002", "step_00000002.quarantined", "step_1", "step_"])
def test_a_folder_that_is_no_step_is_refused_and_never_taken_for_another(
    name: str, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "step_00000002.quarantined":  # the step was saved again since
        tensors = {"head": (Layout((65,)), torch.zeros(65))}
        CheckpointStore(root).save(2, tensors, {}, ALONE, 1).wait()
    assert stoker("checkpoint", "verify", root / name) == 2
    said = capfd.readouterr()
    assert said.err.startswith("refused: ") and said.err.count("\n") == 1 and not said.out


def test_a_step_is_named_once(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("checkpoint", "verify", root / "step_00000001", "--step", 1) == 2
    assert "leave out --step" in capfd.readouterr().err
    assert stoker("checkpoint", "verify", root.parent, "--step", 1) == 0


def test_diff_says_what_it_has_not_read(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = {name: (Layout((65,)), torch.full((65,), 3.0)) for name in ("head", "optim.exp_avg/head")}
    CheckpointStore(root).save(5, tensors | {"same": (Layout((3,)), torch.ones(3))}, {}, ALONE, 1).wait()
    assert stoker("checkpoint", "diff", root / "step_00000001", root / "step_00000005") == 0
    assert capfd.readouterr().out.splitlines() == [
        "head: max |difference| 2, over max |value| 2",
        "optim.exp_avg/head: max |difference| 2, over max |value| 2",
        "1 of 3 tensors are equal by checksum",
    ]
