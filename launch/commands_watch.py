"""``stoker status``, ``stoker logs`` and ``stoker watch``: how a run is doing, what it said, and both as a page."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launch.watch.observe import Observer
    from launch.watch.record import Status

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]

#: Seconds between two looks at a run.
EVERY_S = 2.0


def status(
    run: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every two seconds, until the run has ended.")
    ] = False,
) -> None:
    """How a run is doing: progress, loss, speed, time left, attempts and why they ended, slow ranks, disk."""
    from launch.watch.observe import Observer

    observer = Observer(run)
    if watch and not as_json and sys.stdout.isatty():
        _live(observer)
        return
    while True:
        found = observer.look()
        typer.echo(json.dumps(found.to_json(), allow_nan=False) if as_json else _text(found, sys.stdout.isatty()))
        if not (watch and found.state.is_under_way):
            return
        time.sleep(EVERY_S)


def logs(
    run: RunDir,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which launch; by default the newest.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only what this rank printed.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until the run ends.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Only errors: the rank to blame first.")] = False,
) -> None:
    """What the ranks printed, as one stream in order of time; or their errors, the first and guilty one first."""
    from launch.watch.errors import error_lines
    from launch.watch.logs import follow_lines, log_lines
    from launch.watch.observe import require_run
    from stoker.errors import Refusal

    require_run(run)
    if errors and follow:
        raise Refusal("--errors and --follow: one or the other; --errors tells of an attempt that has ended")
    read = error_lines if errors else follow_lines if follow else log_lines
    try:
        for line in read(run, attempt, rank):
            print(line, flush=follow)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; what is left in the buffer is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def watch(
    run: RunDir,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7007,
    host: Annotated[str, typer.Option(help="Address to serve on; others than loopback let others read.")] = "127.0.0.1",
) -> None:
    """Serve a page about a run, read-only, with its figures for Prometheus under /metrics."""
    from launch.watch.server import serve

    serve(run, host, port)


def _live(observer: Observer) -> None:
    """The status in place, until the run has ended or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    found = observer.look()
    with Live(Text.from_ansi(_text(found, True)), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while found.state.is_under_way:
            time.sleep(EVERY_S)
            found = observer.look()
            live.update(Text.from_ansi(_text(found, True)), refresh=True)


def _text(found: Status, colour: bool) -> str:
    from launch.watch.words import lines

    return "\n".join(lines(found, colour))
