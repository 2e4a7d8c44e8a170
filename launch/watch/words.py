"""A run's status in lines for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from launch.watch.record import AttemptStatus, Health, Status
from pretrain.figures.markup import UNKNOWN, duration, number, share, short

#: Notes that are shown, the newest; attempts likewise.
NOTES, ATTEMPTS = 8, 12
#: Characters of the bar, and of a sentence in a list.
BAR, SENTENCE = 32, 160
#: What is said where nobody writes down how the ranks do.
NO_HEARTBEATS = "how they do is unknown: heartbeats come with stoker train and stoker launch"
#: Ranks that are named; of more, the number.
NAMED = 12

Style = Callable[..., str]


def lines(status: Status, colour: bool = True) -> Iterator[str]:
    """The status, a line each; ``colour``: with the escape codes of a terminal."""
    paint: Style = typer.style if colour else _plain
    state = paint(status.state.value, fg=_colour_of(status), bold=True)
    which = f", attempt {status.attempt}" if status.attempt is not None and status.state.is_under_way else ""
    yield f"{paint(status.name, bold=True)}  {state}{which}" + (f": {one_line(status.words)}" if status.words else "")
    for name, value in facts(status):
        yield f"  {paint(f'{name:<9}', dim=True)} {value}"
    if status.attempts:
        yield "  " + paint("attempts", dim=True)
        yield from (f"    {line}" for line in _attempts(status, paint))
    if status.notes:
        yield "  " + paint("notes", dim=True)
        yield from (f"    {note_line(note)}" for note in status.notes[-NOTES:])
    for sentence in status.unreadable:
        yield "  " + paint(f"not shown: {one_line(sentence)}", fg="yellow")


def facts(status: Status) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which one asks."""
    yield "step", _progress(status)
    if status.step:
        yield (
            "loss",
            f"{number(status.loss)} nats a token, gradient norm {number(status.grad_norm)}, "
            + (
                f"learning rate {number(status.lr, 3)}"
                + (f", {status.skipped:,} steps skipped" if status.skipped else "")
            ),
        )
        yield "speed", speed(status)
    yield "useful", useful(status)
    if status.ranks:
        yield "ranks", ranks(status)
    if status.restarts or status.faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(status.faults.items()))
        yield "restarts", f"{status.restarts:,}" + (f"; faults: {kinds}" if kinds else "")
    yield "disk", disk(status)


def _progress(status: Status) -> str:
    if status.steps is None:
        return f"{status.step:,} (the run's length is {UNKNOWN})"
    part = min(1.0, status.step / status.steps)
    filled = int(part * BAR)
    bar = "━" * filled + "╌" * (BAR - filled)
    left = f", {clock(status.time_left_s)} left" if status.state.is_under_way else ""
    return f"{status.step:,} of {status.steps:,}  {bar} {100 * part:.1f} %{left}"


def speed(status: Status) -> str:
    tokens = UNKNOWN if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}"
    took = UNKNOWN if status.step_time_s is None else f"{number(status.step_time_s, 3)} s"
    mfu = UNKNOWN if status.mfu is None else f"{100 * status.mfu:.1f} %"
    return f"{tokens} tokens/s, {took} a step, MFU {mfu}; {short(status.tokens)} tokens so far"


def useful(status: Status) -> str:
    """Where the time went, in a line."""
    found = status.useful
    if found.share is None:
        return f"{UNKNOWN} share; {duration(found.useful_s)} in steps that stand"
    redone = f"; {duration(found.redone_s)} in {found.redone_steps:,} steps done again" if found.redone_steps else ""
    return f"{share(found.share)} of {duration(found.elapsed_s or 0.0)} in steps that stand{redone}"


def ranks(status: Status) -> str:
    """How many, where, and which of them are not well."""
    nodes = {rank.node for rank in status.ranks if rank.node is not None}
    where = f" on {len(nodes):,} nodes" if len(nodes) > 1 else f" on {next(iter(nodes))}" if nodes else ""
    counted = Counter(rank.health for rank in status.ranks)
    known = [health for health in Health if counted[health] and health not in (Health.WELL, Health.UNKNOWN)]
    said = [f"{health.value}: {ranks_named([r.rank for r in status.ranks if r.health is health])}" for health in known]
    if status.state.is_under_way and counted[Health.WELL] == len(status.ranks):
        said.append("all well")
    if status.state.is_under_way and counted[Health.UNKNOWN] == len(status.ranks):
        said.append("no heartbeat yet" if nodes else NO_HEARTBEATS)
    return f"{len(status.ranks):,}{where}" + "".join(f"; {words}" for words in said)


def ranks_named(numbers: Sequence[int]) -> str:
    """Ranks in a few words: 0, 3 to 7 and 12 more."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(numbers):
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs[:NAMED])
    rest = sum(b - a + 1 for a, b in runs[NAMED:])
    return f"{shown} and {rest:,} more" if rest else shown


def disk(status: Status) -> str:
    steps = ", ".join(f"{step:,}" for step in status.committed[-4:])
    kept = f"checkpoints of steps {steps}" if len(status.committed) > 1 else f"checkpoint of step {steps}"
    found = status.disk
    held = kept if status.committed else "no checkpoint"
    if found is None:
        return f"{UNKNOWN}; {held}"
    return f"{size(found.run)} ({size(found.checkpoints)} in checkpoints), {size(found.free)} free; {held}"


def _attempts(status: Status, paint: Style) -> Iterator[str]:
    hidden = len(status.attempts) - ATTEMPTS
    if hidden > 0:
        yield f"... {hidden:,} earlier ones"
    for attempt in status.attempts[-ATTEMPTS:]:
        outcome = paint(f"{outcome_of(attempt):<18}", fg=None if attempt.outcome in ("done", "running") else "yellow")
        yield f"{attempt.number:>3}  {outcome} {steps_of(attempt):<22} {duration_of(attempt):>14}  {cause_of(attempt)}"


def outcome_of(attempt: AttemptStatus) -> str:
    """How it ended: ``fault (signal)``."""
    kind = attempt.kind
    return f"{attempt.outcome}" + (f" ({kind})" if kind not in (None, attempt.outcome, "unknown", "verdict") else "")


def steps_of(attempt: AttemptStatus) -> str:
    if attempt.first_step is None or attempt.last_step is None:
        return "no step stands"
    return f"steps {attempt.first_step:,} to {attempt.last_step:,}"


def duration_of(attempt: AttemptStatus) -> str:
    return UNKNOWN if attempt.seconds is None else duration(attempt.seconds)


def cause_of(attempt: AttemptStatus) -> str:
    cause = one_line(attempt.cause)
    named = attempt.rank is not None and f"rank {attempt.rank}" not in cause
    return f"rank {attempt.rank}: {cause}" if named else cause


def note_line(note: Any) -> str:
    where = [f"step {note.step:,}"] if note.step is not None else []
    where += [f"attempt {note.attempt}"] if note.attempt is not None else []
    where += [f"rank {note.rank}"] if note.rank is not None and f"rank {note.rank}" not in note.text else []
    moment = (note.time or "")[:19].replace("T", " ")
    return f"{moment}  {note.kind:<9} {one_line(note.text)}" + (f" ({', '.join(where)})" if where else "")


def one_line(text: str) -> str:
    """The beginning of a text, on one line, without what acts on a terminal."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= SENTENCE else flat[: SENTENCE - 3] + "..."


def printable(text: str) -> str:
    """With control characters, which could act on a terminal, written out; tabs stay.

    >>> printable("a\\x1b[31mb\\tc")
    'a\\\\x1b[31mb\\tc'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    days, rest = divmod(round(seconds), 86400)
    return f"{days} d {rest // 3600} h" if days else duration(seconds)


def size(count: int) -> str:
    """Bytes in decimal units.

    >>> size(999), size(90_361_856), size(1_500_000_000_000)
    ('999 B', '90.4 MB', '1.5 TB')
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _colour_of(status: Status) -> str:
    return "red" if status.state.is_bad else "green" if status.state.is_under_way or status.step else "yellow"


def _plain(text: str, **style: Any) -> str:
    return text
