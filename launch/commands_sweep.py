"""``stoker sweep``: many runs from one file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Which runs there are, see docs/sweeps.md.")]


def sweep(
    path: SweepFile,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; by default as many as suit.")] = None,
    on: Annotated[Literal["local", "slurm", "ray"], typer.Option(help="Where they run.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check everything and list the runs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="A process of its own for each run, no fork.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Let what runs on Slurm save and end; the rest waits.")] = False,
) -> None:
    """Run a grid or a list of configurations. Given again, it goes on: finished runs are left, broken ones tried."""
    if stop:
        from launch.sweep.array import stop as stop_array
        from launch.sweep.ledger import read
        from launch.sweep.planning import folder_of
        from stoker.errors import Refusal

        if dry_run:
            raise Refusal("--stop with --dry-run: nothing would be tried; `squeue --me` shows what runs")
        typer.echo(stop_array(read(folder_of(path)).root))
        return
    from launch.sweep.history import Outcome
    from launch.sweep.run import listed, prepare
    from launch.sweep.run import sweep as run_sweep

    if dry_run:
        ledger = prepare(path, jobs)
        rows = listed(ledger)
        for number, overrides, outcome in rows:
            typer.echo(f"{number:04d}  {outcome:20}  {overrides}")
        counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(row[2] for row in rows).items())
        typer.echo(
            f"{ledger.root}: {len(rows)} runs of {ledger.definition.ranks} ranks ({counts}); nothing was written"
        )
        return
    found = run_sweep(path, jobs, on, fresh=fresh)
    if isinstance(found, str):
        typer.echo(found)
        return
    from launch.sweep.ledger import read
    from launch.sweep.planning import folder_of
    from launch.sweep.report import write_report
    from launch.sweep.results import best_lines, results

    root = folder_of(path)
    for line in best_lines(results(read(root))):
        typer.echo(line)
    counts = ", ".join(f"{count} {outcome.value}" for outcome, count in found.counts.items())
    left = sum(not s.outcome.over and s.outcome is not Outcome.RUNNING for s in found.states.values())
    again = "; the same command goes on with the rest" if left else ""
    typer.echo(f"{root}: {counts}{again}\n{write_report(root)}")
    raise typer.Exit(found.code)
