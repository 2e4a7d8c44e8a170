"""What a step reports, and ``metrics.jsonl``: one JSON object a step, written by rank 0 and read by ``read`` alone.

Everything but ``timing`` is a function of the configuration, the data and the layout, and is kept to the last bit
(P5); ``timing`` is what the clock said, null where it is not known. Where they are shown: ``sinks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stoker import canonical
from stoker.errors import Refusal
from stoker.files import append_line, read_jsonl

SCHEMA = 1
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Timing:
    """Wall clock of a step; None where it is not known."""

    step_time_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class StepEvent:
    """One step of one attempt, equal on every rank.

    ``loss``: nats per valid target of the global batch; ``grad_norm`` before clipping; ``lr`` that the step used or,
    skipped, would have used; ``valid_targets`` and ``tokens`` (padding apart) of this step over all ranks; ``draws``:
    windows of this step by source; ``verdict``: apply, skip, rewind or stop; ``aux``: auxiliary losses and other
    measurements by name, such as ``balance_loss`` or ``heldout.code.nats_per_token``. ``loss``, ``grad_norm`` and
    ``aux`` may be NaN or infinite.
    """

    attempt: int
    step: int
    loss: float
    grad_norm: float
    lr: float
    valid_targets: int
    tokens: int
    draws: Mapping[str, int]
    verdict: str
    applied: bool
    aux: Mapping[str, float] = field(default_factory=dict)
    timing: Timing = Timing()

    def to_line(self) -> str:
        """Canonical JSON; NaN and infinities, which JSON has not, as the texts "nan", "inf" and "-inf"."""
        return canonical.dumps(_map_numbers({"schema": SCHEMA, **asdict(self)}, _to_json))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepEvent:
        """The event of a line. Refuses a schema that it does not know and keys that are missing or too many."""
        fields = dict(value)
        schema = fields.pop("schema", None)
        if schema != SCHEMA:
            raise Refusal(
                f"schema {schema!r} where this release reads {SCHEMA}: read it with the release that wrote it"
            )
        try:
            reals = {name: _from_json(fields[name]) for name in ("loss", "grad_norm", "lr")}
            counts = {name: int(fields[name]) for name in ("attempt", "step", "valid_targets", "tokens")}
            aux = {str(name): _from_json(item) for name, item in fields["aux"].items()}
            draws = {str(name): int(count) for name, count in fields["draws"].items()}
            timing = Timing(**{k: None if v is None else _from_json(v) for k, v in fields["timing"].items()})
            return cls(**{**fields, **reals, **counts, "aux": aux, "draws": draws, "timing": timing})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refusal(f"damaged: {error}") from None


def deterministic(event: StepEvent) -> dict[str, Any]:
    """What two runs of one configuration, data and layout agree on bit by bit, whichever attempt computed it: NaN is
    equal to NaN."""
    fields = asdict(event)
    del fields["timing"], fields["attempt"]
    result: dict[str, Any] = _map_numbers(fields, _to_json)
    return result


def write(run_dir: Path, event: StepEvent) -> None:
    """Append an event to the metrics of a run: rank 0 only. A line that a killed attempt left torn is cut off first."""
    append_line(run_dir / METRICS, event.to_line())


def read(run: Path) -> list[StepEvent]:
    """The steps of a run (its directory, or a metrics file) in order, each once, as the attempt that stands has them.

    An attempt replaces everything from its first step on: of what an earlier attempt did after the checkpoint that was
    resumed from, nothing remains. One that goes back (a rewind) does the same with its own. A torn last line is left
    out. Refuses damaged lines, naming them.
    """
    path = run if run.suffix == ".jsonl" else run / METRICS
    try:
        lines = read_jsonl(path)
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: no step has been trained in this run directory") from None
    events: list[StepEvent] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(StepEvent.from_json(line))
        except Refusal as refusal:
            raise Refusal(f"{path}, line {number}: {refusal}") from None
    return standing(events)


def standing(events: list[StepEvent]) -> list[StepEvent]:
    """Of the events of several attempts, each in the order in which it wrote them, those that stand, in order of step:
    see ``read``."""
    standing: list[StepEvent] = []
    for event in sorted(events, key=lambda event: event.attempt):
        while standing and standing[-1].step >= event.step:
            standing.pop()
        standing.append(event)
    return standing


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> float:
    return float(value)


def _map_numbers(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_numbers(item, change) for key, item in value.items()}
    return change(value)
