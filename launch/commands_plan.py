"""``stoker plan``: which layout to run on a machine; measuring machines, designing models, judging predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from parallel.planning.execution import Precision
from stoker.errors import Refusal

#: The command that ``stoker plan CONFIG`` means.
DEFAULT = "layout"
#: What follows a number of tokens: "128k" are 131,072.
SUFFIXES = {"k": 2**10, "m": 2**20, "g": 2**30}


#: Up to so many rows an evaluation looks for the planner's own layouts unasked.
FEW_ROWS = 100


class _Plan(TyperGroup):
    """A group whose first word is a CONFIG unless it names a command."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        first = args[0] if args else ""
        named = first in self.commands or first in ctx.help_option_names
        return super().parse_args(ctx, args if named else [DEFAULT, *args])


plan = typer.Typer(
    name="plan",
    cls=_Plan,
    help="Which layout to run on a machine, how fast it will be, and why the others are worse: stoker plan CONFIG.",
)

Json = Annotated[bool, typer.Option("--json", help="As one JSON object (docs/planner.md).")]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware", metavar="NAME", help="A preset such as gb200-nvl72, or a .yaml; left out, this machine."
    ),
]


@plan.command(DEFAULT)
def layout(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A .yaml file, or the name of a preset.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="What differs from it.")
    ] = None,
    hardware: Hardware = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", "--ranks", metavar="N", help="Devices; here, as many as suit this machine.")
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="tp=4,pp=8,...", help="Judge a layout of your own against the planner's.")
    ] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="Also what the engine does not support yet.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write pictures of the plan there.")] = None,
    json: Json = False,
) -> None:
    """The fastest layout of a configuration on a machine; `stoker plan CONFIG` does the same."""
    from launch.commands_plan_layout import Asked, show

    show(Asked(config, tuple(overrides or ()), hardware, gpus, explain, what_if), html, json)


@plan.command()
def calibrate() -> None:
    """Measure this machine, so that predictions for it are known."""
    from launch.calibrate import calibrate

    calibrate()


@plan.command()
def design(
    hardware: Annotated[str, typer.Option(metavar="NAME", help="A preset such as gb200-nvl72, or a .yaml file.")],
    gpus: Annotated[int, typer.Option(metavar="N", help="Devices to train on.")],
    days: Annotated[float, typer.Option(help="For how long, at most.")],
    serve_context: Annotated[str, typer.Option(metavar="TOKENS", help="Of a sequence that is served: 131072, 128k.")],
    seq_len: Annotated[str, typer.Option(metavar="TOKENS", help="Of a training window.")] = "8k",
    batch_tokens: Annotated[str, typer.Option(metavar="TOKENS", help="Of a training step.")] = "16m",
    data_tokens: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="All there is, such as 15e12; left out, data has no end.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="To train in.")] = "bfloat16",
    serve_precision: Annotated[Precision, typer.Option(help="To serve in.")] = "bfloat16",
    price: Annotated[
        float | None, typer.Option(help="Of one device for an hour; left out, costs stay GPU time.")
    ] = None,
    vocab: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 131_072,
    as_json: Json = False,
) -> None:
    """Let the hardware choose the model: shapes that none beats in loss, cost of training and cost of serving."""
    from parallel.planning.design.report import report, to_json
    from parallel.planning.design.search import Question, search
    from parallel.planning.topology import load_hardware

    question = Question(
        load_hardware(hardware),
        gpus,
        days,
        tokens("--serve-context", serve_context),
        seq_len=tokens("--seq-len", seq_len),
        batch_tokens=tokens("--batch-tokens", batch_tokens),
        **({} if data_tokens is None else {"data_tokens": data_tokens}),
        precision=precision,
        serve_precision=serve_precision,
        price_per_hour=price,
        vocab=vocab,
    )
    front = search(question)
    typer.echo(json.dumps(to_json(front), indent=2, allow_nan=False) if as_json else report(front))


@plan.command()
def evaluate(
    rows: Annotated[Path, typer.Argument(metavar="ROWS.csv", help="Runs in the columns of the published table.")],
    regret: Annotated[
        bool | None,
        typer.Option(
            help="Search the planner's own layout for each row, a second each; by default for up to 100 rows."
        ),
    ] = None,
    constants: Annotated[
        bool, typer.Option("--constants", help="Also print the constants of the calibration.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict runs that were published from their layout columns, and compare."""
    from parallel.planning.accuracy import report as evaluate_report
    from parallel.planning.accuracy.evaluate import evaluate
    from parallel.planning.accuracy.regret import regrets
    from parallel.planning.published.rows import read_rows
    from parallel.planning.timing.calibration import load_calibration

    judged = evaluate(read_rows(rows))
    few = not as_json and len(judged) <= FEW_ROWS
    own = regrets(judged) if (few if regret is None else regret) else {}
    calibration = load_calibration()
    if as_json:
        typer.echo(json.dumps(evaluate_report.to_json(judged, calibration, own), allow_nan=False))
        return
    typer.echo(evaluate_report.report(judged, own))
    if constants:
        typer.echo("\n" + "\n".join(evaluate_report.constants(calibration)))


def tokens(option: str, text: str) -> int:
    """A number of tokens, "131072" or "128k".

    >>> tokens("--seq-len", "8k")
    8192
    """
    number, factor = text.lower(), 1
    if number[-1:] in SUFFIXES:
        number, factor = number[:-1], SUFFIXES[number[-1]]
    if not number.isdecimal() or not int(number):
        raise Refusal(f"{option} {text}: give a number of tokens above zero, such as 8192 or 128k (of 1024)")
    return int(number) * factor
