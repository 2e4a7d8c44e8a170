"""A run's figures in Prometheus' text exposition format, version 0.0.4 (prometheus.io/docs/instrumenting/
exposition_formats, read 2026-11): one scrape is one look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from launch.watch.record import Health, State, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = list[tuple[Mapping[str, str], float | None]]


def exposition(status: Status) -> str:
    """Every figure with its meaning and unit; one that is not known has no sample."""
    lines: list[str] = []
    for name, kind, meaning, samples in _families(status):
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels({'run': status.name, **labels})} {_value(value)}" for labels, value in known]
    return "\n".join(lines) + "\n"


def _families(status: Status) -> Iterator[tuple[str, str, str, Samples]]:
    def one(value: float | None) -> Samples:
        return [({}, value)]

    trained = bool(status.step)
    useful, found = status.useful, status.disk
    ages = [rank.age_s for rank in status.ranks if rank.age_s is not None]
    healths = {health: sum(rank.health is health for rank in status.ranks) for health in Health}
    yield "stoker_step", "gauge", "Steps done that stand.", one(status.step)
    yield "stoker_steps_planned", "gauge", "Length of the run in steps.", one(status.steps)
    yield "stoker_loss", "gauge", "Nats per valid target of the newest step.", one(status.loss)
    yield "stoker_grad_norm", "gauge", "Gradient norm of the newest step, before clipping.", one(status.grad_norm)
    yield "stoker_learning_rate", "gauge", "Learning rate of the newest step.", one(status.lr)
    yield "stoker_tokens", "gauge", "Tokens consumed by the steps that stand.", one(status.tokens)
    yield "stoker_tokens_per_second", "gauge", "Tokens a second of the newest step.", one(status.tokens_per_s)
    yield "stoker_step_time_seconds", "gauge", "Median time of the newest 32 steps.", one(status.step_time_s)
    yield "stoker_mfu_ratio", "gauge", "Model FLOPs utilisation of the newest step.", one(status.mfu)
    yield (
        "stoker_skipped_steps",
        "gauge",
        "Steps that stand and were not applied.",
        one(status.skipped if trained else 0),
    )
    yield "stoker_time_left_seconds", "gauge", "At the newest step time.", one(status.time_left_s)
    yield "stoker_attempt", "gauge", "Number of the newest attempt.", one(status.attempt)
    yield "stoker_restarts_total", "counter", "Launches after the first.", one(status.restarts)
    faults: Samples = [({"kind": kind}, count) for kind, count in sorted(status.faults.items())]
    yield "stoker_faults_total", "counter", "Attempts that ended in a fault, by kind.", faults
    yield "stoker_slow_ranks", "gauge", "Ranks that are slow now.", one(len(status.slow_ranks))
    by_health: Samples = [({"health": health.value}, count) for health, count in healths.items()]
    yield "stoker_ranks", "gauge", "Ranks by health.", by_health if status.ranks else []
    yield "stoker_oldest_heartbeat_seconds", "gauge", "Age of the oldest heartbeat.", one(max(ages, default=None))
    yield "stoker_useful_time_ratio", "gauge", "Share of the time in steps that stand.", one(useful.share)
    yield "stoker_useful_time_seconds", "gauge", "Time in steps that stand.", one(useful.useful_s)
    yield "stoker_redone_time_seconds", "gauge", "Time in steps that were done again.", one(useful.redone_s)
    yield "stoker_checkpoint_step", "gauge", "Newest committed checkpoint.", one(max(status.committed, default=None))
    yield "stoker_run_bytes", "gauge", "Size of the run directory.", one(found.run if found else None)
    yield "stoker_free_bytes", "gauge", "Room on its file system.", one(found.free if found else None)
    states: Samples = [({"state": state.value}, float(state is status.state)) for state in State]
    yield "stoker_state", "gauge", "1 for the state of the run, 0 for the others.", states


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _value(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)
