"""RunConfig: everything that is decided before a run starts, read from YAML and ``section.key=value`` overrides.

    config = load("demo", ["train.lr=1e-3", "parallel.tp=2"])     # a preset's name, or the path of a YAML file
    spec, plan = config.model_spec(), config.plan(world_size=4)

What a key means stands beside it: ``config_sections.py``, ``config_model.py``. No torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, ValidationError

from parallel.planning.capabilities import refuse_unsupported
from parallel.planning.plan import ParallelPlan, stages_from_counts
from parallel.planning.workload import check_divisibility
from pretrain.config_base import (
    Identity,
    KeyClass,
    Operational,
    keys,
    leaves,
)
from pretrain.config_model import ModelSection
from pretrain.config_sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GuardSection,
    LaunchSection,
    LogSection,
    ParallelSection,
    RunSection,
    TrainSection,
)
from pretrain.config_yaml import apply_overrides
from pretrain.forecast import automatic
from pretrain.spec import ModelSpec
from pretrain.workload import refuse_ragged_experts, workload_of
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.secrets import MASK, mask, remember
from stoker.sections import Section, refusal, suggestion
from stoker.yaml_core import dump_yaml, parse_yaml

FORMAT, VERSION = "config", 1
ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}

_log = logging.getLogger(__name__)


def _auto_or_degrees(value: Any) -> str:
    return "auto" if isinstance(value, str) else "degrees"


Parallel = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[ParallelSection, Tag("degrees")],
    Discriminator(_auto_or_degrees),
]


class RunConfig(Section):
    """A whole run. Built by ``load`` (YAML) and ``parse`` (plain values), which refuse with one message."""

    run: RunSection
    model: Identity[ModelSection]
    data: DataSection
    train: TrainSection
    parallel: Operational[Parallel] = ParallelSection()
    checkpoint: Operational[CheckpointSection] = CheckpointSection()
    eval: Operational[EvalSection] = EvalSection()
    guard: GuardSection = GuardSection()
    launch: Operational[LaunchSection] = LaunchSection()
    log: Operational[LogSection] = LogSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def model_spec(self) -> ModelSpec:
        return self.model.spec()

    def plan(self, world_size: int, announce: Callable[[str], None] = _log.warning) -> ParallelPlan:
        """The layout on ``world_size`` ranks, refused if the engine does not support it or it does not divide the
        model. ``announce`` is told what ``parallel: auto`` chose. Ranks of several hosts may then differ: one decides
        (``pretrain.run.decide``)."""
        degrees = self.parallel
        if isinstance(degrees, str):
            plan = automatic(self, world_size, announce)
        else:
            plan = ParallelPlan(
                world_size,
                self.train.global_batch,
                self.train.micro_batch,
                num_layers=len(self.model.layers),
                stages=stages_from_counts(degrees.stages) if degrees.stages else (),
                **degrees.model_dump(exclude={"stages"}),
            )
        workload = workload_of(self.model_spec(), self.data.seq_len, ELEMENT_BYTES[self.run.dtype])
        refuse_unsupported(plan, self.run.dtype, has_experts=workload.has_experts)
        check_divisibility(workload, plan)
        refuse_ragged_experts(self.model_spec(), plan, self.run.dtype)
        return plan

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults written out, and the format stamp; ``parse`` gives the same back."""
        return {"format": formats.stamp(FORMAT, VERSION), **self.model_dump(mode="json")}

    def to_yaml(self, **provenance: Any) -> str:
        """``resolved`` as YAML; ``provenance`` (code commit, lock hash) is written beside it and not read back."""
        return dump_yaml({**self.resolved(), **({"provenance": provenance} if provenance else {})})

    def masked(self) -> RunConfig:
        """The configuration as it may be written down or sent away: a password inside a path is not, nor an address
        whose path is its password."""
        values = mask(self.resolved())
        values["data"]["blend"] = {mask(path): weight for path, weight in values["data"]["blend"].items()}
        if values["launch"]["webhook"] is not None:
            values["launch"]["webhook"] = MASK
        return parse(values, self.run.name)

    def sha256(self) -> str:
        """Hash of the resolved configuration, equal for equal runs however they were written down."""
        return canonical.sha256(self.resolved())


def parse(values: Any, source: str = "configuration") -> RunConfig:
    """A RunConfig from plain values (dicts, lists, numbers, text), such as ``resolved`` gives."""
    if not isinstance(values, Mapping):
        raise Refusal(f"{source}: a configuration is sections of keys, not {values!r}")
    sections = {name: value for name, value in values.items() if name not in ("format", "provenance")}
    if "format" in values:
        formats.require(values, FORMAT, VERSION, source)
    try:
        config = RunConfig.model_validate_json(json.dumps(sections))
    except ValidationError as error:
        raise refusal(error, RunConfig, source) from None
    except (TypeError, ValueError) as error:
        raise Refusal(f"{source}: not plain values: {error}") from None
    if config.launch.webhook is not None:
        remember(config.launch.webhook)
    known = [key for key, key_class in keys(RunConfig) if key_class is KeyClass.TRAJECTORY]
    for key in config.run.allow_change:
        if not any(_covers(key, other) for other in known):
            raise Refusal(f"{source}: run.allow_change names {key}, no trajectory key: {suggestion(key, known)}")
    return config


def load(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file, or of a preset, with ``section.key=value`` overrides on top."""
    values = read_values(source)
    return parse(apply_overrides(values, overrides) if isinstance(values, Mapping) else values, str(source))


def read_values(source: str | Path) -> Any:
    """What a YAML file, or a preset, says, before anything is validated or filled in."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in presets():
            raise Refusal(f"{source} is neither a .yaml file nor a preset: {suggestion(str(source), presets())}")
        path = _presets() / f"{source}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in its name
        raise Refusal(f"configuration {path} cannot be read: {error}") from None
    return parse_yaml(text, str(source))


def preset(name: str) -> RunConfig:
    """A configuration that comes with Stoker, by name."""
    return load(name)


def presets() -> list[str]:
    return sorted(path.stem for path in _presets().glob("*.yaml"))


def _presets() -> Path:
    return Path(str(files("pretrain"))) / "presets"


@dataclass(frozen=True)
class Change:
    """A key that differs between a run so far and its next attempt; a key that is not given is None."""

    key: str
    key_class: KeyClass
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def diff(old: RunConfig, new: RunConfig) -> dict[KeyClass, list[Change]]:
    """What changed, by class, in order of the keys."""
    before, after = dict(leaves(old)), dict(leaves(new))
    changes: dict[KeyClass, list[Change]] = {key_class: [] for key_class in KeyClass}
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            key_class = _class_of(key)
            changes[key_class].append(Change(key, key_class, before.get(key), after.get(key)))
    return changes


def allowed_changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """The changes from a run so far to its next attempt, for the record.

    Refuses a changed identity key, and a changed trajectory key that ``new.run.allow_change`` does not cover.
    """
    changes = diff(old, new)
    if identity := changes[KeyClass.IDENTITY]:
        raise Refusal(
            f"{_list(identity)}: this would be another run than {new.run_dir} holds. "
            "Put the old value back, or choose another run.name"
        )
    refused = [c for c in changes[KeyClass.TRAJECTORY] if not any(_covers(a, c.key) for a in new.run.allow_change)]
    if refused:
        raise Refusal(
            f"{_list(refused)}: this changes the curve of {new.run_dir}. "
            f"Put the old value back, or say so: run.allow_change=[{', '.join(c.key for c in refused)}]"
        )
    return [change for group in changes.values() for change in group]


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _class_of(key: str) -> KeyClass:
    """Class of a leaf key, or of a section that is absent as a whole."""
    return next(key_class for known, key_class in keys(RunConfig) if _covers(key, known))


def _list(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))
