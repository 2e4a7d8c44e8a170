"""The machine that a run's predictions stand on, as ``plan.json`` keeps it for a report made elsewhere. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.planning.timing.calibration import Calibration
from parallel.planning.topology import HardwareTopology, from_fields, to_fields

PRACTICE = "domain.practice"


@dataclass(frozen=True)
class Machine:
    """``calibration``: None where nobody measured the machine, so that no time can be predicted."""

    topology: HardwareTopology
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the sources of the numbers stay in the machine's own files."""
        hardware = to_fields(self.topology)[0]
        known = self.calibration
        fitted = None if known is None else {"values": dict(known.values), "spreads": dict(known.spreads)}
        return {"hardware": {**hardware, PRACTICE: list(hardware[PRACTICE])}, "calibration": fitted}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Machine:
        """The inverse of ``to_dict``, sources apart. KeyError, TypeError or Refusal for what is no machine."""
        hardware, fitted = value["hardware"], value["calibration"]
        topology = from_fields({**hardware, PRACTICE: tuple(hardware[PRACTICE])}, {})
        return cls(topology, None if fitted is None else Calibration(fitted["values"], fitted["spreads"], {}))
