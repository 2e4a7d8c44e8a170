"""``stoker bench``: run a benchmark and print its rows."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from stoker.errors import Refusal

#: What is measured -> the module whose ``run()`` measures it and returns rows, one dict each.
MODULES = {
    "kernels": "kernels.bench",
    "train": "pretrain.bench",
    "data": "dataio.bench",
    "checkpoint": "pretrain.checkpoint.bench",
}


def bench(what: str) -> None:
    """Print one line a row. Refuses what cannot be measured yet."""
    if find_spec(MODULES[what]) is None:
        built = ", ".join(name for name, module in MODULES.items() if find_spec(module))
        raise Refusal(f"bench {what} is not built yet; there is {built or 'none'}")
    from rich.console import Console
    from rich.table import Table

    rows = import_module(MODULES[what]).run()
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("unknown" if value is None else _text(value) for value in row.values()))
    Console().print(table)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
