"""The machine one is on, as ``stoker plan calibrate`` measured it: its hardware, and constants fitted to runs on it.

``$STOKER_CACHE/machines/<processor or GPUs>/`` (default ``~/.cache/stoker``, or under XDG_CACHE_HOME) holds a hardware
file for each number of ranks that share the machine, and ``calibration.json``, which names them and is written last:
until then the measurements before stand. No torch.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from parallel.planning.hardware.probe import probe
from parallel.planning.timing.calibration import CONSTANTS, FORMAT, VERSION, Calibration, load_calibration
from parallel.planning.topology import HardwareTopology, load_hardware, save_hardware
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

CALIBRATION = "calibration.json"
MEASURE = "`stoker plan calibrate` measures it (about three minutes)"


@dataclass(frozen=True)
class Known:
    """What predictions for this machine stand on. ``basis``: where it comes from, in words."""

    topology: HardwareTopology
    calibration: Calibration
    basis: str


@dataclass(frozen=True)
class Measured:
    """``hardware`` by the number of ranks that share the machine: cores, memory and bandwidth of a rank depend on it.

    Of the calibration's provenance, ``dtypes`` are those that its runs trained in, ``versions`` are by package.
    """

    hardware: Mapping[int, HardwareTopology]
    calibration: Calibration

    def known(self, ranks: int, dtype: str) -> Known:
        """For so many ranks in a dtype of ``Execution``; Refusal where that was not measured."""
        provenance = self.calibration.provenance
        most = max(self.hardware)
        if ranks > most and self.hardware[most].device.architecture == "cpu":
            raise Refusal(f"{ranks} ranks would take turns on this machine, which was measured for up to {most}")
        if dtype not in provenance["dtypes"]:
            measured = ", ".join(provenance["dtypes"])
            raise Refusal(f"this machine was measured in {measured}, and the run is in {dtype}")
        basis = f"measured on this machine, {provenance['date']}"
        torch = provenance["versions"]["torch"]
        if (installed := _installed("torch")) != torch:
            basis += f", with torch {torch}; now it is {installed}, and {MEASURE} again"
        held = min((count for count in self.hardware if count >= ranks), default=most)
        return Known(self.hardware[held], self.calibration, basis)


def this_machine(ranks: int, dtype: str) -> Known:
    """What is known of the machine one is on, shared by so many ranks; Refusal that says why nothing is."""
    topology = here()
    has_rates = bool(topology.device.peak_flops)
    measured = load(place(topology))
    if measured is not None and (dtype in measured.calibration.provenance["dtypes"] or not has_rates):
        return measured.known(ranks, dtype)
    if has_rates:
        return Known(topology, load_calibration(), "fitted to published runs, not to this machine")
    raise Refusal(f"this machine has not been measured: {MEASURE}")


def here() -> HardwareTopology:
    """``probe``; Refusal where it finds GPUs and the trainer would run on cores."""
    topology = probe()
    torch = _installed("torch") or ""
    if topology.device.architecture != "cpu" and (
        torch.endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    ):
        raise Refusal(
            f"{topology.device.name} is here and torch {torch} cannot use it (CPU build, or CUDA_VISIBLE_DEVICES is "
            "empty): nothing is known of its host's cores"
        )
    return topology


def place(topology: HardwareTopology) -> Path:
    """The folder of a machine's measurements: a home folder may be shared by machines of several kinds."""
    name = re.sub(r"[^a-z0-9]+", "-", topology.device.name.lower()).strip("-") or "unknown"
    return _cache() / "machines" / f"{name}-{topology.domain.size}"


def load(folder: Path) -> Measured | None:
    """What ``save`` wrote there; None where it did not. Refuses damage, naming the file."""
    path = folder / CALIBRATION
    if not path.exists():
        return None
    try:
        calibration = _read(path)
        files: Mapping[str, str] = calibration.provenance["hardware"]
        return Measured({int(ranks): load_hardware(str(folder / name)) for ranks, name in files.items()}, calibration)
    except (Refusal, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path}: the measurements of this machine cannot be used ({error}): {MEASURE} again") from None


def save(folder: Path, measured: Measured) -> Path:
    """Replace what the folder holds, or leave it as it is; returns the path of the calibration."""
    before = _files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {ranks: f"ranks-{ranks}.{uuid.uuid4().hex[:8]}.yaml" for ranks in sorted(measured.hardware)}
        for ranks, name in files.items():
            save_hardware(folder / name, measured.hardware[ranks])
        named = {str(ranks): name for ranks, name in files.items()}
        provenance = {**measured.calibration.provenance, "hardware": named}
        _write(folder / CALIBRATION, replace(measured.calibration, provenance=provenance))
    except OSError as error:
        raise Refusal(f"measurements cannot be kept in {folder} ({error.strerror}): set STOKER_CACHE") from None
    for path in before:
        with suppress(OSError):
            path.unlink()
    return folder / CALIBRATION


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("ranks-*.yaml"))


def _read(path: Path) -> Calibration:
    stored = json.loads(path.read_text(encoding="utf-8"))
    formats.require(stored, FORMAT, VERSION, path)
    if set(stored["values"]) != {constant.name for constant in CONSTANTS}:
        raise Refusal("another release of Stoker wrote them, with other constants")
    return Calibration(stored["values"], stored["spreads"], stored["provenance"])


def _write(path: Path, calibration: Calibration) -> None:
    write_atomic(path, json.dumps({"format": formats.stamp(FORMAT, VERSION), **asdict(calibration)}, indent=1) + "\n")


def _cache() -> Path:
    """The folder of what Stoker keeps for a user; it need not exist."""
    if chosen := os.environ.get("STOKER_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG base directory specification has it
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise Refusal("no home folder to keep measurements in: set STOKER_CACHE to a folder") from None
    return base / "stoker"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
