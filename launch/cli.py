"""The ``stoker`` command. What a command needs is imported when it runs: help, ``doctor`` and ``plan`` start at once.

Exit codes (DESIGN section 8): 0 done, 2 refused, 3 stopped by a verdict, 4 preempted after an urgent checkpoint; any
other is a fault, whose traceback is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands_checkpoint import checkpoint
from launch.commands_data import data
from launch.commands_launch import launch
from launch.commands_plan import plan
from launch.commands_sweep import sweep
from launch.commands_watch import logs, status, watch
from pretrain.guard import require_own_rooms
from stoker.errors import Refusal
from stoker.secrets import mask_values

REFUSED = 2
#: Of a refusal: a longer one quotes a value that nobody would read to its end.
MOST_CHARACTERS = 4000

app = typer.Typer(
    help="Stoker trains language models, from text on disk to generated text, under every parallel layout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plan)
app.add_typer(data)
app.add_typer(checkpoint)
app.add_typer(launch)
for command in (sweep, status, logs, watch):
    app.command()(command)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A .yaml file, or the name of a preset.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="What differs from it.")]
_RANKS_HELP = "Processes; by default as many as suit this machine."
_RESTARTS_HELP = "Restarts after faults, other than launch.max_restarts."
Ranks = Annotated[int | None, typer.Option("--ranks", "--gpus", min=1, help=_RANKS_HELP)]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]


@app.callback()
def _before(context: typer.Context) -> None:
    if context.invoked_subcommand != "doctor":  # which is there to say what is in the way
        require_own_rooms()


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    ranks: Ranks = None,
    max_restarts: Annotated[int | None, typer.Option(min=0, help=_RESTARTS_HELP)] = None,
) -> None:
    """Train on this machine: validate, choose a layout, start ranks and watch them. A run with a checkpoint resumes."""
    from launch.local import train

    raise typer.Exit(train(config, overrides or (), ranks, max_restarts))


@app.command()
def doctor(
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option("--config", help="Also check this machine for a run of it.")] = None,
    ranks: Ranks = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What is installed, what is missing, and what each absence costs."""
    from launch.doctor import main

    raise typer.Exit(main(config, overrides or (), ranks, as_json))


@app.command()
def generate(
    run: RunDir,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given several times.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; by default the newest.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is drawn from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Let a run's model go on from a text."""
    from pretrain.generate import generate

    texts = generate(run, prompt, step=step, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    for given, text in zip(prompt, texts, strict=True):
        typer.echo(given + text)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN|SWEEP", help="A run directory, or that of a sweep.")],
) -> None:
    """Write a run's report.html, or a sweep's, and print its path."""
    from launch.sweep.report import is_sweep
    from launch.sweep.report import write_report as write_sweep_report
    from pretrain.report import write_report

    typer.echo(write_sweep_report(run) if is_sweep(run) else write_report(run))


@app.command()
def bench(
    what: Annotated[Literal["kernels", "train", "data", "checkpoint"], typer.Argument()],
    save: Annotated[bool, typer.Option("--save", help="Also write the table to docs/measurements.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="kernels: the shapes that have a target, no others.")] = False,
) -> None:
    """Ours against peers and the physical limit, in one run, as ratios."""
    from launch.commands_bench import bench

    bench(what, save, quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code. A refusal is one line; a fault keeps its traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="stoker")
    except Refusal as refusal:
        print(f"refused: {_one_line(mask_values(str(refusal)))}", file=sys.stderr)
        sys.exit(REFUSED)


def _one_line(text: str) -> str:
    """The text with line breaks, and what else a terminal would obey, written out; the middle of a long one is left
    out."""
    half = MOST_CHARACTERS // 2
    text = text if len(text) <= MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


if __name__ == "__main__":
    main()
