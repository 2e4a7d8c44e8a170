"""``stoker plan``: a configuration on this machine, in words or as JSON. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

from launch.machine import choose_ranks, cores, cuda_devices
from pretrain.config import ELEMENT_BYTES, load
from pretrain.workload import workload_of

UNKNOWN = "unknown: no planner is built yet"


def show(source: str, overrides: Sequence[str], ranks: int | None, as_json: bool) -> None:
    """Print what is known before a run; what is not, prints as unknown (null in JSON)."""
    config = load(source, overrides)
    notes: list[str] = []
    plan = config.plan(choose_ranks(config, notes.append) if ranks is None else ranks, announce=notes.append)
    spec = config.model_spec()
    workload = workload_of(spec, config.data.seq_len, ELEMENT_BYTES[config.run.dtype])
    step_tokens = plan.global_batch * config.data.seq_len
    known: dict[str, Any] = {
        "parameters": spec.num_parameters,
        "active_parameters": workload.active_parameters,
        "flops_per_token": workload.training_flops,
        "flops_per_step": workload.training_flops * step_tokens,
        "tokens_per_step": step_tokens,
        "tokens": step_tokens * config.run.steps,
    }
    if as_json:
        predictions = {"step_time_s": None, "memory_bytes": None}
        typer.echo(json.dumps({"plan": plan.to_dict(), **known, "predictions": predictions, "notes": notes}, indent=2))
        return
    devices = cuda_devices()
    machine = f"{cores()} cores, {f'{devices} CUDA devices' if devices else 'no CUDA device'}"
    lines = [
        f"{config.run.name} on {plan.world_size} ranks of this machine ({machine}), {config.run.dtype}",
        *notes,
        plan.explain(),
        f"parameters: {spec.num_parameters:,} ({workload.active_parameters:,} active for a token)",
        f"model FLOPs: {workload.training_flops:.3g} a token, forward and backward; "
        f"{known['flops_per_step']:.3g} a step of {step_tokens:,} tokens",
        f"run: {config.run.steps:,} steps, {known['tokens']:,} tokens",
        f"predicted time of a step: {UNKNOWN}",
        f"predicted memory of a rank: {UNKNOWN}",
    ]
    typer.echo("\n".join(lines))
