"""The format on disk: ``manifest.json``, which addresses and checks every byte of a step's folder, and ``COMMIT``,
which checks the manifest. No torch.

::

    step_00000100/
      data-00003.bin    chunks that rank 3 wrote, each followed by its CRC32C (little-endian); gaps are zero
      meta.json         what the run says of itself: data state, verdicts, config, ModelSpec, plan
      refs.json         the same chunks as zarr v3 arrays (``zarrmap.py``)
      <extra files>     opaque and small, a tokenizer for example
      manifest.json     tensors -> shape, dtype, chunks -> file, offset, length, CRC; bytes and SHA-256 of the rest
      COMMIT            SHA-256 of the manifest; written last

A chunk's CRC stands in the manifest too, so a chunk exchanged with another of equal size, or one of an older step, is
found. Everything read from a manifest is checked before it is used: names, counts, sizes, overlaps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoint.chunks import Grid
from pretrain.checkpoint.damage import Damage, Damaged
from pretrain.checkpoint.dtypes import STORAGE, storage_dtype
from stoker import canonical
from stoker.errors import Refusal
from stoker.formats import require, stamp
from stoker.hashing import crc32c

FORMAT, VERSION = "stoker-checkpoint", 1
MANIFEST, COMMIT, META, REFS = "manifest.json", "COMMIT", "meta.json", "refs.json"
CRC_BYTES = 4
#: Refused above this, bytes: a line of the manifest addresses a chunk of 4 MiB in under 50 bytes, so this is 20 TB.
MAX_JSON_BYTES = 256 * 2**20

_FILE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DATA = re.compile(r"data-\d{5,}\.bin")


def data_file(rank: int) -> str:
    return f"data-{rank:05d}.bin"


def refuse_file_name(name: str) -> None:
    """Raises Refusal for the name of an extra file that is no plain file name or is one of the format's own."""
    if not _is_file_name(name) or name in (MANIFEST, COMMIT, META, REFS) or _DATA.fullmatch(name):
        raise Refusal(f"extra file {name!r}: use letters, digits, '.', '_' and '-', and none of the checkpoint's names")


def refuse_tensor_name(name: str) -> None:
    """Raises Refusal for a global name that is not file names joined by '/'."""
    if not _is_tensor_name(name):
        raise Refusal(f"tensor name {name!r}: use letters, digits, '.', '_', '-' and '/' between parts")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and _FILE.fullmatch(name) is not None and name.strip(".") != ""


def _is_tensor_name(name: str) -> bool:
    return all(_is_file_name(part) and part != "zarr.json" for part in name.split("/"))


@dataclass(frozen=True)
class Address:
    """Where the bytes of a chunk lie; ``CRC_BYTES`` more follow them."""

    file: str
    offset: int
    crc: int


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: logical dtype, grid, and the address of every chunk in row-major order."""

    dtype: str
    grid: Grid
    chunks: tuple[Address, ...]

    @property
    def chunk_bytes(self) -> int:
        return self.grid.chunk_numel * storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Sealed:
    """Size and SHA-256 of a file that is read whole."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Extent:
    """A chunk's bytes and CRC in a data file: [start, stop)."""

    start: int
    stop: int
    tensor: str
    chunk: int


@dataclass(frozen=True)
class Manifest:
    """``data`` maps a data file to its bytes; ``sealed`` are all other files but the manifest and COMMIT."""

    step: int
    attempt: int
    world_size: int
    tensors: Mapping[str, Stored]
    data: Mapping[str, int]
    sealed: Mapping[str, Sealed]
    version: int = VERSION

    def extents(self) -> dict[str, list[Extent]]:
        """What lies in each data file, by offset."""
        found: dict[str, list[Extent]] = {name: [] for name in self.data}
        for name, stored in self.tensors.items():
            length = stored.chunk_bytes + CRC_BYTES
            for number, at in enumerate(stored.chunks):
                found[at.file].append(Extent(at.offset, at.offset + length, name, number))
        return {name: sorted(extents, key=lambda e: e.start) for name, extents in found.items()}

    def to_json(self) -> bytes:
        files = {name: index for index, name in enumerate(sorted(self.data))}
        content = {
            "format": stamp(FORMAT, self.version),
            "step": self.step,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "data": [[name, self.data[name]] for name in files],
            "sealed": {name: vars(sealed) for name, sealed in self.sealed.items()},
            "tensors": {
                name: {
                    "dtype": stored.dtype,
                    "shape": stored.grid.shape,
                    "chunk": stored.grid.chunk,
                    "chunks": [[files[at.file], at.offset, stored.chunk_bytes, at.crc] for at in stored.chunks],
                }
                for name, stored in self.tensors.items()
            },
        }
        return canonical.dumps(content).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Raises Damaged for anything but a manifest that addresses its bytes once each, Refusal for a newer one."""
        content = _parse(raw, MANIFEST)
        version = require(content, FORMAT, VERSION, MANIFEST)
        try:
            data = dict(content["data"])
            for name, size in data.items():
                _hold(_DATA.fullmatch(name) and _is_count(size), f"data file {name!r} of {size!r} bytes")
            manifest = cls(
                step=content["step"],
                attempt=content["attempt"],
                world_size=content["world_size"],
                tensors={name: _stored(name, entry, list(data)) for name, entry in content["tensors"].items()},
                data=data,
                sealed={name: Sealed(**sealed) for name, sealed in content["sealed"].items()},
                version=version,
            )
            _hold(all(map(_is_count, (manifest.step, manifest.attempt, manifest.world_size))), "step or attempt")
            _hold({META, REFS} <= manifest.sealed.keys(), f"no {META} or {REFS}")
            for name, sealed in manifest.sealed.items():
                _hold(_is_file_name(name) and name not in (MANIFEST, COMMIT) and name not in data, f"file {name!r}")
                _hold(_is_count(sealed.bytes) and isinstance(sealed.sha256, str), f"size or hash of {name!r}")
            for name, extents in manifest.extents().items():
                ends = [0, *(extent.stop for extent in extents)]
                fits = all(end <= extent.start for end, extent in zip(ends, extents, strict=False))
                _hold(fits and ends[-1] == data[name], f"chunks overlap in {name} or leave it")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Damaged([Damage(MANIFEST, None, None, f"not a manifest: {error}")]) from error
        return manifest


def _stored(name: str, entry: Any, files: list[str]) -> Stored:
    _hold(_is_tensor_name(name), f"tensor name {name!r}")
    dtype, shape, chunk = entry["dtype"], tuple(entry["shape"]), tuple(entry["chunk"])
    _hold(dtype in STORAGE, f"dtype {dtype!r} of {name}")
    _hold(len(shape) == len(chunk) <= 16, f"number of dims of {name}")
    _hold(all(map(_is_count, (*shape, *chunk))) and 0 not in chunk, f"grid of {name}")
    grid = Grid(shape, chunk)
    _hold(grid.num_chunks == len(entry["chunks"]), f"{name} has {len(entry['chunks'])} chunks of {grid.num_chunks}")
    stored = Stored(dtype, grid, tuple(_address(name, line, files) for line in entry["chunks"]))
    lengths = {line[2] for line in entry["chunks"]}
    _hold(lengths <= {stored.chunk_bytes}, f"chunk lengths {sorted(lengths)} of {name} are not {stored.chunk_bytes}")
    return stored


def _address(name: str, line: Any, files: list[str]) -> Address:
    file, offset, _, crc = line
    _hold(all(map(_is_count, line)) and file < len(files) and crc < 2**32, f"chunk address {line} of {name}")
    return Address(files[file], offset, crc)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _parse(raw: bytes, name: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged([Damage(name, None, None, f"not JSON: {error}")]) from error


def commit_record(manifest: Manifest, raw: bytes) -> bytes:
    """The content of COMMIT for a manifest and its bytes. It carries a CRC of itself, so that damage to it is not
    taken for damage to the manifest."""
    return _commit(
        {
            "format": stamp(FORMAT, manifest.version),
            "step": manifest.step,
            "attempt": manifest.attempt,
            "world_size": manifest.world_size,
            "manifest_sha256": hashlib.sha256(raw).hexdigest(),
        }
    )


def _commit(content: Mapping[str, Any]) -> bytes:
    crc = crc32c(canonical.dumps(content).encode())
    return canonical.dumps({**content, "crc32c": crc}).encode()


def read_committed(commit: bytes, raw: bytes, step: int) -> Manifest:
    """The manifest ``raw`` of a step's folder if ``commit`` vouches for it.

    Raises Damaged naming COMMIT or the manifest, and Refusal where both are sound and of a newer format.
    """
    content = _parse(commit, COMMIT)
    if not isinstance(content, dict) or commit != _commit({k: v for k, v in content.items() if k != "crc32c"}):
        raise Damaged([Damage(COMMIT, None, None, "its bytes changed")])
    require(content, FORMAT, VERSION, COMMIT)
    if hashlib.sha256(raw).hexdigest() != content.get("manifest_sha256"):
        raise Damaged([Damage(MANIFEST, None, None, f"its SHA-256 is not the one in {COMMIT}")])
    manifest = Manifest.from_json(raw)
    if commit != commit_record(manifest, raw) or manifest.step != step:
        raise Damaged([Damage(COMMIT, None, None, f"made for step {manifest.step}, in the folder of step {step}")])
    return manifest
