"""Hardware chooses the model: which shapes are worth training on given GPUs for given days, and serving. No torch.

    front = search(Question(load_hardware("gb200-nvl72"), gpus=576, days=30, serve_context=131_072))
    print(report(front))                                                         # design_report.py

Every shape (``shapes.py``) gets a loss, by a scaling law at the tokens that its *predicted* throughput allows
(``throughput.py``), and a cost to serve (``serving.py``). What none beats in loss, training and serving at once is the
answer: a front, not a point, since nobody here knows how many tokens will be served.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from parallel.planning.design.scaling_laws import JOINT, RATIO_LOSS, LossLaw
from parallel.planning.design.serving import Serving, serve
from parallel.planning.design.shapes import Shape, shapes
from parallel.planning.design.throughput import Throughput, short_list, usable
from parallel.planning.execution import Precision
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload
from stoker.errors import Refusal

#: Of the days asked for, how many a run may take: a shorter run trains fewer tokens of the same shape.
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
#: No run does better: the best published MFU is 60 % (H100, bfloat16, dense). Bounds what need not be tried.
MOST_MFU = 0.65
#: Training tokens per active parameter. Compute-optimal models have 20 and more; Sardana et al. 2024 trained to 10,000.
TOKENS_PER_PARAMETER = (5.0, 10_000.0)
#: Differences that count for nothing: nats, and ratios of cost. Laws and rooflines are not finer than this.
LOSS_STEP, COST_STEP = 0.01, 1.1
SECONDS = 86_400.0  # of a day

#: Tokens a second of a workload under its best layout; None where none fits.
Predictor = Callable[[Workload], Throughput | None]


@dataclass(frozen=True)
class Question:
    """``gpus`` are billed for at most ``days``, whether they are ranks or spares. ``seq_len``: of training;
    ``serve_context``: tokens of each sequence while it is decoded; ``batch_tokens``: of a training step.
    ``data_tokens``: where a run ends, since it has read all there is; left out, data has no end.
    ``price_per_hour``: of one GPU, in any currency; left out, costs stay GPU-seconds."""

    topology: HardwareTopology
    gpus: int
    days: float
    serve_context: int
    seq_len: int = 8192
    batch_tokens: int = 2**24
    data_tokens: float = math.inf
    precision: Precision = "bfloat16"
    serve_precision: Precision = "bfloat16"
    price_per_hour: float | None = None
    vocab: int = 131_072

    def __post_init__(self) -> None:
        for name in ("gpus", "days", "serve_context", "seq_len", "batch_tokens", "data_tokens", "vocab"):
            if not getattr(self, name) > 0:
                raise Refusal(f"{name}={getattr(self, name)} must be above zero")
        for name in ("days", "price_per_hour"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise Refusal(f"{name}={value} must be above zero and finite")
        if self.batch_tokens % self.seq_len:
            raise Refusal(f"batch_tokens={self.batch_tokens} must be whole windows of seq_len={self.seq_len}")
        for precision in (self.precision, self.serve_precision):
            self.topology.peak(precision)

    def trained(self, part: float, tokens_per_s: float) -> tuple[float, float]:
        """(tokens, days) of a run that takes ``part`` of the days, or until data ends."""
        days = min(part * self.days, self.data_tokens / tokens_per_s / SECONDS)
        return SECONDS * days * tokens_per_s, days


@dataclass(frozen=True)
class Choice:
    """One shape trained for some days. ``loss`` in nats a token of the law's data, from ``loss_low`` to ``loss_high``
    by the error bars of the throughput alone. ``active``: parameters that a token meets, embedding left out.
    ``warnings``: where the law extrapolates."""

    shape: Shape
    parameters: int
    active: int
    throughput: Throughput
    days: float
    gpu_hours: float
    tokens: float
    loss: float
    loss_low: float
    loss_high: float
    serving: Serving
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Front:
    """``choices`` that none beats, best loss first; ``considered`` shapes, of which ``predicted`` had their layouts
    tried and ``refused`` fell out, by reason."""

    question: Question
    choices: tuple[Choice, ...]
    considered: int
    predicted: int
    refused: dict[str, int]


#: Loss, training GPU-hours and GPU-seconds of a million tokens served, in steps that count for something; less is
#: better.
Cell = tuple[int, int, int]


@dataclass(frozen=True)
class _Candidate:
    """A shape whose loss and serving are known; ``most_tokens_per_s``: its throughput at ``MOST_MFU``."""

    shape: Shape
    workload: Workload
    active: int
    serving: Serving
    law: LossLaw
    most_tokens_per_s: float

    def loss(self, tokens: float) -> float:
        return self.law.loss(self.active, tokens) + RATIO_LOSS[self.shape.linear]

    def cell(self, question: Question, part: float, tokens_per_s: float) -> Cell:
        tokens, days = question.trained(part, tokens_per_s)
        loss, hours, served = self.loss(tokens), 24 * days * question.gpus, self.serving.device_seconds
        return round(loss / LOSS_STEP), round(math.log(hours, COST_STEP)), round(math.log(served, COST_STEP))

    def choice(self, question: Question, part: float, throughput: Throughput) -> Choice:
        tokens, days = question.trained(part, throughput.tokens_per_s)
        low, high = (self.loss(question.trained(part, rate)[0]) for rate in (throughput.high, throughput.low))
        shape = self.shape
        warnings = JOINT.extrapolates(self.active, tokens, shape.expansion, shape.granularity)
        return Choice(
            shape,
            self.workload.parameters,
            self.active,
            throughput,
            days,
            24 * days * question.gpus,
            tokens,
            self.loss(tokens),
            low,
            high,
            self.serving,
            tuple(warnings),
        )


def search(question: Question, predict: Predictor | None = None, among: Iterable[Shape] | None = None) -> Front:
    """The front of ``among``, by default of every shape for the machine. The same question has the same answer.

    ``predict``: by default the best of a short list of layouts. A shape that would lose to one already predicted even
    at ``MOST_MFU`` is not predicted. Refuses where no shape can be trained.
    """
    topology = question.topology
    predict = predict or short_list(topology, question.gpus, question.batch_tokens, question.precision)
    every = list(shapes(topology, question.vocab) if among is None else among)
    refused: Counter[str] = Counter()
    waiting: list[tuple[list[Cell], int, _Candidate]] = []
    for index, shape in enumerate(every):
        try:
            candidate = _candidate(shape, question)
        except _Unfit as unfit:
            refused[str(unfit)] += 1
            continue
        best = [candidate.cell(question, part, candidate.most_tokens_per_s) for part in FRACTIONS]
        waiting.append((best, index, candidate))
    front: dict[Cell, Choice] = {}
    predicted = 0
    for bounds, _, candidate in sorted(waiting, key=lambda entry: entry[:2]):
        if all(any(_no_worse(cell, bound) for cell in front) for bound in bounds):
            refused["beaten even if it ran at the best speed ever published"] += 1
            continue
        predicted += 1
        throughput = predict(candidate.workload)
        if throughput is None:
            refused["no layout fits these GPUs"] += 1
            continue
        for part in FRACTIONS:
            cell = candidate.cell(question, part, throughput.tokens_per_s)
            _add(front, cell, candidate.choice(question, part, throughput))
    if not front:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(refused.items()))
        raise Refusal(
            f"no shape can be trained on {question.gpus} {topology.name} in {question.days:g} days: {reasons}"
        )
    choices = sorted(front.values(), key=lambda choice: (choice.loss, choice.gpu_hours, str(choice.shape)))
    return Front(question, tuple(choices), len(every), predicted, dict(sorted(refused.items())))


class _Unfit(Exception):
    """Why a shape is not worth a prediction, in the words that are counted."""


def _candidate(shape: Shape, question: Question) -> _Candidate:
    workload = shape.workload(question.seq_len)
    active = workload.active_parameters - workload.embedding.active_parameters
    ranks, _ = usable(question.topology, question.gpus)
    most = MOST_MFU * ranks * question.topology.peak(question.precision) / workload.training_flops
    ratio = question.trained(1.0, most)[0] / active
    low, high = TOKENS_PER_PARAMETER
    if ratio < low:
        raise _Unfit(f"fewer than {low:g} training tokens a parameter")
    if ratio > high:
        raise _Unfit(f"more than {high:g} training tokens a parameter")
    law = JOINT.at(shape.expansion, shape.granularity)
    try:
        serving = serve(
            workload,
            shape.caches(),
            question.topology,
            question.serve_context,
            precision=question.serve_precision,
            price_per_hour=question.price_per_hour,
        )
    except Refusal:
        raise _Unfit("too large to be served") from None
    return _Candidate(shape, workload, active, serving, law, most)


def _no_worse(one: Cell, other: Cell) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one[2] <= other[2]


def _add(front: dict[Cell, Choice], cell: Cell, choice: Choice) -> None:
    """Put the choice on the front unless one there is no worse, and take off what it beats."""
    if any(_no_worse(other, cell) for other in front):
        return
    for other in [other for other in front if _no_worse(cell, other)]:
        del front[other]
    front[cell] = choice
