"""P6: a run saved under one layout goes on under another, and the curve is the one it would have been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.events import StepEvent, deterministic
from tests.launch import jobs
from tests.launch.tiny import tiny, trained
from tests.parity.pool import Pool

LAYOUTS = {
    "one process": (1, []),
    "three processes": (3, []),
    "ep2": (2, ["parallel.ep=2"]),
    "tp2.pp2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "ep2.dp2": (4, ["parallel.ep=2"]),
}
#: Relative, as P4: float64, the layouts differ in the order of their sums only.
TOLERANCE = 1e-10


def check(pool: Pool, folder: Path, save_under: str, *resume_under: str) -> None:
    """Steps 0-3 under one layout and 4-7 under each of the others, against 8 steps of one process."""
    path = tiny(folder)

    def run(name: str, layout: str, *overrides: str) -> None:
        ranks, degrees = LAYOUTS[layout]
        ended = pool.run(ranks, jobs.run, str(path), [f"run.name={name}", *degrees, *overrides])
        assert set(ended) == {"done"}

    run("whole", "one process")
    expected = trained(folder / "runs" / "whole")
    for layout in resume_under:
        name = layout.replace(" ", "-")
        # The schedule ends with the run, so a shorter one must not change it: a decay of one step never begins.
        run(name, save_under, "run.steps=4", "train.schedule.decay_steps=1")
        run(name, layout, "run.allow_change=[run.steps]", "train.schedule.decay_steps=1")
        found = trained(folder / "runs" / name)
        assert [event.step for event in found] == list(range(8))
        assert {event.attempt for event in found[4:]} == {2}
        worst = max(
            abs(getattr(f, key) - getattr(e, key)) / abs(getattr(e, key))
            for f, e in zip(found, expected, strict=True)
            for key in ("loss", "grad_norm")
        )
        print(f"{save_under} -> {layout}: {worst:.1e} relative, bound {TOLERANCE:.0e}")
        assert worst < TOLERANCE
        assert [(f.valid_targets, f.tokens, f.draws) for f in found] == [
            (e.valid_targets, e.tokens, e.draws) for e in expected
        ], "no sample is lost or repeated"


def test_p6_saved_under_ep2_resumed_by_one_process(pool: Pool, tmp_path: Path) -> None:
    check(pool, tmp_path, "ep2", "one process")


@pytest.mark.verify
def test_p6_saved_under_tp2_pp2_resumed_under_other_layouts(pool: Pool, tmp_path: Path) -> None:
    check(pool, tmp_path, "tp2.pp2", "ep2.dp2", "one process", "three processes")


def test_checkpoints_of_two_layouts_are_compared_listed_verified_and_exported(
    pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    import zarr

    path = tiny(tmp_path)

    def stoker(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(str(ended.value.code)), capfd.readouterr().out

    for name, layout in (("a", "one process"), ("b", "ep2")):
        ranks, degrees = LAYOUTS[layout]
        pool.run(ranks, jobs.run, str(path), [f"run.name={name}", "run.steps=2", *degrees])
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    capfd.readouterr()

    code, told = stoker("checkpoint", "diff", a, a)
    assert code == 0 and len(told.splitlines()) == 1 and "equal by checksum" in told
    code, told = stoker("checkpoint", "diff", a, b)
    apart = [float(line.rsplit(" ", 1)[1]) for line in told.splitlines()[:-1] if line.startswith("layers.")]
    assert code == 0 and all(value < 1e-9 for value in apart), told

    code, told = stoker("checkpoint", "ls", b)
    assert code == 0 and "on 2 ranks" in told
    assert stoker("checkpoint", "verify", b)[0] == 0

    assert stoker("checkpoint", "export", b, tmp_path / "out.zarr", "--to", "zarr")[0] == 0
    group = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
    refs = zarr.open_group(
        "reference://", mode="r", storage_options={"fo": str(b / "checkpoints" / "latest" / "refs.json")}
    )
    for name in ("embed.weight", "layers.2.ffn.experts.gate.weight", "optim.exp_avg/head.weight"):
        np.testing.assert_array_equal(group[name][...], refs[name][...])

    data = next((b / "checkpoints" / "latest").resolve().glob("data-*.bin"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, told = stoker("checkpoint", "verify", b)
    assert code == 1 and data.name in told


@pytest.mark.parametrize("overrides", [("parallel.zero=0",), ("run.dtype=bfloat16",), ("run.dtype=float32",)], ids=str)
def test_p5_a_resume_on_the_same_layout_is_bit_equal(pool: Pool, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = tiny(tmp_path)

    def run(name: str, *more: str) -> list[StepEvent]:
        schedule = "train.schedule.decay_steps=1"
        assert set(pool.run(2, jobs.run, str(path), [f"run.name={name}", schedule, *overrides, *more])) == {"done"}
        return trained(tmp_path / "runs" / name)

    expected = run("whole")
    run("halves", "run.steps=4")
    found = run("halves", "run.allow_change=[run.steps]")
    assert {event.attempt for event in found[4:]} == {2}
    # The shorter run also evaluates at its own end.
    assert [deterministic(replace(event, aux={})) for event in found] == [
        deterministic(replace(event, aux={})) for event in expected
    ]
