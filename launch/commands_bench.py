"""``stoker bench``: run a benchmark, print its rows, and write them down for the docs to quote."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.machine import cores
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.version import code_commit

#: What is measured -> the module whose ``run()`` measures it and returns rows, each a dict or a dataclass.
MODULES = {
    "kernels": "kernels.bench",
    "train": "pretrain.bench",
    "data": "dataio.bench",
    "checkpoint": "pretrain.checkpoint.bench",
}
#: Where tables go that the docs quote, in a checkout.
MEASUREMENTS = Path("docs/measurements")
#: Packages whose versions decide what was measured.
PACKAGES = (
    *("torch", "megatron-core", "numba", "transformers"),
    *("tokenizers", "gigatoken", "fastokens", "tiktoken", "rensa", "datasketch", "datatrove"),
)


def bench(what: str, save: bool = False, quick: bool = False) -> None:
    """Print one line a row; with ``save`` also write ``docs/measurements/bench-<what>.md`` (a GPU adds its name).
    Refuses what cannot be measured yet, and to save outside of a checkout. ``quick``: fewer shapes of the kernels."""
    if quick and what != "kernels":
        raise Refusal(f"bench {what} has no --quick: it is for the kernels, whose shapes are many")
    if find_spec(MODULES[what]) is None:
        built = ", ".join(name for name, module in MODULES.items() if find_spec(module))
        raise Refusal(f"bench {what} is not built yet; there is {built or 'none'}")
    if save and not MEASUREMENTS.parent.is_dir():
        raise Refusal(
            f"--save writes to {MEASUREMENTS} and there is no {MEASUREMENTS.parent} here: run it in a checkout"
        )
    from rich.console import Console
    from rich.table import Table

    run = import_module(MODULES[what]).run
    rows = [_texts(row) for row in (run(quick=True) if quick else run())]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if save:
        path = MEASUREMENTS / f"bench-{'-'.join([what, *_gpu()])}.md"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, page(what, rows))
        print(path)


def _gpu() -> list[str]:
    """Name of this machine's first GPU as part of a file's name; nothing without one."""
    import torch

    return [torch.cuda.get_device_name().replace(" ", "-")] if torch.cuda.is_available() else []


def page(what: str, rows: Sequence[dict[str, str]]) -> str:
    """The table as markdown, under what it takes to repeat it."""
    facts = {
        "command": f"`{shlex.join(['stoker', 'bench', what, '--save'])}`",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": code_commit() or "unknown",
        "device": device(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("python", *PACKAGES)),
    }
    lines = [f"# bench {what}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [_line(rows[0]), _line("---" for _ in rows[0]), *(_line(row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def device() -> str:
    """The processor, in words: benchmarks that run on no other say so in their rows."""
    name = platform.processor() or platform.machine()
    try:
        listed = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        listed = []
    model = next((line.partition(":")[2].strip() for line in listed if line.startswith("model name")), name)
    return f"{model}, {cores()} cores usable, {platform.system()} {platform.machine()}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _texts(row: Any) -> dict[str, str]:
    fields = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
    return {name: "unknown" if value is None else _text(value) for name, value in fields.items()}


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
