"""Rewind: the run goes back to a checkpoint, and the batch that did harm is passed over when its step comes again.

What the run is to read is a line of the data log and nothing else, so the line is all that a rewind leaves behind: a
run that is killed at any moment of it either finds no line, and comes to the same verdict again, or finds it, and goes
on from the same checkpoint past the same batch. No torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dataio.log import DataLog, Segment
from stoker import canonical
from stoker.files import write_atomic


def passing(log: DataLog, step: int) -> tuple[Segment, ...]:
    """What to append to a log so that ``step`` reads the batch after the one that it read: a segment that holds from it
    and skips one batch more, everything else as it was; and again what was to hold later."""
    standing, index = log.standing, log.segment_at(step)
    holds = standing[index]
    skip = holds.skip_batches + 1 if holds.from_step == step else 1
    return replace(holds, from_step=step, skip_batches=skip), *standing[index + 1 :]


def pass_over(path: Path, step: int) -> None:
    """Append ``passing`` to the log's file, all of it or nothing. For the rank that writes the log."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    log = DataLog.parse(whole, path)
    lines = [canonical.dumps(dict(vars(segment))).encode() + b"\n" for segment in passing(log, step)]
    longer = whole + b"".join(lines)
    DataLog.parse(longer, path)
    write_atomic(path, longer)


def rewinds(log: DataLog, known: int) -> int:
    """How often the run went back since the log had ``known`` segments. A later segment that was written once more, to
    hold as before, does not count."""
    segments = log.segments
    return sum(
        segment.skip_batches > 0 and segment not in segments[:index]
        for index, segment in enumerate(segments)
        if index >= known
    )


def changes(log: DataLog, step: int) -> bool:
    """Whether other data begin at ``step`` than were read before it, passing over batches apart."""
    index = log.segment_at(step)
    now, before = log.standing[index], log.standing[index - 1]
    fields = ("seq_len", "global_batch", "blend", "datasets")
    return index > 0 and now.from_step == step and any(getattr(now, f) != getattr(before, f) for f in fields)
