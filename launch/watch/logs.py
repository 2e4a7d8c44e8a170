"""What the ranks of an attempt printed, as one stream: merged by time, and as it comes.

A rank's file has lines ``<ISO time> <out|err> text`` (``launch/supervise/logs.py``); a line that has none belongs to
the one before. Files are read piece by piece and none is held open, so that ten thousand ranks are no trouble.
"""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.supervise.logs import folder
from launch.watch.tail import Tail
from launch.watch.words import printable, ranks_named
from pretrain.rundir import attempt_path, attempts
from stoker.errors import Refusal
from stoker.secrets import mask

LOG = re.compile(r"rank_(\d+)\.log")
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\S+) (out|err) ?(.*)", re.DOTALL)
#: The log of an attempt that torchrun ran without a supervisor.
TORCHRUN_LOG = "torchrun.log"
#: Bytes of a file that are read at once; seconds between two looks at growing files.
PIECE, EVERY_S = 1 << 16, 0.25


@dataclass(frozen=True, order=True)
class LogLine:
    """A line that a rank printed; ordered by time, then by rank and place in its file. ``stream``: out or err."""

    time: str
    rank: int
    place: int
    stream: str
    text: str

    def __str__(self) -> str:
        return f"{self.time}  rank {self.rank}  {self.stream}  {mask(printable(self.text))}"


def log_lines(run_dir: Path, attempt: int | None = None, rank: int | None = None) -> Iterator[str]:
    """The lines of an attempt, by default of the newest that has a log, in order of time. Raises Refusal where there
    are none."""
    number = logged_attempt(run_dir, attempt)
    files = rank_files(run_dir, number, rank)
    if files:
        return (str(line) for line in heapq.merge(*(RankFile(*item).lines() for item in files.items())))
    return torchrun_lines(run_dir, number)


def follow_lines(run_dir: Path, attempt: int | None = None, rank: int | None = None) -> Iterator[str]:
    """The lines so far, then those that come; of later attempts too, unless one was asked for. Ends with the run."""
    from launch.watch.observe import Observer

    observer = Observer(run_dir)
    files: dict[tuple[int, int], RankFile] = {}
    numbers = [attempt] if attempt is not None else _logged(run_dir)[-1:]
    while True:
        under_way = observer.is_under_way()
        if attempt is None:
            newest = numbers[-1] if numbers else 0
            numbers += [number for number in _logged(run_dir) if number > newest]
        for number in numbers[-2:]:  # the one before may have last words
            for of_rank, path in rank_files(run_dir, number, rank, required=False).items():
                files.setdefault((number, of_rank), RankFile(of_rank, path))
        yield from map(str, heapq.merge(*(file.lines() for file in files.values())))
        if not under_way:
            return
        time.sleep(EVERY_S)


class RankFile:
    """A rank's log, from where it was read to last."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank = rank
        self._tail = Tail(path, PIECE)
        self._place = 0
        self._last = ("", "out")

    def lines(self) -> Iterator[LogLine]:
        """What came since the last time."""
        self._tail.begins_anew()
        while block := next(self._tail.blocks(), None):
            for raw in block[:-1].split(b"\n"):
                found = LINE.fullmatch(raw.decode("utf-8", "replace"))
                if found:
                    self._last = (found[1], found[2])
                text = found[3] if found else raw.decode("utf-8", "replace")
                self._place += 1
                yield LogLine(self._last[0], self.rank, self._place, self._last[1], text)


def rank_files(run_dir: Path, attempt: int, rank: int | None, required: bool = True) -> dict[int, Path]:
    """Logs of an attempt by rank; of one rank if asked for, which must then have one if ``required``."""
    found = {
        int(name[1]): path for path in folder(run_dir, attempt).glob("rank_*.log") if (name := LOG.fullmatch(path.name))
    }
    if rank is None:
        return dict(sorted(found.items()))
    if rank in found:
        return {rank: found[rank]}
    if required:
        known = f"it has ranks {ranks_named([*found])}" if found else "it kept no log by rank"
        raise Refusal(f"attempt {attempt} of {run_dir} has no log of rank {rank}: {known}")
    return {}


def logged_attempt(run_dir: Path, attempt: int | None) -> int:
    """The attempt to tell of: the one asked for, or the newest that has a log. Raises Refusal where there is none."""
    known, logged = attempts(run_dir), _logged(run_dir)
    if attempt is not None:
        if attempt not in known and attempt not in logged:
            has = f"it has {ranks_named(known)}" if known else "it has none yet"
            raise Refusal(f"{run_dir} has no attempt {attempt}: {has}")
        return attempt
    if not logged:
        why = "they went to the terminal of torchrun" if known else "no attempt has begun"
        raise Refusal(f"{run_dir} holds no logs: {why}. stoker train and stoker launch keep them")
    return logged[-1]


def torchrun_lines(run_dir: Path, attempt: int) -> Iterator[str]:
    """What torchrun said of an attempt that had no supervisor."""
    path = attempt_path(run_dir, attempt) / TORCHRUN_LOG
    if not path.exists():
        raise Refusal(
            f"attempt {attempt} of {run_dir} kept no log: what it printed went to the terminal of torchrun. "
            "stoker train and stoker launch keep it"
        )
    return (mask(printable(line)) for line in path.read_text("utf-8", "replace").splitlines())


def _logged(run_dir: Path) -> list[int]:
    with_ranks = (int(path.name) for path in _folders(run_dir / "logs") if any(path.glob("rank_*.log")))
    with_torchrun = (n for n in attempts(run_dir) if (attempt_path(run_dir, n) / TORCHRUN_LOG).exists())
    return sorted({*with_ranks, *with_torchrun})


def _folders(root: Path) -> Iterable[Path]:
    return (path for path in root.glob("*") if path.name.isdigit() and path.is_dir())
