"""SWEEP.yaml: which runs there are, what is compared, and which of them need not be finished. No torch.

name: lr
config: demo
base: {run.steps: 80}
grid: {train.lr: [1e-3, 3e-3], train.schedule.kind: [wsd, cosine]}
seeds: 2
metric: heldout.code.nats_per_token
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from stoker import canonical
from stoker.errors import Refusal
from stoker.sections import Section, refusal
from stoker.yaml_core import parse_yaml

Overrides = Mapping[str, Any]
Count = Annotated[int, Field(ge=1)]

#: More runs than this are a slip of the pen.
MOST_RUNS = 100_000
SEED = "run.seed"
#: Keys that the sweep itself sets.
OWN_KEYS = ("run.name", "run.dir", "run.resume")
#: Measurements averaged for the metric where the file does not say: a step's loss is noisy, an evaluation is not.
STEPS_AVERAGED, EVALUATIONS_AVERAGED = 16, 1


class MetricSection(Section):
    name: Annotated[str, Field(min_length=1)] = "loss"
    """loss, or a measurement of the steps by name, such as heldout.code.nats_per_token."""
    mode: Literal["min", "max"] = "min"
    """min: the lowest is the best; max: the highest."""
    window: Count | None = None
    """Last measurements that are averaged; null: 16 steps, or 1 evaluation."""

    @property
    def heldout(self) -> bool:
        return self.name.startswith("heldout.")

    @property
    def averaged(self) -> int:
        return self.window or (EVALUATIONS_AVERAGED if self.heldout else STEPS_AVERAGED)

    def order(self, value: float | None) -> float:
        """What is sorted by, ascending: the best first, and what is not a number last."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value


class StopSection(Section):
    """Asynchronous successive halving (arXiv 1810.05934), in the form that stops runs: at rungs of ``first`` steps and
    ``factor`` times as many again, a run goes on only if it is among the best of those that came so far."""

    first: Count
    """Steps of the first rung."""
    factor: Annotated[int, Field(ge=2)] = 3
    """One in so many goes on, and the next rung is so many times as far."""

    def rungs(self, steps: int) -> list[int]:
        """Steps of the rungs of a run of ``steps``, ascending; its end is none.

        >>> StopSection(first=10, factor=3).rungs(100)
        [10, 30, 90]
        """
        found, rung = [], self.first
        while rung < steps:
            found.append(rung)
            rung *= self.factor
        return found


class Definition(Section):
    """A sweep as its file says it. Built by ``load``, which refuses with one message."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    """Name of the sweep and of its folder: letters, digits, dot, dash and underscore."""
    dir: Annotated[str, Field(min_length=1)] = "runs"
    """Directory that holds the sweep's folder."""
    config: Annotated[str, Field(min_length=1)]
    """What the runs have in common: a .yaml file, or the name of a preset."""
    base: dict[str, Any] = Field(default={})
    """Overrides of all runs: {section.key: value}."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default={})
    """Every combination of these values: {section.key: [values]}."""
    zip: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default={})
    """Values that change together, the first of each key, then the second: {section.key: [values]}."""
    list: tuple[dict[str, Any], ...] = ()
    """Sets of overrides, one after the other: [{section.key: value}]. With grid and zip: every combination."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = ()
    """Each of the runs with each of these seeds; a number n stands for 0 to n-1."""
    ranks: Count = 1
    """Processes of a run."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs that a run asks of Slurm or Ray; on this machine each process has one where there are any."""
    metric: MetricSection = MetricSection()
    """What runs are compared by; a name alone will do."""
    stop: StopSection | None = None
    """Stops runs that fall behind; null: all are finished."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a run that broke is started again, each time that the command is given."""

    @model_validator(mode="after")
    def _consistent(self) -> Definition:
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise Refusal(f"zip: its keys have different numbers of values: {lengths}")
        places = {"base": set(self.base), "grid": set(self.grid), "zip": set(self.zip)}
        places |= {"list": {key for entry in self.list for key in entry}, "seeds": {SEED} if self.seeds else set()}
        for place, found in places.items():
            for key in found:
                _require_key(place, key)
        del places["base"]  # which the others override
        for key in {key for found in places.values() for key in found}:
            if len(twice := [place for place, found in places.items() if key in found]) > 1:
                raise Refusal(f"{key} stands in {' and in '.join(twice)}: keep it in one of them")
        if self.num_points > MOST_RUNS:
            raise Refusal(f"{self.num_points:,} runs, where a sweep has {MOST_RUNS:,} at most: leave out values")
        return self

    @property
    def root(self) -> Path:
        return Path(self.dir) / self.name

    @property
    def num_points(self) -> int:
        grid = math.prod(len(values) for values in self.grid.values())
        zipped = len(next(iter(self.zip.values()), (None,)))
        return max(1, len(self.list)) * grid * zipped * max(1, len(self.seeds))

    def points(self) -> Sequence[dict[str, Any]]:
        """The overrides of every run, in order: list, then grid, then zip, then seeds, the last changing fastest."""
        entries = self.list or ({},)
        grid = [dict(zip(self.grid, values)) for values in product(*self.grid.values())]
        zipped = [dict(zip(self.zip, values)) for values in zip(*self.zip.values())] or [{}]
        seeds = [{SEED: seed} for seed in self.seeds] or [{}]
        found = [{**a, **b, **c, **d} for a, b, c, d in product(entries, grid, zipped, seeds)]
        seen: dict[str, int] = {}
        for number, overrides in enumerate(found, start=1):
            if (first := seen.setdefault(canonical.dumps(overrides), number)) != number:
                raise Refusal(f"{self.name}: {words(overrides)} is there twice, as points {first} and {number}")
        return found


def load(path: Path) -> Definition:
    """The sweep in a YAML file."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"sweep {path} cannot be read: {error}") from None
    return parse(values, str(path))


def parse(values: Any, source: str) -> Definition:
    """A sweep from plain values."""
    if not isinstance(values, Mapping):
        raise Refusal(f"{source}: a sweep is keys and values (name, config, grid, ...), not {values!r}")
    given = dict(values)
    if isinstance(given.get("metric"), str):
        given["metric"] = {"name": given["metric"]}
    if type(given.get("seeds")) is int:
        if not 1 <= given["seeds"] <= MOST_RUNS:
            raise Refusal(f"{source}: seeds={given['seeds']}: a number of seeds, at least 1, or a list of them")
        given["seeds"] = [*range(given["seeds"])]
    try:
        return Definition.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise refusal(error, Definition, source) from None
    except (TypeError, ValueError) as error:
        raise Refusal(f"{source}: not plain values: {error}") from None


def argument(key: str, value: Any) -> str:
    """An override as ``pretrain`` and ``stoker train`` take it, whatever the value: ``train.lr=0.001``.

    JSON with every other character than printable ASCII escaped is YAML too; YAML takes line breaks that JSON has not
    for spaces, and pairs of surrogates for two characters.
    """
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}=" + "".join(c if " " <= c <= "~" else f"\\U{ord(c):08x}" for c in text)


def words(overrides: Overrides) -> str:
    """Overrides as a person reads them: train.lr=0.001, run.seed=1."""
    return ", ".join(f"{key}={shown(value)}" for key, value in overrides.items()) or "no override"


def shown(value: Any) -> str:
    """A value of a configuration in a few characters."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _require_key(place: str, key: str) -> None:
    if not re.fullmatch(r"[^\s=.]+(\.[^\s=.]+)*", key):
        raise Refusal(f"{place}: {key!r} is no key: sections and a name with dots between, such as train.lr")
    if key in OWN_KEYS or key == "run":
        raise Refusal(f"{place}: {key} is the sweep's own: each of its runs has its name and folder, and resumes there")
