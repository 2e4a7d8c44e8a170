"""How a launch of several nodes ended, for those of its node programs that start later and for the script around them.

``<run_dir>/.launch/<launch>.ended`` holds the exit code, a digit and a newline, and stands for good; what the nodes
know one another by, ``<launch>.token``, is there while the launch lasts.
"""

from __future__ import annotations

import itertools
import logging
import re
from contextlib import suppress
from pathlib import Path

from pretrain.attempt import ExitClass
from stoker.files import write_atomic

FOLDER = ".launch"
#: Files of other starts of the run that are kept.
KEPT = 64

_log = logging.getLogger(__name__)


def token_path(run_dir: Path, launch: str) -> Path:
    return run_dir / FOLDER / f"{launch}.token"


def ended(run_dir: Path, launch: str) -> int | None:
    """The exit code of a launch; None while it has not ended, as far as this node sees."""
    try:
        text = (run_dir / FOLDER / f"{launch}.ended").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return int(text) if re.fullmatch(r"[0-4]\n", text) else None


def generation(run_dir: Path, start: str) -> str:
    """The launch that a node program belongs to whose scheduler starts it again under the same ``start``: the first one
    that did not end with 4, saved and to be continued."""
    return next(
        launch
        for launch in (f"{start}.g{number}" for number in itertools.count())
        if ended(run_dir, launch) != ExitClass.PREEMPTED.code
    )


def record(run_dir: Path, launch: str, code: int) -> None:
    """A launch has ended: for the node that leads it. A disk that is full costs the file, not the run."""
    folder = run_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{launch}.ended", f"{code}\n")
    except OSError as error:
        _log.warning("%s: that launch %s ended with %d could not be written: %s", folder, launch, code, error)
    with suppress(OSError):
        token_path(run_dir, launch).unlink(missing_ok=True)
        mine = launch.partition(".")[0] + "."
        others = [path for path in folder.iterdir() if not path.name.startswith(mine)]
        for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            path.unlink(missing_ok=True)
