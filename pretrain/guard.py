"""Packages of other projects that stand where one of ours, or one we would use, is looked for. Nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from stoker.errors import Refusal

DISTRIBUTION = "stoker"
ROOMS = ("stoker", "dataio", "parallel", "kernels", "pretrain", "launch")


@dataclass(frozen=True)
class Foreign:
    """Another distribution that has a package named like the room `name`.

    `location` is what ``import name`` would give; `distributions` who installed it. `in_the_way` is False when ours
    is found first, from its own folder: the other package is then merely hidden from those who want it.
    """

    name: str
    location: Path
    distributions: tuple[str, ...]
    in_the_way: bool


def foreign_rooms(home: Path | None = None) -> list[Foreign]:
    """Every room whose name another package claims. `home` is the folder our rooms lie in (default: this one's)."""
    home = (home or Path(__file__).resolve().parent.parent).resolve()
    owners = _owners()
    return [found for name in ROOMS if (found := _foreign(name, home, owners.get(name, []))) is not None]


@cache
def _owners() -> Mapping[str, list[str]]:
    """Distributions by top-level name. Reading all their records takes half a second, so once a process."""
    return metadata.packages_distributions()


def _foreign(name: str, home: Path, owners: list[str]) -> Foreign | None:
    spec = find_spec(name)
    location = Path(spec.origin).resolve().parent if spec and spec.origin else None
    others = tuple(sorted(set(owners) - {DISTRIBUTION}))
    if location == home / name:
        # Installed into one folder, two distributions have overwritten each other's files.
        shared = DISTRIBUTION in owners and any(_files_in(other, location) for other in others)
        return Foreign(name, location, others, in_the_way=shared) if others else None
    return Foreign(name, location, others, in_the_way=True) if location else None


def _files_in(distribution: str, folder: Path) -> bool:
    found = metadata.distribution(distribution)
    return Path(str(found.locate_file(folder.name))).resolve() == folder


def apex() -> Literal["absent", "built", "unbuilt", "impostor"]:
    """Which ``apex`` is installed: NVIDIA's, with its fused operators built or not, or the other project of that name
    on PyPI (a web toolkit), which Megatron-core would take for NVIDIA's."""
    spec = find_spec("apex")
    if spec is None:
        return "absent"
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return "impostor"
    return "built" if find_spec("amp_C") else "unbuilt"


def require_own_rooms() -> None:
    """Refuse to start where a foreign package would be imported for one of ours, or the wrong `apex` for NVIDIA's."""
    for found in foreign_rooms():
        if found.in_the_way:
            owner = f"pip uninstall {' '.join(found.distributions)}" if found.distributions else "move it away"
            raise Refusal(
                f"a foreign package named {found.name!r} at {found.location} is in the way of Stoker's own: {owner}, "
                "or give Stoker an environment of its own"
            )
    if apex() == "impostor":
        raise Refusal(
            "the installed 'apex' is not NVIDIA's but another project of that name on PyPI, and Megatron-core would "
            "import it: pip uninstall apex"
        )
