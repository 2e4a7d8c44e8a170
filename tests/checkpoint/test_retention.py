"""Which checkpoints stay: pruning, going back, and the link to the newest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from parallel.planning.layout import Layout
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import plan
from tests.checkpoint.whole import flip
from tests.checkpoint.world import on_ranks

COORDS = plan(1).coords(0)


def fill(root: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(root)
    for step in steps:
        store.save(step, {"w": (Layout((63,)), torch.arange(63) + step)}, {"step": step}, COORDS, attempt=1).wait()
    return store


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("six")
    fill(root, 10, 20, 30, 40, 50, 60)
    return root


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [60]), (2, None, [50, 60]), (1, 20, [20, 40, 60]), (2, 30, [30, 50, 60]), (9, None, None)],
)
def test_prune_keeps_the_last_and_every_so_many(
    keep_last: int, keep_every: int | None, left: list[int] | None, six: Path, tmp_path: Path
) -> None:
    shutil.copytree(six, tmp_path, symlinks=True, dirs_exist_ok=True)
    store = CheckpointStore(tmp_path)
    steps = store.steps()
    left = steps if left is None else left
    assert store.prune(keep_last, keep_every) == [step for step in steps if step not in left]
    assert store.steps() == left
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:08d}" for step in left]


def test_prune_deletes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    store = fill(tmp_path, 10, 20)
    flip(tmp_path / "step_00000020" / "data-00000.bin", 7)
    with pytest.raises(Refusal, match=r"nothing pruned: the newest checkpoint, step 20, is damaged: data-00000\.bin"):
        store.prune(keep_last=1)
    assert store.steps() == [10, 20]


def test_prune_refuses_to_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="keep_last=0"):
        fill(tmp_path, 10).prune(keep_last=0)


def test_prune_agrees_over_ranks(tmp_path: Path) -> None:
    fill(tmp_path, 10, 20, 30)
    assert on_ranks(tmp_path, 3, lambda store, rank: store.prune(keep_last=1))[0] == [[10, 20]] * 3
    assert CheckpointStore(tmp_path).steps() == [30]


def test_a_run_that_goes_back_does_not_resume_from_the_future_it_left(tmp_path: Path) -> None:
    store = fill(tmp_path, 10, 20, 30)
    assert store.abandon_after(10) == [20, 30]
    assert store.load(None, {"w": Layout((63,))}, COORDS)[1] == {"step": 10}
    fill(tmp_path, 20)
    assert store.abandon_after(10) == [20]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_00000010",
        "step_00000020.abandoned",
        "step_00000020.abandoned.2",
        "step_00000030.abandoned",
    ]


def test_latest_is_a_relative_link_to_the_newest_step(tmp_path: Path) -> None:
    store = fill(tmp_path, 10, 30, 20)
    assert os.readlink(tmp_path / "latest") == "step_00000030"
    store.abandon_after(20)
    assert os.readlink(tmp_path / "latest") == "step_00000020"
    assert store.latest() == 20


def test_an_empty_or_missing_folder_has_no_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert (store.steps(), store.latest()) == ([], None)
    with pytest.raises(Refusal, match="holds no checkpoint"):
        store.load(None, {}, COORDS)
    assert not (tmp_path / "none").exists()
