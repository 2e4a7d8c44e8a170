"""What a run directory holds, read for the report. No torch.

Whatever is missing or damaged becomes a sentence in ``Record.unreadable``: the report is also for runs that went wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataio.log import DataLog
from parallel.planning.plan import ParallelPlan
from pretrain import events
from pretrain.attempt import Exit, read_exit
from pretrain.checkpoint import folders
from pretrain.checkpoint.damage import Damaged
from pretrain.checkpoint.datafile import reading
from pretrain.checkpoint.dtypes import storage_dtype
from pretrain.checkpoint.manifest import COMMIT, MANIFEST, read_committed
from pretrain.config import RunConfig, parse
from pretrain.data import DATA_LOG
from pretrain.events import StepEvent
from pretrain.machine import Machine
from pretrain.rundir import CHECKPOINTS, CONFIG, FORMAT, PLAN, STAMP, VERSION, attempt_path, attempts
from stoker import formats
from stoker.errors import Refusal
from stoker.yaml_core import parse_yaml

T = TypeVar("T")

ENVIRONMENT, LOAD = "environment.json", ".ffn.router.load"


@dataclass(frozen=True)
class AttemptRecord:
    """One launch. ``environment`` is what it wrote of itself, its ``start``, ``packages`` and ``variables`` by name;
    ``exit`` is None if it did not say how it ended."""

    number: int
    environment: Mapping[str, Any]
    exit: Exit | None


@dataclass(frozen=True)
class Loads:
    """Tokens that each expert got in the steps [start, stop): int64 [experts], by layer index."""

    start: int
    stop: int
    by_layer: Mapping[int, NDArray[np.int64]]


@dataclass(frozen=True)
class Record:
    """Everything the report shows; None and empty where the run left nothing. ``machine``: what predictions are for."""

    name: str
    config: RunConfig | None
    config_text: str
    plan: ParallelPlan | None
    predictions: Mapping[str, Any]
    events: Sequence[StepEvent]
    attempts: Sequence[AttemptRecord]
    data_log: DataLog | None
    loads: Loads | None
    unreadable: Sequence[str]
    machine: Machine | None = None


def read_record(run_dir: Path) -> Record:
    """Raises Refusal where ``run_dir`` is no run directory, or one of a newer release."""
    try:
        stamp = json.loads((run_dir / STAMP).read_bytes())
    except (OSError, ValueError):
        raise Refusal(f"{run_dir} holds no readable {STAMP}: it is no run directory; give the path of one") from None
    formats.require(stamp, FORMAT, VERSION, run_dir / STAMP)
    unreadable: list[str] = []

    def tried(what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except FileNotFoundError:
            unreadable.append(f"{what}: not there")
        except (Refusal, Damaged, OSError, ValueError, KeyError, TypeError) as error:
            unreadable.append(f"{what}: {error}")
        return otherwise

    def text() -> str:
        return (run_dir / CONFIG).read_text(encoding="utf-8")

    def attempt(number: int) -> AttemptRecord:
        path = attempt_path(run_dir, number)
        nothing: dict[str, Any] = {}
        environment = tried(f"environment of attempt {number}", lambda: _environment(path / ENVIRONMENT), nothing)
        return AttemptRecord(number, environment, tried(f"end of attempt {number}", lambda: read_exit(path), None))

    config_text = tried(CONFIG, text, "")
    layout: dict[str, Any] = tried(PLAN, lambda: _object(run_dir / PLAN), {})
    return Record(
        name=run_dir.resolve().name,
        config=tried(CONFIG, lambda: parse(parse_yaml(config_text, CONFIG), CONFIG), None) if config_text else None,
        config_text=config_text,
        plan=tried(PLAN, lambda: ParallelPlan.from_dict(layout["plan"]), None) if layout else None,
        predictions=tried("predictions", lambda: dict(layout.get("predictions", {})), {}),
        events=tried("metrics", lambda: events.read(run_dir), []),
        attempts=[attempt(number) for number in attempts(run_dir)],
        data_log=tried(DATA_LOG, lambda: DataLog.open(run_dir / DATA_LOG), None),
        loads=tried("expert loads", lambda: read_loads(run_dir / CHECKPOINTS), None),
        unreadable=unreadable,
        machine=tried("machine", lambda: _machine(layout), None),
    )


def read_loads(root: Path) -> Loads | None:
    """What each expert got between the two newest checkpoints, or since the first step if there is one only; None
    without a checkpoint or without experts. Raises Damaged or Refusal for a checkpoint that is not whole.

    A checkpoint counts tokens from the first step on, so the difference of two is what lies between them.
    """
    steps = folders.committed(root)[-2:]
    if not steps:
        return None
    counted = [_counters(folders.path(root, step), step) for step in steps]
    newest = counted[-1]
    if len(steps) == 2 and newest.keys() == counted[0].keys():
        between = {layer: newest[layer] - counted[0][layer] for layer in newest}
        if all((loads >= 0).all() and loads.any() for loads in between.values()):
            return Loads(steps[0], steps[1], between) if between else None
    return Loads(0, steps[-1], newest) if newest else None


def _counters(folder: Path, step: int) -> dict[int, NDArray[np.int64]]:
    """Tokens per expert so far, by layer; every chunk's CRC is checked."""
    manifest = read_committed((folder / COMMIT).read_bytes(), (folder / MANIFEST).read_bytes(), step)
    found: dict[int, NDArray[np.int64]] = {}
    with reading(folder, manifest) as reader:
        for name, stored in manifest.tensors.items():
            if name.startswith("layers.") and name.endswith(LOAD):
                whole = np.concatenate([reader.chunk(name, number) for number in range(len(stored.chunks))])
                counts = whole.view(storage_dtype(stored.dtype))[: math.prod(stored.grid.shape)]
                found[int(name.split(".")[1])] = counts.astype(np.int64)
    return dict(sorted(found.items()))


def _machine(layout: Mapping[str, Any]) -> Machine | None:
    """What the predictions stand on; None of a run that did not keep it, as of earlier releases."""
    told = dict(layout.get("predictions", {})).get("machine")
    return None if told is None else Machine.from_dict(told)


def _environment(path: Path) -> dict[str, Any]:
    value = _object(path)
    return {**value, **{key: dict(value.get(key) or {}) for key in ("start", "packages", "variables")}}


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    formats.require(value, "plan" if path.name == PLAN else "environment", 1, path)
    return dict(value)
