"""Predictions beside published runs: ``stoker plan evaluate ROWS.csv``. No torch.

    judged = evaluate(read_rows("rows.csv"))
    [each.time_error for each in judged]                      # predicted over published step time, less one

A row is predicted from what it says of model, machine and layout alone; what it measured is read after, to be compared.
A row that cannot be modelled stays, with the reason. How good the predictions are is ``metrics.py``'s question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from parallel.planning.memory.prediction import MemoryPrediction, predict_memory
from parallel.planning.published.runs import Published, Row, Run, Skipped, interpret, published
from parallel.planning.timing.calibration import Calibration, load_calibration
from parallel.planning.timing.fit import Observed
from parallel.planning.timing.step_time import predict_time
from parallel.planning.timing.work import WorkTable
from stoker.errors import Refusal

GB = 1e9
NOTHING = Published()
#: Words of a doubt that leaves step time and layout sound: about memory, how a source counts FLOPs, or units that the
#: reader of published rows converts.
DOUBTED_MEMORY = ("memory", "static bytes", "GB peak")
SOUND_TIME = (*DOUBTED_MEMORY, "mfu_pct counts", "use tokens/s only", "NeuronCores")
#: A typing error in a row must not fill the memory with its layers.
MOST_LAYERS = 10_000
#: For the name of a publication.
NAMELESS = "a table"
#: Megatron-LM's golden values are what the last rank logs: memory of the last pipeline stage, not of the fullest.
LAST_RANK = ("mem-max-allocated-bytes", "golden value")


@dataclass(frozen=True)
class Judged:
    """A row of the table with what is predicted of it.

    ``published``: as the table has it; ``measured``: with the step time and tokens/s that follow from it. ``run`` None:
    ``skipped`` says why. ``memory_gb`` and ``memory_upper_gb``: allocated on the device that the row is about.
    ``step_s`` None: not predicted yet.
    """

    row: int
    published: Published = NOTHING
    measured: Published = NOTHING
    run: Run | None = None
    skipped: str | None = None
    memory: MemoryPrediction | None = None
    memory_gb: float | None = None
    memory_upper_gb: float | None = None
    step_s: float | None = None

    def tag(self, name: str) -> str:
        """source, model, gpu, precision or kind (dense or moe); "" for a row without a run."""
        return self.run.tags[name] if self.run else ""

    @property
    def precision(self) -> str:
        """As the model takes it, however the source spells it."""
        return self.run.execution.precision if self.run else ""

    @property
    def sound(self) -> bool:
        """Whether step time and layout are beyond doubt: nobody doubts them, the row or its degrees tell the number of
        devices ("gpus=8: why" is a guess), and it was not run in a deterministic mode, which is slower than training
        is."""
        run = self.run
        if run is None or run.execution.deterministic or any(re.match("gpus=.*:", text) for text in run.assumed):
            return False
        return not run.doubtful or any(words in run.doubtful for words in SOUND_TIME)

    @property
    def doubted_memory(self) -> bool:
        """Whether another row of the table, equal in its columns, measured another peak."""
        doubt = (self.run.doubtful if self.run else None) or ""
        return any(words in doubt for words in DOUBTED_MEMORY)

    @property
    def predicted(self) -> Published:
        """In the units of the table: model FLOPs by ``Workload``'s convention, MFU against the peak of the row's
        precision."""
        if self.run is None or self.step_s is None:
            return NOTHING
        run, rate = self.run, tokens_per_s_per_gpu(self.run, self.step_s)
        flops = run.workload.training_flops * rate
        mfu = 100 * flops / run.topology.peak(run.execution.precision)
        return Published(self.step_s, rate, flops / 1e12, mfu, self.memory_gb)

    @property
    def time_error(self) -> float | None:
        """Predicted over published step time, less one; None where no time was published."""
        return _error(self.step_s, self.measured.step_time_s)

    @property
    def memory_error(self) -> float | None:
        return _error(self.memory_gb, self.measured.mem_per_gpu_gb)

    @property
    def over_bound(self) -> float | None:
        """Published memory over the upper bound, less one: above zero the bound was exceeded."""
        return _error(self.measured.mem_per_gpu_gb, self.memory_upper_gb)

    @property
    def note(self) -> str | None:
        """What the prediction says against itself: more memory than a device has."""
        if self.run is None or self.memory is None or not (size := self.run.topology.device.memory_bytes):
            return None
        peak, upper = self.memory.peak, self.memory.upper
        if max(peak, upper) <= size:
            return None
        needed = f"{peak / GB:.0f} GB" if peak > size else f"{peak / GB:.0f} GB, at most {upper / GB:.0f},"
        verdict = "would not fit" if peak > size else "might not fit"
        return f"{verdict}: a device needs {needed} of {size / GB:.0f} by the memory model"

    def to_dict(self) -> dict[str, Any]:
        """The form that scripts read (``--json``); its keys are fixed."""
        return {
            "row": self.row,
            "predicted": asdict(self.predicted),
            "published": asdict(self.published),
            "skipped": self.skipped,
        }


def tokens_per_s_per_gpu(run: Run, step_s: float) -> float:
    return run.plan.global_batch * run.workload.seq_len / run.plan.world_size / step_s


def evaluate(rows: Iterable[Row], calibration: Calibration | None = None) -> list[Judged]:
    """Every row with its prediction, in order."""
    calibration = calibration or load_calibration()
    return [_timed(judged, calibration) for judged in read(rows)]


def read(rows: Iterable[Row]) -> list[Judged]:
    """Every row without a step time: what needs no calibration."""
    return [_read(row) for row in rows]


def read_nameless(rows: Iterable[Row], judged: Sequence[Judged]) -> list[Judged]:
    """The same rows as anybody's who does not say where they come from: without the name and the address of their
    publication, so that no recipe of it is recognised. What was measured, and which rows count, stays."""
    found = []
    for row, named in zip(rows, judged, strict=True):
        if named.run is None:
            found.append(named)
            continue
        nameless = _read(replace(row, source=NAMELESS, source_url=""))
        if nameless.run is not None:
            known = {name: getattr(named.run, name) for name in ("tags", "assumed", "stated", "doubtful")}
            nameless = replace(nameless, measured=named.measured, run=replace(nameless.run, **known))
        found.append(nameless)
    return found


def _read(row: Row) -> Judged:
    judged = Judged(row.index, row.measured)
    if (row.layers or 0) > MOST_LAYERS:
        return replace(judged, skipped=f"layers={row.layers}: no model has more than {MOST_LAYERS}")
    try:
        run = interpret(row)
        if isinstance(run, Skipped):
            return replace(judged, skipped=run.reason)
        run.topology.peak(run.execution.precision)
        memory = predict_memory(run.workload, run.plan, run.execution, run.topology)
        measured = published(row, run)
    except Exception as error:  # one row of a stranger's table must not cost the others
        return replace(judged, skipped=_reason(error))
    last = any(words in row.notes or words in row.source for words in LAST_RANK)
    allocated, upper = memory.allocated, max(stage.allocated_upper for stage in memory.stages)
    if last:
        allocated, upper = memory.stages[-1].allocated, memory.stages[-1].allocated_upper
    return replace(
        judged, run=run, measured=measured, memory=memory, memory_gb=allocated / GB, memory_upper_gb=upper / GB
    )


def _timed(judged: Judged, calibration: Calibration) -> Judged:
    if (run := judged.run) is None:
        return judged
    try:
        time = predict_time(run.workload, run.plan, run.execution, run.topology, calibration)
    except Exception as error:
        return Judged(judged.row, judged.published, skipped=_reason(error))
    return replace(judged, step_s=time.step_s)


def _reason(error: Exception) -> str:
    """What a reader is told: a refusal's own words; of anything else also its kind, since it is a fault of ours."""
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"


def fitting(judged: Iterable[Judged]) -> list[Judged]:
    """The rows that a calibration may be fitted to: sound ones with a published time."""
    return [each for each in judged if each.sound and each.measured.step_time_s is not None]


def observed(judged: Sequence[Judged]) -> list[Observed]:
    """Rows with a run, as the fit takes them; without a published time it is nan."""
    return [
        Observed(
            WorkTable(run.workload, run.execution, run.topology).step(run.plan),
            run.topology,
            run.execution,
            judged.measured.step_time_s or float("nan"),
        )
        for judged in judged
        if (run := judged.run) is not None
    ]


def _error(value: float | None, truth: float | None) -> float | None:
    return None if value is None or not truth else value / truth - 1
