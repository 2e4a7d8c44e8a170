"""Which Stoker this is."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

VERSION = "0.1.0"


@cache
def code_commit() -> str | None:
    """Commit of the checkout this code runs from, ``+dirty`` behind it when tracked files differ from it.

    None where there is no checkout (an installed wheel) or no git to ask.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # git itself would go on looking in parent folders and find another project
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+dirty" if changes else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()
