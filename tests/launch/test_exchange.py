"""Weights of transformers become a run's first checkpoint, train on, and go back bit for bit, by command."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataio.types import TokenizerId
from launch.exchange import compare_tokenizer, fill, refuse_other_model
from parallel.planning.layout import Flat, Layout, Split
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import load
from pretrain.exchange import hf
from pretrain.rundir import committed_steps
from pretrain.spec import MoE
from stoker.errors import Refusal
from tests.checkpoint.state import part, plan
from tests.launch import jobs
from tests.launch.tiny import tiny, trained
from tests.parity.pool import Pool

#: Layers that transformers' family has.
QWEN3_NEXT = ("gated_delta/dense", "attention/moe")
#: A short run of a model as qwen3_next has it.
OVERRIDES = [
    "run.steps=3",
    "model.attention.output_gate=true",
    "model.moe.bias_update_rate=null",
    "model.moe.shared_hidden=12",
    "model.moe.shared_gate=true",
]


def test_a_hugging_face_folder_goes_through_a_run_and_back(pool: Pool, tmp_path: Path) -> None:
    path = str(tiny(tmp_path, QWEN3_NEXT))
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
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    assert pool.run(1, jobs.stoker, *command, *OVERRIDES) == [2], "another tokenizer is refused"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "theirs" / "tokenizer.json").unlink()
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


def test_masters_of_a_bfloat16_run_take_the_values_of_the_folder_unrounded(pool: Pool, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "run.dtype=bfloat16"]
    path = str(tiny(tmp_path, QWEN3_NEXT))
    spec = load(path, overrides).model_spec()
    random = torch.Generator().manual_seed(0)
    params = {name: torch.randn(p.shape, generator=random) for name, p in spec.parameters().items() if p.trained}
    hf.write(tmp_path / "theirs", spec, params)
    assert pool.run(1, jobs.stoker, "checkpoint", "import", path, str(tmp_path / "theirs"), *overrides) == [0]

    stored = dict(CheckpointStore(tmp_path / "runs" / "tiny" / "checkpoints").read(0))
    rounded = [name for name in params if stored[name].dtype == torch.bfloat16]
    assert "embed.weight" in rounded and "layers.1.ffn.experts.gate.weight" in rounded
    for name, values in params.items():
        assert torch.equal(stored[name], values.to(stored[name].dtype)), name
    for name in rounded:
        assert torch.equal(stored[f"optim.master/{name}"], params[name]), name
    assert any(not torch.equal(params[name], stored[name].float()) for name in rounded), "rounding changes something"


@pytest.mark.parametrize("split", ["whole", "flat", "heads"])
def test_a_rank_is_filled_with_its_part_by_its_layout(split: str) -> None:
    layout = {
        "whole": Layout((5, 3)),
        "flat": Layout((5, 3), flat=Flat("dp", 2, offset=4, shard=10)),
        "heads": Layout((5, 3), (Split(0, "tp", 2),)),
    }[split]
    values = torch.arange(15.0).reshape(5, 3)
    for rank in (0, 1):
        coords = plan(2, tp=2 if split == "heads" else 1).coords(rank)
        mine = torch.zeros(layout.local_shape(coords))
        fill(mine, layout, coords, values)
        assert torch.equal(mine, part(values, layout, coords)), rank


def test_a_tokenizer_that_is_not_the_stores_is_refused_and_its_absence_is_said(tmp_path: Path) -> None:
    ours = TokenizerId(hashlib.sha256(b"{}").hexdigest(), vocab_size=257, eos_id=256)
    assert "holds no tokenizer.json" in compare_tokenizer(tmp_path, ours)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert compare_tokenizer(tmp_path, ours) == ""
    (tmp_path / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(Refusal, match=r"tokenizer\.json .* is not the tokenizer of the stores"):
        compare_tokenizer(tmp_path, ours)


def test_a_configuration_without_router_biases_refuses_weights_that_were_trained_with_them(tmp_path: Path) -> None:
    with_biases, without = MoE(4, 2, 16), MoE(4, 2, 16, bias_update_rate=None)
    refuse_other_model(with_biases, without, tmp_path)
    with pytest.raises(Refusal, match="router biases"):
        refuse_other_model(without, with_biases, tmp_path)
