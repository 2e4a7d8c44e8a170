"""What a node states of itself to the others of its launch: plain values, compared and never trusted further."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.attempt import lock_sha256
from pretrain.config import RunConfig
from pretrain.guard import ROOMS
from stoker.errors import Refusal
from stoker.version import VERSION

HOME = Path(__file__).resolve().parents[2]
#: Sources that decide what a run computes.
SOURCES = (".py", ".yaml", ".json", ".cpp", ".cu", ".cuh", ".h")
#: Must be equal on every node, in the order in which a difference is told.
PACKAGES = ("torch", "megatron-core", "numpy")


@dataclass(frozen=True)
class Facts:
    """``place``: what two nodes on one host have in common; ``devices``: UUIDs of its GPUs. ``versions`` and ``hashes``
    must be equal on all nodes, ``remarks`` should be. ``rates``: measured, higher is better. ``refused``: why this node
    must not train, by its own checks."""

    host: str
    place: str
    devices: tuple[str, ...] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str | None] = field(default_factory=dict)
    clique: tuple[str, str] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Facts:
        """Refuses what ``to_dict`` did not write."""
        try:
            plain = dict(values)
            clique = tuple(plain.pop("clique")) if plain.get("clique") else None
            devices = tuple(plain.pop("devices"))
            plain.pop("clique", None)
            return cls(clique=clique, devices=devices, **plain)  # type: ignore[arg-type]
        except (TypeError, ValueError, KeyError) as error:
            raise Refusal(f"not the facts of a node: {error}") from None


def facts(config: RunConfig) -> Facts:
    """What this node has installed, and is asked to run; devices, rates and refusals are added by who finds them."""
    return Facts(
        host=platform.node(),
        place=place(),
        versions={
            "stoker": VERSION,
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
        },
        hashes={"code": code_sha256(), "configuration": config.sha256(), "installed packages": lock_sha256()},
        remarks={"processor": platform.machine(), "kernel": platform.release()},
    )


def place() -> str:
    """Equal for two processes on one host in one network: boot, host name and network namespace.

    Containers of one host share the boot, not the namespace: they count as apart, unless they share GPUs.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [boot.read_text().strip() if boot.is_file() else "", platform.node()]
    namespace = Path("/proc/self/ns/net")
    parts.append(os.readlink(namespace) if namespace.exists() else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_sha256(home: Path = HOME) -> str:
    """Hash of the sources of all rooms as they lie on the disk: also of what differs from the commit."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((home / room).rglob("*")):
            if path.suffix in SOURCES and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(home)}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
