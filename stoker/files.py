"""Files that are whole or not there: atomic replacement, and append-only logs of JSON lines."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from stoker.errors import Refusal


def write_atomic(path: str | os.PathLike[str], content: bytes | str, mode: int = 0o666) -> None:
    """Replace `path` by `content` (str as UTF-8): after a crash at any moment it is wholly the old or wholly the new.

    On return the bytes and the name are on the disk. A crash can leave ``.<name>.<random>.tmp`` beside it, never read.
    `mode` is subject to the umask; the folder must exist.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable: a rename or a new file survives power loss only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: str | os.PathLike[str], line: str, durable: bool = False) -> None:
    """Append one line to a log of which the caller is the only writer; the file is made if it is not there.

    A last line without its newline is what a killed writer left: it is cut off first, so that the new line does not
    continue it. On return a ``kill -9`` cannot take the line back; with `durable`, power loss cannot either.
    """
    if "\n" in line:
        raise ValueError("append_line writes one line, and this text has several")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with open(descriptor, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        whole = _whole_lines_end(file, size)
        if whole < size:
            file.truncate(whole)
        data = memoryview(line.encode() + b"\n")
        while data:
            data = data[file.write(data) :]
        if durable:
            os.fsync(file.fileno())
    if durable and size == 0:
        sync_directory(Path(path).parent)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a log written by `append_line`, oldest first. A torn last line is left out and the
    file is not touched.

    Refuses any other line that is not a JSON object, naming file and line. FileNotFoundError if there is no file.
    """
    return parse_jsonl(Path(path).read_bytes(), path)


def parse_jsonl(content: bytes, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """As `read_jsonl`, of what was read from `path` before."""
    return [_object(path, number, line) for number, line in enumerate(content.split(b"\n")[:-1], start=1)]


def _object(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise Refusal(f"{path}, line {number}: damaged ({error}); restore the file or remove that line") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path}, line {number}: a JSON object was expected, found {type(value).__name__}")
    return value


def _whole_lines_end(file: Any, size: int, block: int = 4096) -> int:
    """Offset just behind the last newline in the first `size` bytes; 0 if there is none."""
    stop = size
    while stop > 0:
        start = max(0, stop - block)
        file.seek(start)
        newline = file.read(stop - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        stop = start
    return 0
