"""What a benchmark says: rows of a comparison, and what was compared on what."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

#: Packages whose versions decide what was measured.
PACKAGES = ("torch", "transformers", "triton", "fla-core", "flash-qla", "tilelang", "nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Row:
    """``ratio``: peer's time over ours, above 1 where we are faster; None with ``note`` saying why, if not measured.
    The physical limit and a target are peers as well: the share of the limit that is reached, and above 1 if met."""

    op: str
    case: str
    peer: str
    ours_ms: float | None
    peer_ms: float | None
    ratio: float | None
    note: str = ""


def versions() -> dict[str, str]:
    """What was measured, and on what."""
    found = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def table(rows: Sequence[Row]) -> str:
    """The rows as text, versions first."""
    case_width, number = max([4, *(len(row.case) for row in rows)]), "8.3g"
    lines = [", ".join(f"{name} {value}" for name, value in versions().items())]
    lines.append(f"{'operator':13} {'case':{case_width}} {'ours ms':>8} {'peer ms':>8} {'ratio':>6}  peer")
    for row in rows:
        figures = "".join(f" {'unknown' if x is None else format(x, number):>8}" for x in (row.ours_ms, row.peer_ms))
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        peer = f"{row.peer}: {row.note}" if row.note else row.peer
        lines.append(f"{row.op:13} {row.case:{case_width}}{figures} {ratio:>6}  {peer}")
    return "\n".join(lines)
