"""``stoker bench train``: a training step of Stoker against its peers, on this machine, in one run, as ratios.

Peers, all on the same synthetic tokens, float32, one thread a process:

- transformers' Qwen3-Next of the same configuration (its torch fallback), forward, backward and fused AdamW;
- a plain torch loop over Stoker's own modules, without its engine: what buffers, schedule, reports and verdicts cost.

Then data-parallel weak scaling: two ranks of one thread, each with the batch that one rank had.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dataio.types import Batch
from parallel.engine.groups import create
from parallel.planning.plan import ParallelPlan
from pretrain.config_sections import OptimizerSection, TrainSection
from pretrain.loop import train_step
from pretrain.objective import Normalisers
from pretrain.restore import alone
from pretrain.spec import Attention, GatedDelta, LayerSpec, ModelSpec, MoE
from pretrain.trainer import Trainer

#: Windows and tokens of a step on one rank.
WINDOWS, SEQ_LEN = 4, 512
LR = 1e-3


def model() -> ModelSpec:
    """A small Qwen3-Next: three gated delta layers and one of attention, a mixture of experts in each."""
    gated_delta = GatedDelta(num_qk_heads=4, num_v_heads=8, key_dim=64, value_dim=64)
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=64, rope_fraction=0.25, output_gate=True)
    experts = MoE(8, 2, 192, bias_update_rate=None, shared_hidden=192, shared_gate=True)
    layers = (*(LayerSpec(gated_delta, experts),) * 3, LayerSpec(attention, experts))
    return ModelSpec(width=256, vocab_size=2048, layers=layers)


def batch(windows: int) -> Batch:
    """Random tokens; a window is a document."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, model().vocab_size, (windows, SEQ_LEN + 1)).astype(np.int32)
    positions = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (windows, 1))
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((windows, SEQ_LEN), np.bool_),
        positions=positions,
        doc_index=np.zeros_like(positions),
        cu_seqlens=[np.arange(0, (windows + 1) * SEQ_LEN, SEQ_LEN, dtype=np.int32)],
        sample_id=np.arange(windows),
        source=np.zeros(windows, np.int16),
    )


def stoker_step(world_size: int = 1) -> Callable[[], float]:
    """A step of the trainer on this rank's share of ``world_size * WINDOWS`` windows."""
    spec, windows = model(), WINDOWS * world_size
    plan = ParallelPlan(world_size, windows, WINDOWS, num_layers=len(spec.layers))
    trainer = Trainer(spec, create(plan), TrainSection(global_batch=windows, lr=LR), "float32", seed=0)
    data = batch(WINDOWS)
    return lambda: train_step(trainer, 0, data, windows, LR)[0].loss


def plain_step() -> Callable[[], float]:
    """The same modules in a plain loop."""
    spec, data = model(), batch(WINDOWS)
    plan = ParallelPlan(1, WINDOWS, WINDOWS, num_layers=len(spec.layers))
    trainer = Trainer(spec, create(plan), TrainSection(global_batch=WINDOWS, lr=LR), "float32", seed=0)
    (chunk,) = trainer.chunks
    normalisers = Normalisers(WINDOWS * SEQ_LEN, WINDOWS * SEQ_LEN, WINDOWS)
    (micro_batch,) = trainer.micro_batches(data, normalisers)
    # The trainer's buffers take the gradients of the parameters they were made for: give the modules fresh ones.
    _renew_parameters(chunk)
    return _loop(chunk, lambda: chunk(micro_batch), after=chunk.take_statistics)


def transformers_step() -> Callable[[], float]:
    """transformers' Qwen3-Next with the same configuration."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    from pretrain.exchange.hf_config import hf_config

    torch.manual_seed(0)
    peer = Qwen3NextForCausalLM(Qwen3NextConfig(**hf_config(model()))).float().train()
    data = batch(WINDOWS)
    tokens, targets = (torch.from_numpy(array.astype(np.int64)) for array in (data.tokens, data.targets))

    def loss() -> torch.Tensor:
        logits = peer(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _loop(peer, loss)


def _renew_parameters(module: torch.nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(parameter.detach().clone()))


def _loop(
    module: torch.nn.Module, loss_of: Callable[[], torch.Tensor], after: Callable[[], Any] | None = None
) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=OptimizerSection().betas, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if after is not None:
            after()
        return float(loss.detach())

    return step


def interleaved(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each step; the candidates take turns, so that a noisy moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def weak_scaling(rounds: int) -> float:
    """Tokens per second of two ranks over those of one, one thread each; the two runs take turns."""
    ratios = []
    for _ in range(rounds):
        one, two = _ranks(1), _ranks(2)
        ratios.append(2 * one / two)
    return statistics.median(ratios)


def _ranks(world_size: int, steps: int = 6) -> float:
    """Median seconds of a step on ``world_size`` ranks, each with ``WINDOWS`` windows."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        answers = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(store, rank, world_size, steps, answers)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"a rank of the weak-scaling run ended with {[p.exitcode for p in ranks]}")
        return float(answers.get())


def _rank(store: str, rank: int, world_size: int, steps: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    (median,) = interleaved({"step": stoker_step(world_size)}, steps).values()
    if rank == 0:
        answers.put(median)
    dist.destroy_process_group()


def run(rounds: int = 7) -> list[dict[str, Any]]:
    """Rows ``{measurement, value, bound, unit, detail}``; a peer that is not installed is said so, not skipped."""
    torch.set_num_threads(1)
    alone(len(model().layers))
    steps = {"stoker": stoker_step(), "plain": plain_step()}
    versions = f"torch {torch.__version__}"
    try:
        steps["transformers"] = transformers_step()
        versions += f", transformers {metadata.version('transformers')}"
    except ImportError:
        versions += ", transformers not installed"
    seconds = interleaved(steps, rounds)
    tokens = WINDOWS * SEQ_LEN
    shape = f"{model().num_parameters:,} parameters, {WINDOWS} x {SEQ_LEN} tokens, float32, one thread; {versions}"
    rows = [
        _row("tokens/s", tokens / seconds["stoker"], None, "tokens/s", shape),
        _row("against a plain torch loop over the same modules", seconds["plain"] / seconds["stoker"], 0.9, "x", shape),
    ]
    if "transformers" in seconds:
        ratio = seconds["transformers"] / seconds["stoker"]
        rows.append(_row("against transformers' Qwen3-Next", ratio, 1.0, "x", shape))
    else:
        rows.append(_row("against transformers' Qwen3-Next", None, 1.0, "x", "not measured: not installed"))
    detail = "two ranks of one thread against one, each with the same batch"
    rows.append(_row("data-parallel weak scaling, 2 ranks", weak_scaling(3), 1.6, "x", detail))
    return rows


def _row(measurement: str, value: float | None, bound: float | None, unit: str, detail: str) -> dict[str, Any]:
    return {"measurement": measurement, "value": value, "bound": bound, "unit": unit, "detail": detail}


if __name__ == "__main__":
    for row in run():
        print(row)
