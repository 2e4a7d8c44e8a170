"""The page of ``docs/planner-accuracy.md``: what predictions are held to, what they reach, and every residual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from statistics import mean, median

from parallel.planning.accuracy.evaluate import Judged
from parallel.planning.accuracy.held_out import HELD, Accuracy, baselines, gpu_kind, publication
from parallel.planning.accuracy.metrics import Errors, case_of_release, choices, grouped, noise, rankings, stated, timed
from parallel.planning.accuracy.report import constant_text, error_cells, regret_lines, value_text
from parallel.planning.accuracy.targets import targets
from parallel.planning.memory.prediction import NOT_MODELLED
from parallel.planning.plan import ParallelPlan
from parallel.planning.tables import figure, markdown, percent
from parallel.planning.timing.calibration import CONSTANTS
from parallel.planning.timing.hand_set import hand_set

MET = {True: "met", False: "**not met**", None: "unknown"}
#: Rows of the list of the largest errors.
LARGEST = 30
#: What the time model leaves out, as memory's own list does for memory.
TIME_NOT_MODELLED = (
    "a data loader, evaluation, checkpoints and failures",
    "congestion of networks, and how jobs beside a run disturb it",
    "clocks that fall as a chip heats, beside what its power explains",
    "how well one release of a library suits one shape of product: half of the spread between containers",
    "chunks of a pipeline that hold the embedding or the head alone: the next smaller number of chunks is taken",
)


#: Why a line is not met, by how its name begins: what was found when its rows were looked at.
CAUSES = {
    "dense, layout": (
        "without a GPU kind its products, its attention and its early software have the values of other kinds; A100 is "
        "the only one with runs from before FlashAttention"
    ),
    "MoE on NVL72": (
        "all but six of these rows are Megatron-Bridge's: without it the fit sees hardly a mixture of experts in a "
        "rack, and none with fused experts"
    ),
    "Korthikanti": "without A100 nothing is left of software that keeps attention scores in memory and runs in float16",
    "Spearman": (
        "where the runs of one model on one GPU differ by release more than by layout, their order is that of the "
        "releases: Qwen3-30B on H100 went from 5,113 to 9,058 tokens/s a GPU between containers 26.02 and 26.02.01 in "
        "one layout, which no constant of a class explains; groups of four or five runs turn over with one such pair"
    ),
    "throughput of our pick": (
        "the worst cases set a layout that was run under an old release against another one under a new release; "
        "within one release see below"
    ),
}


#: Why a constant may lie outside its physical range: what else the fit may put into it. None is proved.
BEYOND = {
    "precision.fp8": (
        "likeliest, that quantising is counted apart, at all the bytes that it moves by itself, and what kernels "
        "around it take over of that comes back here"
    ),
    "experts": (
        "likeliest, that grouped kernels start a tile while another ends: without the start-up that is counted "
        "(`INNER_HALF`) products of inner dim 1024 take 1.16 times less"
    ),
    "exchange": (
        "inside a domain it multiplies what is already 0.83 of a ring's stream (`SCATTERED`): of the link itself it is "
        "0.83 times as much"
    ),
    "routing.fused": (
        "recipes with fused experts run only under the newest releases, whose own factors hold the gain: the product "
        "of the three is above 1"
    ),
    "stack.automodel": "eight runs of one publication, off by a fifth in the mean, which state little of how they ran",
}


def page(found: Accuracy) -> str:
    """The whole page; the same accuracy gives the same text."""
    sections = (
        _head(found),
        _targets(found),
        *(_groups(found, title, key) for title, key in GROUPS.items()),
        _ranks(found),
        _choices(found),
        _regret(found),
        _bars(found),
        _context(found),
        _constants(found),
        _missing(found),
        _largest(found),
        _residuals(found),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


GROUPS: Mapping[str, Callable[[Judged], str]] = {
    "kind of model": lambda judged: judged.tag("kind"),
    "publication": publication,
    "GPU": gpu_kind,
    "precision": lambda judged: judged.precision,
}


def _head(found: Accuracy) -> Iterator[str]:
    origin, rows = found.calibration.provenance, found.fitted
    yield "# How accurate the planner is"
    yield ""
    yield (
        "Written by `python -m parallel.planning.accuracy --fit`; nothing on this page is edited by hand. "
        f"{len(rows)} published rows ({origin['table']}, SHA-256 {origin['table_sha256'][:12]}), of which "
        f"{sum(row.skipped is None for row in rows)} are modelled and {origin['rows']}, from {origin['publications']} "
        f"publications, have a step time that nobody doubts: the constants are fitted to these. Commit "
        f"{origin['code_commit'] or 'unknown'}, {origin['date'] or 'no date given'}."
    )
    yield ""
    yield (
        "A row is predicted from its layout columns, never from a measured one, by three sets of constants: fitted to "
        "all rows; to the rows of all *other* publications; to the rows on all *other* kinds of GPU (A100 with 40 and "
        "with 80 GB are two kinds; a further column holds both out together). There is no constant of a row or a "
        "model. The constants of a stack cannot be told from its publications where there is one (fsdp: llm-foundry; "
        "torchtitan; automodel; neuron). Settings that a publication's own scripts state "
        "(`parallel/planning/published/`) stay known where it is held out; *source unknown* is the same without them: "
        "the publication is held out, and its name and address are taken off its rows, so that neither stack nor "
        "recipe is recognised, as with the table of somebody who prints layouts alone. "
        "Errors are of step time: predicted over published, less one."
    )


def _targets(found: Accuracy) -> Iterator[str]:
    yield "## What it is held to"
    yield ""
    lines = {name: targets(view) for name, view in (found.views | {"both A100 held out": found.by_chip}).items()}
    rows = []
    for each in zip(*lines.values(), strict=True):
        cells = [f"{MET[target.met]} {target.figures()[1]}" for target in each]
        rows.append((each[0].name, each[0].figures()[0], *cells, each[1].detail))
    rows.append(_count_of_constants())
    yield from markdown(("", "limit", *lines, "with the source held out"), rows, words=(0, -1))
    failed = {
        target.name
        for name, view in lines.items()
        for target in view
        if target.met is False and name != "source unknown"
    }
    for beginning, cause in CAUSES.items():
        if any(name.startswith(beginning) for name in failed):
            yield ""
            yield f"*{beginning}* where it is not met: {cause}."
    unread = sum(each.skipped is not None and known.skipped is None for each, known in _pairs(found))
    yield ""
    yield (
        "*Source unknown*: without the name every stack is taken for Megatron-core (or FSDP, where weights are sharded "
        "alone), and what a table leaves out is not known: modules that are recomputed, the dispatcher, graphs, fused "
        f"kernels, gradients in bfloat16, layers of the stages; {unread} rows can then not be modelled."
    )


def _pairs(found: Accuracy) -> Iterator[tuple[Judged, Judged]]:
    """Each row without its publication's name, and with it."""
    yield from zip(found.nameless, found.fitted, strict=True)


def _count_of_constants() -> tuple[str, ...]:
    count = len(CONSTANTS)
    return ("number of constants", "<= 40", *(f"{MET[count <= 40]} {count}",) * 5, "")


def _groups(found: Accuracy, title: str, key: Callable[[Judged], str]) -> Iterator[str]:
    yield f"## By {title}"
    yield ""
    views = [grouped(timed(view), key) for view in found.views.values()]
    rows = []
    for name in views[0]:
        errors = [Errors.of(each.time_error for each in view.get(name, ())) for view in views]
        short = [cells for held in errors[1:] for cells in (error_cells(held)[1], error_cells(held)[4])]
        rows.append((name or "not named", *error_cells(errors[0]), *short))
    fitted = ("runs", "median", "mean", "max", "<15 %", "bias")
    others = [word for view in list(found.views)[1:] for word in (view, "<15 %")]
    yield from markdown((title, *fitted, *others), rows)


def _ranks(found: Accuracy) -> Iterator[str]:
    yield "## Order of runs"
    yield ""
    yield (
        "Spearman's correlation of predicted and published tokens/s a device, without pairs that lie less than 5 % "
        "apart, for each model with at least four runs; and the same within one GPU kind and precision, where the "
        "runs of a model differ by layout and software only."
    )
    yield ""
    views = [rankings(view, lambda each: each.tag("model")) for view in found.views.values()]
    within = rankings(found.by_source, lambda each: (each.tag("model"), each.tag("gpu"), each.precision))
    rows = []
    for model in views[0]:
        inside = [ranking.correlation for key, ranking in within.items() if key[0] == model]
        told = f"{median(inside):.2f} ({min(inside):.2f} to {max(inside):.2f})" if inside else "-"
        cells = (f"{view[model].correlation:.2f}" if model in view else "-" for view in views)
        rows.append((model, str(views[0][model].runs), *cells, str(len(inside)), told))
    head = ("model", "runs", *found.views, "groups within", "median (range) of them, source held out")
    yield from markdown(head, rows)


def _choices(found: Accuracy) -> Iterator[str]:
    yield "## Choice among published layouts"
    yield ""
    picks = choices(found.by_source)
    lost = {name: choice for name, choice in picks.items() if choice.kept < 1}
    yield (
        f"{len(picks)} cases of one model, GPU, number of them, precision, window and batch have several published "
        f"layouts. With the source held out our pick is the fastest in {len(picks) - len(lost)} of them; the others:"
    )
    yield ""
    rows = [
        (" ".join(map(str, name)), str(choice.layouts), str(choice.picked), str(choice.best), percent(choice.kept))
        for name, choice in sorted(lost.items(), key=lambda item: item[1].kept)
    ]
    yield from markdown(("case", "layouts", "our row", "fastest row", "throughput kept"), rows)
    same = choices(found.by_source, case_of_release)
    if same:
        kept = [choice.kept for choice in same.values()]
        yield ""
        yield (
            f"Among layouts that one publication ran under one release: {len(same)} cases, {percent(mean(kept))} of "
            f"the best throughput in the mean, {percent(min(kept))} in the worst."
        )


def _regret(found: Accuracy) -> Iterator[str]:
    yield "## The planner's own choice"
    yield ""
    yield (
        "What the planner would have run in place of each published layout, on the same devices and by the same way of "
        "execution, both predicted. Above zero the planner, by its own lights, chose worse than the publication."
    )
    yield ""
    yield from (f"- {line}" for line in regret_lines(found.fitted, found.regrets))


def _bars(found: Accuracy) -> Iterator[str]:
    yield "## Error bars"
    yield ""
    spreads = ", ".join(f"{spread:.3g} for {kind} models" for kind, spread in found.calibration.spreads.items())
    yield (
        f"A prediction's bar reaches a factor under and over it that {HELD:.0%} of the runs lie within when their "
        f"source is held out: {spreads}."
    )


def _context(found: Accuracy) -> Iterator[str]:
    """What the errors are to be read beside: noise of the measurements, and what needs no model."""
    yield "## Noise, and what a planner has to beat"
    yield ""
    same = sorted(noise(found.fitted))
    yield (
        f"- {len(same)} sets of rows are one layout on one machine under one release, for all that their columns tell: "
        f"slowest over fastest is {percent(median(same))} in the median, {percent(same[int(0.9 * len(same))])} in one "
        f"of ten, {percent(same[-1])} at most."
        if same
        else "- no two rows are one layout under one release."
    )
    for kind, errors in baselines(found.fitted).items():
        yield (
            f"- {kind}: the median throughput (model FLOP/s) of each GPU, precision and kind of model, taken for each "
            f"of its runs, is off by {percent(errors.median)} in the median and {percent(errors.mean)} in the mean, "
            f"with {percent(errors.good, 0)} within 15 %; it knows the very runs that it predicts."
        )


def _constants(found: Accuracy) -> Iterator[str]:
    yield "## Constants"
    yield ""
    yield f"{len(CONSTANTS)}, each of a class of hardware or software. A factor is shown as x 1.05."
    yield ""
    values = found.calibration.values
    rows = [
        (each.name, constant_text(each, values[each.name]), constant_text(each, each.prior), each.meaning)
        for each in CONSTANTS
    ]
    yield from markdown(("constant", "fitted", "believed before", "meaning"), rows, words=(0, -1))
    if outside := [each for each in CONSTANTS if not each.is_physical(values[each.name])]:
        yield ""
        yield "Of these some lie outside what they can be if they are what they are called:"
        yield ""
    for each in outside:
        limit = f"at most {each.most:g}" if each.natural(values[each.name]) > each.most else f"at least {each.least:g}"
        reason = BEYOND.get(each.name, "not understood")
        yield f"- `{each.name}` {constant_text(each, values[each.name])}, {limit}: {reason}."
    yield ""
    yield "Set by hand, and not fitted; where each comes from stands beside it in the code under `parallel/planning/`:"
    yield ""
    by_hand = [(each.name, value_text(each.value), each.meaning, f"`{each.where}`") for each in hand_set()]
    yield from markdown(("number", "value", "meaning", "where"), by_hand, words=(0, 2, 3))


def _missing(found: Accuracy) -> Iterator[str]:
    yield "## What is not modelled"
    yield ""
    yield from (f"- time: {text}" for text in TIME_NOT_MODELLED)
    yield from (f"- memory: {text}" for text in NOT_MODELLED)
    reasons = Counter(row.skipped for row in found.fitted if row.skipped is not None)
    yield from (f"- {count} rows: {reason}" for reason, count in reasons.items())
    unsound = [row for row in found.fitted if row.run and row.measured.step_time_s and not row.sound]
    yield (
        f"- {len(unsound)} rows are predicted and do not count for time: doubted, of an unknown number of devices, or "
        "run in a deterministic mode."
    )


def _largest(found: Accuracy) -> Iterator[str]:
    yield "## Largest errors"
    yield ""
    yield "With the source held out, and what was assumed where the row is silent."
    yield ""
    worst = sorted(timed(found.by_source), key=lambda each: -abs(each.time_error or 0.0))[:LARGEST]
    rows = [
        (
            str(each.row),
            publication(each),
            each.tag("model"),
            each.tag("gpu"),
            percent(each.time_error, sign=True),
            "; ".join(text.split(": http")[0] for text in each.run.assumed) if each.run else "",
        )
        for each in worst
    ]
    yield from markdown(("row", "publication", "model", "GPU", "error", "assumed"), rows, words=(1, 2, 3, 5))


def _residuals(found: Accuracy) -> Iterator[str]:
    yield "## Every row"
    yield ""
    yield (
        "Seconds published and predicted, errors in percent; s: layout fully stated; *: not counted for time. Memory: "
        "GB allocated, published and predicted, and the upper bound."
    )
    yield ""
    others = [{each.row: each for each in view} for view in list(found.views.values())[1:]]
    fully = {each.row for each in stated(found.fitted)}
    lines = []
    for each in found.fitted:
        if each.run is None:
            continue
        errors = (percent(view.time_error, sign=True) for view in (each, *(rows[each.row] for rows in others)))
        mark = "s" if each.row in fully else "" if each.sound else "*"
        memory = (each.measured.mem_per_gpu_gb, each.memory_gb, each.memory_upper_gb)
        cells = ("-",) * 3 if memory[0] is None else tuple(map(figure, memory))
        what = (publication(each), each.tag("model"), each.tag("gpu"), each.precision, layout_words(each.run.plan))
        lines.append(
            (f"{each.row}{mark}", *what, figure(each.measured.step_time_s), figure(each.step_s), *errors, *cells)
        )
    head = (
        *("row", "publication", "model", "GPU", "precision", "layout", "published", "predicted"),
        *("error", *list(found.views)[1:], "memory", "predicted", "bound"),
    )
    yield from markdown(head, lines, words=range(1, 6))


def layout_words(plan: ParallelPlan) -> str:
    """ "256: tp4 pp8 vpp4 mb1 zero3 full": devices, what is not 1, and what is not usual."""
    degrees = [f"{axis}{plan.degree(axis)}" for axis in ("tp", "cp", "pp", "vpp", "ep", "etp") if plan.degree(axis) > 1]
    more = [f"zero{plan.zero}"] * (plan.zero != 1) + [plan.recompute] * (plan.recompute != "none")
    return " ".join([f"{plan.world_size}:", *degrees, f"mb{plan.micro_batch}", *more])
