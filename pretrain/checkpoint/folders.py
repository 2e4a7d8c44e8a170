"""The folder of checkpoints: names, the order of a commit, and what a crash between two of its lines leaves. No torch.

::

    step_00000100               committed: renamed here only when every byte of it is durable, never written to again
    step_00000200.tmp.0003      attempt 3 is writing it
    step_00000200.superseded    the older state of a step that is saved again; it counts until the new one is there
    step_00000300.quarantined   damaged; kept for whoever wants to know why
    step_00000400.abandoned     of a future that the run went back from
    latest                      link to the newest committed step, for people; nothing here reads it
    attempt.json                the newest attempt that wrote here; older ones are refused

One process writes at a time: rank 0 of the newest attempt. Folders are 0700, files 0600.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from pretrain.checkpoint.manifest import COMMIT
from stoker import canonical
from stoker.errors import Refusal
from stoker.files import sync_directory, write_atomic
from stoker.formats import require, stamp

_STEP = re.compile(r"step_(\d{8,})(\.superseded)?")
_WORKING = re.compile(r"step_\d{8,}\.tmp\.(\d{4,})")
_ATTEMPT, _ATTEMPT_FORMAT = "attempt.json", "stoker-checkpoint-attempt"


def final(root: Path, step: int) -> Path:
    """The name under which a step is committed."""
    return root / f"step_{step:08d}"


def path(root: Path, step: int) -> Path:
    """Where a step is to be read: its final name, or its older state if a crash came between two renames."""
    committed, superseded = final(root, step), _superseded(root, step)
    return superseded if not committed.exists() and superseded.exists() else committed


def _superseded(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}.superseded"


def working(root: Path, step: int, attempt: int) -> Path:
    """Where an attempt writes a step: of its own, so that a writer left over from another never meets it."""
    return root / f"step_{step:08d}.tmp.{attempt:04d}"


def found(root: Path) -> list[int]:
    """Steps that have a folder to be read, ascending; COMMIT may be missing from a damaged one."""
    if not root.is_dir():
        return []
    return sorted({int(match[1]) for entry in os.scandir(root) if (match := _STEP.fullmatch(entry.name))})


def committed(root: Path) -> list[int]:
    """Steps with COMMIT in place, ascending."""
    return [step for step in found(root) if (path(root, step) / COMMIT).is_file()]


def damaged(root: Path) -> list[str]:
    """Names of the step folders that cannot be loaded: COMMIT is missing, or they were quarantined."""
    lost = [path(root, step).name for step in found(root) if step not in committed(root)]
    return lost + sorted(entry.name for entry in root.glob("step_*.quarantined*"))


def fence(root: Path, attempt: int) -> None:
    """From now on no older attempt commits here. Raises Refusal if a newer one has been here."""
    if newest(root) != attempt:
        refuse_fenced(root, attempt)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = {"format": stamp(_ATTEMPT_FORMAT, 1), "attempt": attempt}
        write_atomic(root / _ATTEMPT, canonical.dumps(content), mode=0o600)


def newest(root: Path) -> int | None:
    """The newest attempt that has written here."""
    file = root / _ATTEMPT
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    require(content, _ATTEMPT_FORMAT, 1, file)
    return int(content["attempt"])


def refuse_fenced(root: Path, attempt: int) -> None:
    """Raises Refusal if a newer attempt has begun."""
    if (other := newest(root)) is not None and other > attempt:
        raise Refusal(f"{root}: attempt {other} has taken over from attempt {attempt}; this process must end")


def begin(root: Path, step: int, attempt: int) -> Path:
    """Make the empty folder in which an attempt writes a step; clears what earlier saves left half-written."""
    fence(root, attempt)
    _heal(root)
    for entry in list(os.scandir(root)):
        if (match := _WORKING.fullmatch(entry.name)) and int(match[1]) <= attempt:
            # A writer of an older attempt that still lives may add a file meanwhile; it can do no more than that.
            shutil.rmtree(entry.path, ignore_errors=int(match[1]) < attempt)
    folder = working(root, step, attempt)
    folder.mkdir(mode=0o700)
    return folder


def _heal(root: Path) -> None:
    """Finish or undo what a crash in ``commit`` left: a superseded folder whose successor did not arrive comes back."""
    for step in found(root):
        if (superseded := _superseded(root, step)).exists():
            if final(root, step).exists():
                shutil.rmtree(superseded)
            else:
                os.rename(superseded, final(root, step))
                sync_directory(root)


def commit(root: Path, step: int, attempt: int) -> None:
    """Give a folder, every file of which is durable, its final name. A state of this step that is there gives way."""
    source, superseded = working(root, step, attempt), _superseded(root, step)
    sync_directory(source)
    refuse_fenced(root, attempt)
    if final(root, step).exists():
        os.rename(final(root, step), superseded)
    os.rename(source, final(root, step))
    sync_directory(root)
    link_latest(root)
    if superseded.exists():
        shutil.rmtree(superseded)


def set_aside(root: Path, step: int, why: str) -> Path:
    """Rename a step's folder to ``<name>.<why>`` (``.2`` and on if that is taken); nothing is deleted."""
    aside, number = root / f"{final(root, step).name}.{why}", 1
    while aside.exists():
        number += 1
        aside = root / f"{final(root, step).name}.{why}.{number}"
    os.rename(path(root, step), aside)
    link_latest(root)
    return aside


def remove(root: Path, step: int) -> None:
    """Delete a step; a crash half-way leaves no folder that looks committed."""
    doomed = working(root, step, attempt=0)  # what a crash leaves of it, the next save clears away
    os.rename(path(root, step), doomed)
    shutil.rmtree(doomed)
    link_latest(root)


def link_latest(root: Path) -> None:
    """Point ``latest`` at the newest committed step; no link where there is none."""
    link, steps = root / "latest", committed(root)
    if steps:
        fresh = root / ".latest"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path(root, steps[-1]).name)
        os.replace(fresh, link)
    else:
        link.unlink(missing_ok=True)
    sync_directory(root)
