"""The errors of an attempt, the first and guilty one first; what the other ranks said after it, alike ones together."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.supervise.logs import stack_path
from launch.watch.logs import LogLine, RankFile, logged_attempt, rank_files, torchrun_lines
from launch.watch.words import printable, ranks_named
from pretrain.attempt import Exit, read_exit
from pretrain.rundir import attempt_path
from stoker.secrets import mask

#: What begins an error: Python's traceback, a fatal signal in faulthandler's words, C++, or a sentence of Stoker's.
BEGIN = re.compile(
    r"Traceback \(most recent call last\)|Fatal Python error|Current thread 0x|terminate called"
    r"|refused: |rank \d+: |[A-Za-z_.]+(Error|Exception|Interrupt)(:|$)"
)
#: What joins two tracebacks into one.
CHAIN = ("During handling of the above exception", "The above exception was the direct cause")
#: Last lines of standard error that stand for an error which was not announced; errors of a rank; lines of one.
LAST, MOST_ERRORS, LONGEST = 20, 4, 200


@dataclass(frozen=True)
class Error:
    """Lines of standard error that belong together, and when the first was printed."""

    time: str
    lines: tuple[str, ...]


def error_lines(run_dir: Path, attempt: int | None = None, rank: int | None = None) -> Iterator[str]:
    """Why an attempt ended, then the errors that its ranks printed: of the rank to blame, then of the others in order
    of time. ``rank``: of this one only."""
    number = logged_attempt(run_dir, attempt)
    ended = read_exit(attempt_path(run_dir, number))
    yield from _ending(number, ended)
    files = rank_files(run_dir, number, rank)
    if not files:
        yield from torchrun_lines(run_dir, number)
        return
    guilty = ended.rank if ended is not None else None
    found = {of_rank: list(errors_of(RankFile(of_rank, path).lines())) for of_rank, path in files.items()}
    if guilty in files:
        own = found.pop(guilty) or last_words(RankFile(guilty, files[guilty]).lines())
        yield from _told(f"rank {guilty}, to blame", own)
        yield from _stack(run_dir, number, guilty)
    yield from _others(found)


def errors_of(lines: Iterable[LogLine]) -> Iterator[Error]:
    """The errors in a rank's lines, in order."""
    held: list[str] = []
    began, open_ = "", False  # open_: the error under way has not come to its last line
    for line in lines:
        if line.stream != "err":
            continue
        text = line.text
        chained = held and (text.startswith(CHAIN) or (not text.strip() and not open_))
        if BEGIN.match(text) and not open_:
            follows = bool(held) and any(part.startswith(CHAIN) for part in held[-3:])
            if held and not follows:
                yield _error(began, held)
                held = []
            began = began if follows else line.time
            held.append(text)
            open_ = text.startswith(("Traceback", "Fatal", "Current"))
        elif open_:
            held.append(text)
            open_ = text[:1].isspace() or not text.strip()
        elif chained:
            held.append(text)
        elif held:
            yield _error(began, held)
            held = []
    if held:
        yield _error(began, held)


def last_words(lines: Iterable[LogLine]) -> list[Error]:
    """What a rank printed last on standard error, where it announced no error: a killed one has no time to."""
    kept = deque((line for line in lines if line.stream == "err"), maxlen=LAST)
    return [_error(kept[0].time, [line.text for line in kept])] if kept else []


def _error(began: str, lines: list[str]) -> Error:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    cut = len(lines) - LONGEST
    if cut > 0:
        half = LONGEST // 2
        lines = [*lines[:half], f"... {cut:,} lines ...", *lines[-half:]]
    return Error(began, tuple(lines))


def _ending(number: int, ended: Exit | None) -> Iterator[str]:
    if ended is None:
        yield f"attempt {number}: it has not said how it ended (it runs, or was killed)"
        return
    kind = getattr(ended, "kind", None)
    how = ended.exit_class.value + (f" ({kind})" if kind not in (None, ended.exit_class.value) else "")
    step = getattr(ended, "step", None)
    where = ([] if ended.rank is None else [f"rank {ended.rank}"]) + ([] if step is None else [f"step {step}"])
    yield f"attempt {number}: {how}" + (f", {', '.join(where)}" if where else "")
    if ended.cause:
        yield f"  {mask(printable(' '.join(ended.cause.split())))}"


def _told(who: str, errors: list[Error]) -> Iterator[str]:
    yield ""
    if not errors:
        yield f"{who}: printed nothing on standard error"
        return
    for error in errors[:MOST_ERRORS]:
        yield f"{who}, {error.time}"
        yield from (f"  {mask(printable(line))}" for line in error.lines)
    if len(errors) > MOST_ERRORS:
        yield f"  and {len(errors) - MOST_ERRORS:,} errors more: stoker logs --rank"


def _others(found: dict[int, list[Error]]) -> Iterator[str]:
    """Ranks that said the same are told of together, in the order of the first of them."""
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for rank, errors in sorted(found.items(), key=lambda item: (item[1][0].time if item[1] else "", item[0])):
        if errors:
            alike.setdefault(tuple(_likeness(error, rank) for error in errors), []).append(rank)
    for ranks in alike.values():
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks_named(ranks)}"
        yield from _told(who, found[ranks[0]])


def _likeness(error: Error, rank: int) -> tuple[str, ...]:
    """What two ranks print of one error but for their own number, addresses and ports."""
    return tuple(re.sub(rf"\brank {rank}\b|0x[0-9a-f]+|\[[^\]]*\]:\d+|:\d+\b", "*", line) for line in error.lines)


def _stack(run_dir: Path, attempt: int, rank: int) -> Iterator[str]:
    """Where a rank stood when it was ended, which says what a hang waited for."""
    path = stack_path(run_dir, attempt, rank)
    if path.exists() and path.stat().st_size:
        yield ""
        yield f"rank {rank}, where it stood ({path}; the other ranks' are beside it)"
        yield from (f"  {mask(printable(line))}" for line in path.read_text("utf-8", "replace").splitlines()[:LONGEST])
