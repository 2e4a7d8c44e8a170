"""Weights of transformers become a run's first checkpoint, train on, and go back bit for bit, by command."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.config import load
from pretrain.exchange import hf
from pretrain.rundir import committed_steps
from tests.launch import jobs
from tests.launch.tiny import tiny, trained
from tests.parity.pool import Pool

#: A short run of a model as qwen3_next has it.
OVERRIDES = [
    "run.steps=3",
    "model.attention.output_gate=true",
    "model.moe.bias_update_rate=null",
    "model.moe.shared_hidden=12",
    "model.moe.shared_gate=true",
]


def test_a_hugging_face_folder_goes_through_a_run_and_back(pool: Pool, tmp_path: Path) -> None:
    path = str(tiny(tmp_path))
    spec = load(path, OVERRIDES).model_spec()
    random = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(p.shape, generator=random, dtype=torch.float64) / 10
        for name, p in spec.parameters().items()
        if p.trained
    }
    hf.write(tmp_path / "theirs", spec, params)

    command = ["checkpoint", "import", path, str(tmp_path / "theirs")]
    assert pool.run(1, jobs.stoker, *command, *OVERRIDES, "model.dense.hidden=32") == [2], "another model is refused"
    assert not (tmp_path / "runs").exists()
    assert pool.run(1, jobs.stoker, *command, *OVERRIDES) == [0]
    run = tmp_path / "runs" / "tiny"
    assert committed_steps(run) == [0]
    assert pool.run(1, jobs.stoker, *command, *OVERRIDES) == [2], "a run that has begun is not begun again"

    out = tmp_path / "ours"
    assert pool.run(1, jobs.stoker, "checkpoint", "export", str(run), str(out), "--to", "hf") == [0]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", out))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)

    assert pool.run(2, jobs.run, path, OVERRIDES) == ["done", "done"]
    assert [(event.attempt, event.step) for event in trained(run)] == [(2, 0), (2, 1), (2, 2)]
