"""``stoker plan CONFIG``: the configuration's layout on this machine, or the planner's on any machine. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from launch import commands_plan_words as words
from launch.machine import choose_ranks, cores, cuda_devices
from parallel.planning.hardware.settings import launch_settings
from parallel.planning.hardware.this_machine import this_machine
from parallel.planning.plan import balanced_stages
from parallel.planning.search.judgement import Judgement
from parallel.planning.search.judgement import explain as judge
from parallel.planning.search.planner import Answer, search
from parallel.planning.search.problem import Problem
from parallel.planning.search.scored import Scored, remembering_time
from parallel.planning.timing.calibration import Calibration, load_calibration
from parallel.planning.topology import HardwareTopology, load_hardware
from parallel.planning.workload import Workload
from pretrain.config import ELEMENT_BYTES, RunConfig, load
from pretrain.config_sections import ParallelSection
from pretrain.forecast import execution_of, forecast
from pretrain.workload import workload_of
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.formats import stamp

FORMAT, VERSION = "plan-answer", 1
#: The machine one is on, where it has no GPU.
HERE = "cpu"
UNKNOWN = {"step_time_s": None, "memory_bytes": None}


@dataclass(frozen=True)
class Asked:
    """What a person typed. ``hardware`` None: this machine; ``explain``: a layout of their own."""

    config: str
    overrides: tuple[str, ...] = ()
    hardware: str | None = None
    gpus: int | None = None
    explain: str | None = None
    what_if: bool = False


def show(asked: Asked, html: Path | None = None, as_json: bool = False) -> None:
    """Print the answer: of the planner, where it is asked about another machine, for its judgement or its pictures;
    else of what the configuration says."""
    if asked.gpus is not None and asked.gpus < 1:
        raise Refusal(f"--gpus {asked.gpus}: a layout needs one device at least")
    config = load(asked.config, asked.overrides)
    if asked.hardware is None and asked.explain is None and not (asked.what_if or html):
        _show_here(config, asked.gpus, as_json)
        return
    planned = _plan(asked, config)
    if html is not None:
        try:
            write_atomic(html, words.page(planned))
        except OSError as error:
            raise Refusal(f"--html {html}: cannot be written ({error.strerror})") from None
        planned.notes.append(f"pictures are in {html}")
    typer.echo(_json(_planned(planned)) if as_json else words.planned(planned))


def _show_here(config: RunConfig, ranks: int | None, as_json: bool) -> None:
    """What is known of a run on this machine; what is not, prints as unknown (null in JSON)."""
    notes: list[str] = []
    plan = config.plan(choose_ranks(config, notes.append) if ranks is None else ranks, announce=notes.append)
    facts = _facts(config)
    predictions: dict[str, Any] = dict(UNKNOWN)
    known = None
    try:
        known = forecast(config, plan)
        predictions |= known.to_dict()
    except Refusal as unknown:
        notes.append(f"predictions are unknown: {unknown}")
    if as_json:
        typer.echo(
            _json(
                {
                    "format": stamp(FORMAT, VERSION),
                    "plan": plan.to_dict(),
                    **facts,
                    "predictions": predictions,
                    "notes": notes,
                }
            )
        )
        return
    devices = cuda_devices()
    machine = f"{cores()} cores, {f'{devices} CUDA devices' if devices else 'no CUDA device'}"
    lines = [
        f"{config.run.name} on {plan.world_size} ranks of this machine ({machine}), {config.run.dtype}",
        *notes,
        plan.explain(),
        *words.facts(facts, config.run.steps),
        *words.forecast(known),
    ]
    typer.echo("\n".join(lines))


@dataclass(frozen=True)
class Planned:
    """The planner's answer and all that follows from it. ``judged``: a layout of the user's own, or of the
    configuration; ``basis``: what the predictions stand on."""

    asked: Asked
    config: RunConfig
    workload: Workload
    answer: Answer
    judged: Judgement | None
    calibration: Calibration
    basis: str
    notes: list[str]

    @property
    def winner(self) -> Scored:
        return self.answer.winner

    @property
    def overrides(self) -> list[str]:
        """What makes the configuration run the winner's layout; nothing where the engine cannot."""
        if self.answer.beyond:
            return []
        plan, stated = self.winner.plan, self.config.parallel
        before = ParallelSection() if isinstance(stated, str) else stated
        named = {name: getattr(plan, name) for name in ParallelSection.model_fields if name != "stages"}
        told = [f"parallel.{name}={_yaml(value)}" for name, value in named.items() if value != getattr(before, name)]
        if before.stages or plan.stages != balanced_stages(plan.num_layers, plan.num_chunks):
            told.append(f"parallel.stages=[{','.join(str(len(chunk)) for chunk in plan.stages)}]")
        if isinstance(stated, str) and not told:
            told = [f"parallel.tp={plan.tp}"]  # any degree ends `parallel: auto`
        return [*told, f"train.micro_batch={plan.micro_batch}"]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plan(asked: Asked, config: RunConfig) -> Planned:
    topology, gpus, calibration, basis = _machine(asked, config)
    problem = Problem(
        _workload(config),
        config.train.global_batch,
        topology,
        gpus,
        dtype=config.run.dtype,
        execution=None if asked.what_if else execution_of(config),
        what_if=asked.what_if,
    )
    timed = remembering_time(calibration)
    own = asked.explain if asked.explain is not None else _own_layout(config)
    judged = judge(problem, own, timed) if own is not None else None
    # Where nothing fits, the search says what is missing.
    answer = judged.answer if judged and judged.answer else search(problem, timed)
    return Planned(asked, config, problem.workload, answer, judged, calibration, basis, [])


def _machine(asked: Asked, config: RunConfig) -> tuple[HardwareTopology, int, Calibration, str]:
    """Hardware, devices, constants, and what these stand on."""
    if asked.hardware in (None, HERE):
        gpus = asked.gpus or choose_ranks(config, lambda text: None)
        known = this_machine(gpus, config.run.dtype)
        return known.topology, gpus, known.calibration, known.basis
    topology = load_hardware(str(asked.hardware))
    if asked.gpus is None:
        usual = topology.domain.practice[0] if topology.domain.practice else topology.domain.size
        raise Refusal(f"--hardware {asked.hardware} needs --gpus: how many, such as --gpus {usual}")
    calibration = load_calibration()
    rows = calibration.provenance.get("rows")
    return topology, asked.gpus, calibration, f"fitted to {rows} published runs" if rows else "fitted to published runs"


def _own_layout(config: RunConfig) -> str | None:
    """The layout that a configuration states, as ``judge`` reads it; None for none but the defaults."""
    if isinstance(config.parallel, str):
        return None
    stated = config.parallel.model_dump(exclude={"stages"}, exclude_defaults=True)
    return ",".join(f"{name}={_yaml(value)}" for name, value in stated.items()) or None


def _workload(config: RunConfig) -> Workload:
    return workload_of(config.model_spec(), config.data.seq_len, ELEMENT_BYTES[config.run.dtype])


def _facts(config: RunConfig) -> dict[str, Any]:
    spec, counted = config.model_spec(), _workload(config)
    step_tokens = config.train.global_batch * config.data.seq_len
    return {
        "parameters": spec.num_parameters,
        "active_parameters": counted.active_parameters,
        "flops_per_token": counted.training_flops,
        "flops_per_step": counted.training_flops * step_tokens,
        "tokens_per_step": step_tokens,
        "tokens": step_tokens * config.run.steps,
    }


def _planned(planned: Planned) -> dict[str, Any]:
    """All of it as plain values; docs/planner.md says what each key is."""
    winner, problem, judged = planned.winner, planned.answer.problem, planned.judged
    step, memory, placement = winner.time, winner.memory, winner.placement
    settings = launch_settings(placement, winner.execution)
    return {
        "format": stamp(FORMAT, VERSION),
        "plan": winner.plan.to_dict(),
        **_facts(planned.config),
        "predictions": {
            "step_time_s": step.step_s,
            "step_time_low_s": step.low_s,
            "step_time_high_s": step.high_s,
            "parts_s": step.parts,
            "tokens_per_s": winner.tokens_per_s,
            "tokens_per_s_per_gpu": winner.tokens_per_s / winner.plan.world_size,
            "mfu": winner.mfu,
            "memory_bytes": memory.peak,
            "memory_upper_bytes": memory.upper,
            "basis": planned.basis,
        },
        "memory": {
            "usable_bytes": winner.topology.device.memory_bytes,
            "stages": [
                {
                    "pp": stage.pp,
                    "components": dict(stage.components),
                    "allocated": stage.allocated,
                    "device": stage.device,
                    "upper": stage.upper,
                }
                for stage in memory.stages
            ],
            "not_modelled": list(memory.not_modelled),
        },
        "hardware": {"name": winner.topology.name, "device": winner.topology.device.name, "gpus": problem.gpus},
        "answer": planned.answer.to_dict(),
        "judged": None if judged is None else _judged(judged),
        "placement": {
            "domains": placement.domains,
            "hosts": placement.hosts,
            "domain_ranks": placement.domain_ranks,
            "host_ranks": placement.host_ranks,
            "crossing": [axis for axis in words.axes(winner.plan) if placement.crossing(axis)],
        },
        "settings": {**asdict(settings), "slurm": settings.slurm()},
        "overrides": planned.overrides,
        "notes": planned.notes,
    }


def _judged(judged: Judgement) -> dict[str, Any]:
    scored = judged.scored.to_dict() if judged.scored else None
    return {"layout": judged.text, "verdict": judged.verdict, "fits": judged.fits, "scored": scored}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False)
