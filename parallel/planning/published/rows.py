"""Rows of published training runs, as a table prints them: what was run, and apart from it what was measured.

Columns are those of ``published_training_runs.csv`` (``published_training_runs.md`` explains them); an empty cell, or a
column that a table does not have, is a value that nobody published.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stoker.errors import Refusal

TABLE = Path(__file__).with_name("published_training_runs.csv")


@dataclass(frozen=True)
class Published:
    """What a run measured: seconds, tokens/s and TFLOP/s per device, percent of peak, GB (1e9 bytes) per device."""

    step_time_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu_pct: float | None = None
    mem_per_gpu_gb: float | None = None


@dataclass(frozen=True)
class Row:
    """One configuration. ``measured`` holds every measured column: nothing that predicts may read it, nor a measured
    number that ``notes`` quotes. ``index``: of the row in its table, from 0. ``unreadable``: cells that are not what
    their column holds, in words; they read as empty."""

    index: int
    measured: Published
    source: str = ""
    source_url: str = ""
    year: int | None = None
    model: str = ""
    params_total_b: float | None = None
    params_active_b: float | None = None
    layers: int | None = None
    hidden: int | None = None
    ffn_hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None
    topk: int | None = None
    moe_ffn: int | None = None
    shared_experts: str = ""
    vocab: int | None = None
    seq_len: int | None = None
    global_batch_seqs: int | None = None
    micro_batch: int | None = None
    gpu: str = ""
    gpus: int | None = None
    gpus_per_nvlink_domain: int | None = None
    precision: str = ""
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    ep: int | None = None
    etp: int | None = None
    cp: int | None = None
    dp: int | None = None
    seq_parallel: int | None = None
    recompute: str = ""
    zero_stage: int | None = None
    notes: str = ""
    unreadable: tuple[str, ...] = ()


#: Without these columns a table says nothing about a run.
REQUIRED = ("model", "seq_len", "global_batch_seqs", "gpu", "gpus", "precision", "tp", "pp")
_MEASURED = {field.name: "float" for field in fields(Published)}
_STATED = {
    field.name: str(field.type) for field in fields(Row) if field.name not in ("index", "measured", "unreadable")
}


def read_rows(path: str | Path = TABLE) -> list[Row]:
    """The rows of a CSV file; columns that are not known are ignored. Refusal for one without the required columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = [name.strip() for name in table.fieldnames or ()]
            cells = [{(name or "").strip(): value for name, value in row.items()} for row in table]
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not readable as a table ({error})") from None
    if missing := [name for name in REQUIRED if name not in columns]:
        raise Refusal(
            f"{path}: columns missing: {', '.join(missing)}; see published_training_runs.md for what they hold"
        )
    return [_row(index, row) for index, row in enumerate(cells)]


def _row(index: int, cells: dict[str, Any]) -> Row:
    unreadable: list[str] = []

    def read(types: dict[str, str], bad: list[str]) -> dict[str, Any]:
        return {name: _cell(name, cells.get(name), kind, bad) for name, kind in types.items()}

    measured = Published(**read(_MEASURED, []))  # what cannot be read was not published
    return Row(index, measured, **read(_STATED, unreadable), unreadable=tuple(unreadable))


def _cell(name: str, value: Any, kind: str, bad: list[str]) -> str | int | float | None:
    """The cell's value; None where it is empty, and where it is not of its ``kind``, which ``bad`` is then told."""
    text = (value or "").strip() if not isinstance(value, list) else ",".join(value)
    if kind == "str":
        return text
    if not text:
        return None
    whole = "int" in kind
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (whole and number != int(number)):
        wanted = "a whole number" if whole else "a number"
        bad.append(f"column {name}: {text!r} is not {wanted}, 0 or more")
        return None
    return int(number) if whole else number
