"""What ranks hold alike is compared: a difference names tensor and rank, and is neither trained on nor saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from parallel.planning.plan import ParallelPlan
from pretrain.attempt import ExitClass, read_exit
from pretrain.guards import findings
from pretrain.guards.replicas import Mismatch
from pretrain.rundir import attempt_path, committed_steps
from pretrain.session import Session
from tests.launch.tiny import fixed, tiny
from tests.parity.jobs import step
from tests.parity.pool import Pool
from tests.parity.specs import DENSE, HYBRID, plan
from tests.pretrain.guards.faults import flip, make_trainer
from tests.pretrain.guards.jobs import run

LAYOUTS: dict[str, ParallelPlan] = {
    "dp2.zero0": plan(2),
    "dp2.zero1": plan(2, zero=1),
    "tp2.sp": plan(2, tp=2, sequence_parallel=True),
    "tp2": plan(2, tp=2),
    "ep2": plan(2, ep=2),
    "pp2": plan(2, pp=2),
    "dp3.zero1": plan(3, zero=1),
}


def clean(layout: dict[str, Any], dtype: str) -> list[str]:
    """Labels of what is compared, after steps that compare it each time and find nothing."""
    trainer = make_trainer(HYBRID, layout, dtype, hash_every=1)
    for index in range(3):
        assert step(trainer, index)[1] == "apply"
        trainer.twins.before_save(index + 1)
    return sorted({f"{label} {name}" for label, named in trainer.twins._fingerprints().items() for name in named})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicas_of_a_clean_run_agree_under_every_axis(layout: str, pool: Pool) -> None:
    compared = pool.run(LAYOUTS[layout].world_size, clean, LAYOUTS[layout].to_dict(), "float32")
    assert all(compared), "every axis makes some replicas"
    names = {line.split(" ", 1)[1] for line in compared[0]}
    assert ("embed.weight" in names) == (not layout.startswith("tp"))
    assert ("layers.0.ffn.experts.up.weight" in names) == layout.startswith(("dp", "tp"))
    assert any(name.startswith("optim.") for name in names) == (layout != "dp2.zero1" and layout != "dp3.zero1")
    if layout == "pp2":
        assert (
            compared[0] == compared[1] == ["all embed.weight", *(f"all {n}" for n in sorted(names - {"embed.weight"}))]
        )


def flipped(layout: dict[str, Any], dtype: str, rank: int, name: str, index: int) -> tuple[str, int | None, bool]:
    """A bit of a weight on one rank: what the comparison in the next step says, and whether that step moved nothing."""
    trainer = make_trainer(DENSE, layout, dtype, hash_every=2)
    assert [step(trainer, index)[1] for index in range(2)] == ["apply"] * 2
    before = trainer.optimizer.updates
    step(trainer, 2)
    if trainer.groups.rank == rank:
        flip(1, index)(trainer.parameters[name].data)
    try:
        step(trainer, 3)
    except Mismatch as mismatch:
        return str(mismatch), mismatch.finding.rank, trainer.optimizer.updates == before + 1
    return "", None, False


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_of_three_replicas_the_one_that_two_differ_from_is_named(guilty: int, pool: Pool) -> None:
    for text, rank, unmoved in pool.run(
        3, flipped, plan(3).to_dict(), "float32", guilty, "layers.1.ffn.up.weight", 100
    ):
        assert rank == guilty and unmoved
        assert f"replicas of layers.1.ffn.up.weight differ on rank {guilty}: the others agree" in text


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("index", [0, -1])
def test_of_two_replicas_the_one_that_differs_from_the_owners_master_is_named(
    guilty: int, index: int, pool: Pool
) -> None:
    """In bfloat16, whose masters are apart; the embedding's first element and its last belong to either rank."""
    for zero in (0, 1):
        layout = plan(2, zero=zero).to_dict()
        for text, rank, unmoved in pool.run(2, flipped, layout, "bfloat16", guilty, "embed.weight", index):
            assert rank == guilty and unmoved, text
            assert f"replicas of embed.weight differ on rank {guilty}: it differs from the owner's master" in text


def test_of_two_float32_replicas_nobody_is_blamed_without_evidence(pool: Pool) -> None:
    for text, rank, unmoved in pool.run(2, flipped, plan(2, zero=1).to_dict(), "float32", 1, "head.weight", 3):
        assert rank is None and unmoved
        assert "replicas of head.weight differ on ranks 0, 1, and nothing says which of them is right" in text


def test_a_weight_that_tensor_ranks_share_is_compared_between_them(pool: Pool) -> None:
    layout = plan(2, tp=2, sequence_parallel=True).to_dict()
    for text, _, unmoved in pool.run(2, flipped, layout, "float32", 1, "layers.1.mixer.norm.weight", 3):
        assert "layers.1.mixer.norm.weight" in text and unmoved


def saved_after_a_flip(source: str, overrides: list[str]) -> tuple[str, str]:
    real = Session.save

    def save(self: Session, done: int, must: bool = False) -> None:
        if done == 6 and dist.get_rank() == 1:
            flip(3)(self.trainer.parameters["layers.0.ffn.down.weight"].data)
        real(self, done, must)

    with patch.object(Session, "save", save):
        return run(source, overrides)


def test_a_state_that_disagrees_is_not_saved_and_the_run_goes_on_from_before(tmp_path: Path, pool: Pool) -> None:
    source = str(tiny(tmp_path, layers=["attention/dense"]))
    options = ["run.dtype=bfloat16", "run.steps=8"]
    for how, _ in pool.run(2, saved_after_a_flip, source, [*options, "run.name=flip"]):
        assert how.startswith("fault mismatch: replicas of layers.0.ffn.down.weight differ on rank 1")
    root = tmp_path / "runs/flip"
    assert committed_steps(root) == [3]
    ended = read_exit(attempt_path(root, 1))
    assert ended is not None and (ended.exit_class, ended.kind, ended.rank, ended.step) == (
        ExitClass.FAULT, "mismatch", 1, 5,
    )  # fmt: skip
    assert [(line["kind"], line["rank"]) for line in findings.read(root)] == [("mismatch", 1)]
    assert pool.run(2, run, source, [*options, "run.name=flip"]) == pool.run(
        2, run, source, [*options, "run.name=whole"]
    )
    assert fixed(root) == fixed(tmp_path / "runs/whole")
