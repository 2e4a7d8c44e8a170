"""What ranks print: a log file each, with time and stream before every line, and the lines a person should see at once.

``<ISO time with milliseconds> <out|err> text``, UTC. Secrets are masked before a line goes anywhere.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from stoker.secrets import mask

Stream = Literal["out", "err"]

#: A line that has no end by then is cut into several.
LONGEST_LINE = 64 * 1024
#: Last lines of standard error that are remembered, to say why a rank ended that could not say it itself.
REMEMBERED = 40


def folder(run_dir: Path, attempt: int) -> Path:
    return run_dir / "logs" / f"{attempt:04d}"


def log_path(run_dir: Path, attempt: int, rank: int) -> Path:
    return folder(run_dir, attempt) / f"rank_{rank:05d}.log"


def stack_path(run_dir: Path, attempt: int, rank: int) -> Path:
    return folder(run_dir, attempt) / f"stack_{rank:05d}.txt"


class RankLog:
    """Takes the bytes that a rank prints. ``show_out``: its standard output is also shown here; errors always are.

    A disk that is full, or a terminal that has gone, costs lines and never the run.
    """

    def __init__(self, path: Path, show_out: bool) -> None:
        self._shown = {"out": show_out, "err": True}
        self._partial: dict[Stream, bytes] = {"out": b"", "err": b""}
        self.last_errors: deque[str] = deque(maxlen=REMEMBERED)
        self._file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the rank
        except OSError as error:
            _say(f"{path} cannot be written, so this rank has no log: {error}")

    def take(self, stream: Stream, data: bytes) -> None:
        """The next bytes of a stream, cut anywhere."""
        data = self._partial[stream] + data
        whole, newline, rest = data.rpartition(b"\n")
        if len(rest) > LONGEST_LINE:
            whole, newline, rest = data, b"\n", b""
        self._partial[stream] = rest
        if newline:
            self._write(stream, whole)

    def close(self) -> None:
        """The rank has ended: what it began to print is a line too."""
        for stream, rest in self._partial.items():
            if rest:
                self._write(stream, rest)
        self._partial = {"out": b"", "err": b""}
        if self._file is not None:
            self._file.close()

    def _write(self, stream: Stream, data: bytes) -> None:
        text = str(mask(data.decode("utf-8", errors="replace")))
        lines = text.split("\n")
        if stream == "err":
            # Frames of C++ are many, and say less than the error before them.
            self.last_errors.extend(line for line in lines if line.strip() and not line.startswith("frame #"))
        if self._shown[stream]:
            self._shown[stream] = _show(sys.stdout if stream == "out" else sys.stderr, text + "\n")
        if self._file is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            try:
                self._file.write("".join(f"{now} {stream} {line}\n" for line in lines))
                self._file.flush()
            except OSError as error:
                _say(f"{self._file.name} cannot be written any more: {error}")
                self._file = None


def drain(descriptor: int) -> tuple[bytes, bool]:
    """What can be read from a non-blocking descriptor now; and whether more may come."""
    found = bytearray()
    while len(found) < 1 << 20:
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return bytes(found), True
        except OSError:
            return bytes(found), False
        if not data:
            return bytes(found), False
        found += data
    return bytes(found), True


def _show(stream: IO[str], text: str) -> bool:
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # nobody reads any more
        return False
    return True


def _say(text: str) -> None:
    _show(sys.stderr, f"{mask(text)}\n")
