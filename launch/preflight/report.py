"""What a preflight found, as rows for a person, plain values for a file, and one refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from stoker import formats
from stoker.errors import Refusal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "warn", "refuse"]
FORMAT, VERSION = "preflight", 1


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what to do where that is not as it should be. ``refuse``: no rank may start."""

    check: str
    status: Status
    found: str
    what_to_do: str = ""

    def __str__(self) -> str:
        advice = f"; {self.what_to_do}" if self.what_to_do else ""
        return f"{self.check}: {self.found}{advice}"


@dataclass(frozen=True)
class Verdict:
    """Which nodes of a launch can train, the same on every node.

    ``good``: in the job's order; the first ``needed`` train, the rest are spares. ``excluded``: node -> reason.
    ``warnings``: what differs and does no harm.
    """

    good: tuple[str, ...]
    excluded: Mapping[str, str]
    needed: int
    total: int
    warnings: tuple[str, ...] = ()

    @property
    def trouble(self) -> str | None:
        """Why the launch cannot go on with the nodes that are good; None where it can."""
        reasons = "; ".join(f"{node}: {reason}" for node, reason in self.excluded.items())
        if len(self.good) < self.needed:
            return f"{len(self.good)} of {self.total} nodes can train and {self.needed} are needed; {reasons}"
        if 2 * len(self.good) <= self.total:
            # The other half may have found itself good as well, on a path of its own.
            return f"{len(self.good)} of {self.total} nodes found one another, which is no majority; {reasons}"
        return None


@dataclass(frozen=True)
class Report:
    """All findings of one node, and the verdict where it is one of several. ``seconds``: what the preflight took.
    ``aside``: why this node takes no part in a launch that goes on without it."""

    node: str
    findings: tuple[Finding, ...]
    seconds: float
    verdict: Verdict | None = None
    aside: str | None = None

    @property
    def refused(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == "refuse")

    def refuse(self) -> None:
        """Raise Refusal where this node must not train, or too few nodes are left that can."""
        if self.refused:
            raise Refusal(f"{self.node}: {'; '.join(map(str, self.refused))}")
        if self.verdict is None:
            return
        if trouble := self.verdict.trouble:
            raise Refusal(f"preflight: {trouble}")
        if self.node not in self.verdict.good:
            raise Refusal(f"{self.node} is excluded from this launch: {self.verdict.excluded[self.node]}")

    def table(self) -> Table:
        """The findings for a terminal, one row each."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        colour = {"ok": "green", "warn": "yellow", "refuse": "bold red"}
        rows = Table(box=box.SIMPLE_HEAD, title=f"preflight of {self.node}, {self.seconds:.1f} s", title_justify="left")
        rows.add_column("", no_wrap=True)
        rows.add_column("status", no_wrap=True)
        rows.add_column("found")
        rows.add_column("what to do")
        for finding in self.findings:
            status = Text(finding.status, colour[finding.status])
            rows.add_row(finding.check, status, Text(finding.found), Text(finding.what_to_do))
        if self.verdict is not None:
            for node, reason in self.verdict.excluded.items():
                rows.add_row(Text(f"node {node}"), Text("refuse", colour["refuse"]), Text(reason), Text("excluded"))
            for warning in self.verdict.warnings:
                rows.add_row("nodes", Text("warn", colour["warn"]), Text(warning), Text(""))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values with a format stamp, for JSON."""
        return {
            "format": formats.stamp(FORMAT, VERSION),
            "node": self.node,
            "seconds": self.seconds,
            "findings": [asdict(finding) for finding in self.findings],
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }
