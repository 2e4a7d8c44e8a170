"""A front of models in words and as plain values. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from parallel.planning.capabilities import supported
from parallel.planning.design import serving
from parallel.planning.design.scaling_laws import JOINT, short
from parallel.planning.design.search import LOSS_STEP, Choice, Front, Question
from stoker.formats import stamp

FORMAT, VERSION = "design", 1
COLUMNS = (
    *("loss", "GPU-hours", "tokens", "layers x width, feed-forward, linear:softmax", "active / all", "layout"),
    *("tokens/s/GPU", "serving", "on", "token"),
)
#: What every answer rests on, beside what each choice extrapolates.
ASSUMED = (
    f"loss: {JOINT.source}; how many tokens its runs saw at most is not known. It tells widths from depths only by "
    "parameters and by speed",
    "finer experts: the factor of another law (Krajewski et al. 2024, arXiv 2402.07871), never published with this one",
    "linear layers: losses of one ablation at 0.65B active parameters (Kimi Linear, arXiv 2510.26692, table 1); no "
    "gain over softmax is counted, nor any loss of recall at long context",
    "training: the fastest of a short list of layouts, with no time lost to failures, evaluation or checkpoints; "
    "`stoker plan` looks further for a model that is chosen",
    f"serving: a roofline of decoding, a bound from below; not in it: {', '.join(serving.NOT_MODELLED)}",
)


def report(front: Front) -> str:
    """The front as a table, the longest runs first and of those the best loss, with what it rests on.

    ``layout``: degrees and recompute; ``serving``: GPU-seconds, and money, of a million tokens; ``on``: GPUs that hold
    one copy, sequences of each and what bounds them; ``token``: time between two tokens of a sequence.
    """
    rows = {choice: tuple(_row(choice, front.question)) for choice in front.choices}
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows.values())]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()

    table = [line(COLUMNS)]
    longest_first = sorted(front.choices, key=lambda choice: -round(choice.days, 9))
    for _, choices in groupby(longest_first, key=lambda choice: round(choice.days, 9)):
        table += [*(line(rows[choice]) for choice in choices), ""]
    return "\n".join([*_head(front), "", *table, *_warnings(front.choices), *_notes(front)])


def _head(front: Front) -> Iterator[str]:
    asked = front.question
    yield (
        f"{asked.gpus} GPUs of {asked.topology.name} for at most {asked.days:g} days; trained in {asked.precision}, "
        f"{asked.seq_len} tokens a window and {short(asked.batch_tokens)} a step; served in {asked.serve_precision}, "
        f"{asked.serve_context} tokens a sequence."
    )
    yield (
        f"{front.considered} shapes, the layouts of {front.predicted} predicted; none of the {len(front.choices)} "
        f"below is beaten in loss, training and serving together (by {LOSS_STEP:g} nats or a tenth of a cost)."
    )


def _row(choice: Choice, asked: Question) -> Iterator[str]:
    speed, served = choice.throughput, choice.serving
    yield f"{choice.loss:.3f} ({choice.loss_low:.3f}-{choice.loss_high:.3f})"
    yield f"{choice.gpu_hours:,.0f}" + _money(choice.gpu_hours, asked)
    yield short(choice.tokens)
    yield str(choice.shape)
    yield f"{short(choice.active)} / {short(choice.parameters)}"
    yield layout(choice)
    yield f"{speed.tokens_per_s / asked.gpus:,.0f}"
    yield f"{served.device_seconds:,.0f} GPU-s" + ("" if served.cost is None else f" = {served.cost:,.2f}")
    yield f"{served.devices} x {served.batch / served.devices:.3g} ({served.bound})"
    yield f"{1e3 * served.token_s:.0f} ms"


def layout(choice: Choice) -> str:
    """ "tp 2 pp 4 ep 64, recompute full": what is not 1."""
    plan = choice.throughput.plan
    if plan is None:
        return "unknown"
    degrees = " ".join(f"{axis} {plan.degree(axis)}" for axis in ("tp", "pp", "vpp", "ep") if plan.degree(axis) > 1)
    return (degrees or "data parallel") + ("" if plan.recompute == "none" else f", recompute {plan.recompute}")


def _money(hours: float, asked: Question) -> str:
    return "" if asked.price_per_hour is None else f" = {hours * asked.price_per_hour:,.0f}"


def _warnings(choices: Sequence[Choice]) -> Iterator[str]:
    """What the best choice extrapolates in full, the others counted."""
    beyond = [choice for choice in choices if choice.warnings]
    if beyond:
        yield f"EXTRAPOLATES: {len(beyond)} of {len(choices)}. {beyond[0].shape}: {'; '.join(beyond[0].warnings)}."


def _notes(front: Front) -> Iterator[str]:
    asked = front.question
    longest = max(choice.tokens for choice in front.choices)
    end = "no end of data was given" if math.isinf(asked.data_tokens) else f"data ends at {short(asked.data_tokens)}"
    yield f"- data: the longest run reads {short(longest)} tokens; {end}"
    if not supported(asked.precision):
        yield f"- what if: the engine does not train in {asked.precision} yet"
    if asked.price_per_hour is None:
        yield "- price: none given, so costs stay in GPU time"
    yield from (f"- {text}" for text in ASSUMED)
    yield "- not on the front: " + "; ".join(f"{count} {reason}" for reason, count in front.refused.items())


def to_json(front: Front) -> dict[str, Any]:
    """Plain values: the question, the front in full and what was left out, by reason."""
    asked = front.question
    question = {name: value for name, value in vars(asked).items() if name != "topology"}
    return {
        "format": stamp(FORMAT, VERSION),
        "question": {
            **question,
            "hardware": asked.topology.name,
            "data_tokens": None if math.isinf(asked.data_tokens) else asked.data_tokens,
        },
        "choices": [_plain(choice) for choice in front.choices],
        "considered": front.considered,
        "predicted": front.predicted,
        "refused": front.refused,
        "assumed": list(ASSUMED),
    }


def _plain(choice: Choice) -> dict[str, Any]:
    speed = choice.throughput
    return {
        "shape": asdict(choice.shape),
        "name": str(choice.shape),
        **{name: getattr(choice, name) for name in ("parameters", "active", "days", "gpu_hours", "tokens")},
        **{name: getattr(choice, name) for name in ("loss", "loss_low", "loss_high")},
        "tokens_per_s": {"predicted": speed.tokens_per_s, "low": speed.low, "high": speed.high},
        "plan": speed.plan.to_dict() if speed.plan else None,
        "memory_bytes": speed.memory_bytes,
        "serving": asdict(choice.serving),
        "warnings": list(choice.warnings),
    }
