"""On one GPU: the trainer against itself on the CPU, and what it costs. `make gpu-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.engine.groups import create
from parallel.planning.plan import ParallelPlan
from pretrain.config import preset
from pretrain.config_sections import TrainSection
from pretrain.loop import train_step
from pretrain.spec import Attention, Dense, GatedDelta, LayerSpec, ModelSpec, MoE
from pretrain.trainer import Trainer
from tests.parity.batches import GLOBAL_BATCH, global_batch, part_of

pytestmark = pytest.mark.gpu

STEPS, SEQ_LEN = 50, 128
#: Largest relative difference of the loss from float32 on the CPU, at any of the 50 steps.
BANDS = {"float32": 1e-3, "bfloat16": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced_hybrid() -> ModelSpec:
    """`hybrid-1b` with four layers and a vocabulary that the synthetic batches fill."""
    spec = preset("hybrid-1b").model_spec()
    return replace(spec, layers=spec.layers[:4], vocab_size=4096, width=512)


def small_moe() -> ModelSpec:
    gated_delta = GatedDelta(num_qk_heads=2, num_v_heads=4, key_dim=64, value_dim=64)
    attention = Attention(num_heads=8, num_kv_heads=2, head_dim=64, rope_fraction=0.25, output_gate=True)
    experts = MoE(16, 2, 256, router="sigmoid", shared_hidden=256, balance_loss=1e-3, z_loss=1e-4)
    layers = (LayerSpec(gated_delta, Dense(1024)), LayerSpec(gated_delta, experts), LayerSpec(attention, experts))
    return ModelSpec(width=512, vocab_size=4096, layers=layers)


SPECS = {"hybrid-1b reduced": reduced_hybrid(), "small moe": small_moe()}


def curve(spec: ModelSpec, dtype: str) -> tuple[list[float], float]:
    """Losses of the run on this process's device, and tokens per second over its second half."""
    plan = ParallelPlan(1, GLOBAL_BATCH, 4, num_layers=len(spec.layers))
    trainer = Trainer(
        spec, create(plan), TrainSection(global_batch=GLOBAL_BATCH, micro_batch=4, lr=1e-3), dtype, seed=0
    )
    losses, started, tokens = [], 0.0, 0
    for step in range(STEPS):
        if step == STEPS // 2:
            started, tokens = time.perf_counter(), 0
        batch = part_of(global_batch(step, SEQ_LEN, spec.vocab_size), trainer.part)
        report, verdict = train_step(trainer, step, batch, GLOBAL_BATCH, 1e-3)
        assert verdict == "apply"
        losses.append(report.loss)
        tokens += report.tokens
    return losses, tokens / (time.perf_counter() - started)


def cpu_losses(name: str) -> list[float]:
    """The same run in float32 in a process that sees no GPU."""
    command = [sys.executable, "-m", "tests.pretrain.test_gpu", name]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=True)
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


@pytest.mark.parametrize("name", list(SPECS))
def test_a_gpu_run_stays_in_the_band_of_the_cpu(name: str) -> None:
    spec, reference = SPECS[name], np.array(cpu_losses(name))
    for dtype, bound in BANDS.items():
        torch.cuda.reset_peak_memory_stats()
        losses, speed = curve(spec, dtype)
        peak = torch.cuda.max_memory_allocated() / 2**30
        band = float(np.max(np.abs(np.array(losses) - reference) / np.abs(reference)))
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {name}, {spec.num_parameters:,} parameters, "
            f"{dtype}, experts on torch.nn.functional.grouped_mm; {speed:,.0f} tokens/s, peak memory {peak:.2f} GiB, "
            f"MFU {_mfu(spec, speed, dtype)}, largest relative difference of the loss {band:.1e} (band {bound:.0e})"
        )
        assert band < bound


def _mfu(spec: ModelSpec, tokens_per_s: float, dtype: str) -> str:
    """Model FLOPs of the run over the device's dense bfloat16 peak; unknown where the peak is not on record.

    H200 SXM: 989.4 TFLOP/s (NVIDIA H200 datasheet, 2024-11, without sparsity).
    """
    peak = {"NVIDIA H200": 989.4e12}.get(torch.cuda.get_device_name())
    if peak is None or dtype != "bfloat16":
        return "unknown"
    return f"{spec.workload(SEQ_LEN).training_flops * tokens_per_s / peak:.2%}"


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(json.dumps(curve(SPECS[sys.argv[1]], "float32")[0]))
