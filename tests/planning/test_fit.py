"""The fitter: it finds constants that made the runs, bears misprints, and leaves unseen classes at their priors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.planning.execution import Execution
from parallel.planning.models.mixers import attention
from parallel.planning.models.operations import Stream, assemble, layer, mlp
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.calibration import CONSTANTS, efficiencies, priors
from parallel.planning.timing.fit import Observed, Runs, fit
from parallel.planning.timing.step_time import steps_s
from parallel.planning.timing.work import WorkTable
from parallel.planning.topology import load_hardware

TRUTH = priors() | {"product": 0.58, "attention": 0.7, "memory": 0.33, "links": 0.82, "stack.fsdp": -0.3}


def observed(truth: dict[str, float], noise: float = 0.0, seed: int = 0) -> list[Observed]:
    """Runs of several widths, lengths and layouts on two machines, as constants ``truth`` would make them."""
    rng, runs = np.random.default_rng(seed), []
    for hardware in ("h100", "a100-80gb"):
        topology = load_hardware(hardware)
        for stack in ("megatron", "fsdp"):
            for width in (1024, 2048, 4096):
                for seq_len in (1024, 8192, 65536):
                    stream = Stream(width, seq_len)
                    block = layer(stream, attention(stream, width // 128, width // 128, 128), mlp(stream, 4 * width))
                    workload = assemble(stream, 32000, (block,) * 8)
                    execution = Execution(stack=stack, generation=(2025, 6))  # type: ignore[arg-type]
                    zero = 3 if stack == "fsdp" else 1
                    for degrees in ({}, {"tp": 2, "sequence_parallel": True}):
                        plan = ParallelPlan(8, 32, 1, num_layers=8, zero=zero, **degrees)  # type: ignore[arg-type]
                        work = WorkTable(workload, execution, topology).step(plan)
                        step_s = float(steps_s(work, efficiencies(truth, topology, execution)))
                        runs.append(Observed(work, topology, execution, step_s * float(np.exp(noise * rng.normal()))))
    return runs


def test_runs_made_by_constants_are_explained_by_the_fit() -> None:
    runs = observed(TRUTH)
    found = fit(runs)
    assert np.abs(Runs(runs).errors(found)).max() < 0.03
    before = np.abs(Runs(runs).errors(priors()))
    assert np.median(before) > 5 * np.median(np.abs(Runs(runs).errors(found))), "the priors do not explain them"


def test_a_misprint_pulls_no_further_than_a_doubtful_run() -> None:
    runs = observed(TRUTH, noise=0.02, seed=3)
    spoiled = [replace(runs[0], step_s=runs[0].step_s * 10), *runs[1:]]
    clean, found = Runs(runs).errors(fit(runs)), Runs(runs).errors(fit(spoiled))
    assert np.median(np.abs(found)) < np.median(np.abs(clean)) + 0.01


def test_classes_without_runs_keep_their_priors() -> None:
    found = fit([run for run in observed(TRUTH) if run.execution.stack == "megatron"])
    prior = priors()
    for name in ("stack.fsdp", "precision.mxfp8", "product.blackwell", "experts", "routing", "real_routing"):
        assert found[name] == pytest.approx(prior[name], abs=1e-9)
    assert found["product"] < prior["product"]


def test_a_weight_of_zero_is_a_run_less() -> None:
    runs = observed(TRUTH, noise=0.05, seed=5)
    without = fit(runs[:-20])
    ignored = fit([*runs[:-20], *(replace(run, weight=0.0) for run in runs[-20:])])
    assert all(ignored[c.name] == pytest.approx(without[c.name], rel=1e-4, abs=1e-6) for c in CONSTANTS)
