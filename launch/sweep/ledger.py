"""The folder of a sweep, and ``sweep.json`` in it: which number is which run. No torch.

::

    runs/<name>/
      sweep.json                 the sweep as its file says it, and every run's number and overrides
      config.yaml                what the runs have in common
      0001-1f3a9c07/             a run directory: number, and hash of the overrides
      trials/0001.jsonl          when it was started, and how that ended
      logs/0001.log              what it said
      sweep.html                 ``stoker report``
      .measured                  what it has read, to be read once (``measured.py``)

A number is for ever: a run that the file no longer asks for keeps it, and new ones are appended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.sweep import definition
from launch.sweep.definition import Definition, argument
from pretrain.config import RunConfig
from pretrain.config import parse as parse_config
from pretrain.config_yaml import apply_overrides
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.yaml_core import dump_yaml, parse_yaml

FORMAT, VERSION = "sweep", 1
LEDGER, CONFIG, TRIALS, LOGS = "sweep.json", "config.yaml", "trials", "logs"


@dataclass(frozen=True)
class Facts:
    """What decides whether two runs can be compared. ``batch_tokens``: tokens of a step; ``data``: hash of what is read
    in which order, the seed apart; ``tokenizer``: SHA-256."""

    steps: int
    batch_tokens: int
    seed: int
    data: str
    tokenizer: str


@dataclass(frozen=True)
class Trial:
    """A run of a sweep: its number, from 1, and what it differs in."""

    number: int
    overrides: Mapping[str, Any]
    facts: Facts

    @property
    def name(self) -> str:
        """Of the run and of its directory."""
        return name_of(self.number, self.overrides)


@dataclass(frozen=True)
class Ledger:
    """A sweep with its runs. ``values``: what the runs' configurations have in common, before overrides; ``threads``:
    of each rank, the same for every run and whenever the sweep goes on, since sums depend on it in their last bit.
    """

    root: Path
    definition: Definition
    values: Mapping[str, Any]
    trials: tuple[Trial, ...]
    threads: int

    def run_dir(self, trial: Trial) -> Path:
        return self.root / trial.name

    def log(self, trial: Trial) -> Path:
        return self.root / LOGS / f"{trial.number:04d}.log"

    def history(self, trial: Trial) -> Path:
        return self.root / TRIALS / f"{trial.number:04d}.jsonl"

    def config(self, trial: Trial) -> RunConfig:
        return config_of(self.root, self.values, trial.number, trial.overrides)

    def arguments(self, trial: Trial) -> list[str]:
        """The run as ``python -m pretrain`` and ``stoker train`` take it, from the folder's own copy of the file."""
        return [str(self.root / CONFIG), *arguments(self.root, trial.number, trial.overrides)]

    def trial(self, number: int) -> Trial:
        if not 1 <= number <= len(self.trials):
            raise Refusal(f"{self.root} has runs 1 to {len(self.trials)}, and none with number {number}")
        return self.trials[number - 1]

    @cached_property
    def active(self) -> Sequence[Trial]:
        """The runs that the file asks for, by number."""
        asked = {canonical.dumps(point) for point in self.definition.points()}
        return [trial for trial in self.trials if canonical.dumps(dict(trial.overrides)) in asked]

    def write(self) -> None:
        for folder in (self.root, self.root / TRIALS, self.root / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": formats.stamp(FORMAT, VERSION),
            "definition": self.definition.model_dump(mode="json"),
            "threads": self.threads,
            "trials": [
                {"number": t.number, "name": t.name, "overrides": dict(t.overrides), "facts": vars(t.facts)}
                for t in self.trials
            ],
        }
        write_atomic(self.root / CONFIG, dump_yaml(self.values))
        write_atomic(self.root / LEDGER, json.dumps(content, indent=1) + "\n")


def read(root: Path) -> Ledger:
    """The ledger of a sweep's folder. Refuses one that is damaged, and one of a newer release."""
    path = root / LEDGER
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refusal(f"{root} holds no {LEDGER}: it is no sweep's folder; give the path of one") from None
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read ({error}): restore it from a copy") from None
    formats.require(content, FORMAT, VERSION, path)
    try:
        trials = tuple(Trial(t["number"], t["overrides"], Facts(**t["facts"])) for t in content["trials"])
        if [trial.number for trial in trials] != [*range(1, len(trials) + 1)]:
            raise ValueError("its numbers are not 1, 2, 3 and so on")
        values = parse_yaml((root / CONFIG).read_text(encoding="utf-8"), str(root / CONFIG))
        found = definition.parse(content["definition"], str(path))
        return Ledger(root, found, values, trials, int(content["threads"]))
    except Refusal:
        raise
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise Refusal(f"{path} is damaged ({error}): restore it from a copy") from None


def is_sweep(path: Path) -> bool:
    """``path`` is the folder of a sweep."""
    return (path / LEDGER).is_file()


def name_of(number: int, overrides: Mapping[str, Any]) -> str:
    return f"{number:04d}-{canonical.sha256(dict(overrides))[:8]}"


def arguments(root: Path, number: int, overrides: Mapping[str, Any]) -> list[str]:
    """The overrides of a run, and where it is kept, as ``section.key=value``."""
    own = {"run.dir": str(root), "run.name": name_of(number, overrides), "run.resume": "auto"}
    return [argument(key, value) for key, value in {**overrides, **own}.items()]


def config_of(root: Path, values: Mapping[str, Any], number: int, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run. Refuses what is wrong in it, and names the run by what it differs in."""
    try:
        return parse_config(apply_overrides(values, arguments(root, number, overrides)), str(root / CONFIG))
    except Refusal as refusal:
        raise Refusal(f"run {number} ({definition.words(overrides)}): {refusal}") from None
