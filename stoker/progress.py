"""Progress for people: a bar on a terminal, silence anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A bar with rate and time left on standard error, drawn while the block runs; yields ``advance(amount)``, in the
    units of `total`.

    >>> with progress("hashing", total=3) as advance:
    ...     advance(1)
    """
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich import progress as bars
    from rich.console import Console

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> str:
            return f"{task.speed:,.1f}/s" if task.speed else ""

    columns = (*bars.Progress.get_default_columns(), Rate())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items`, with a bar while they are consumed; `total` defaults to their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(what, total) as advance:
        for item in items:
            yield item
            advance(1)
