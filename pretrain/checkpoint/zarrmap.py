"""``refs.json``: the chunks of a checkpoint as zarr v3 arrays, for any reader of fsspec reference maps.

    zarr.open_group("reference://", storage_options={"fo": "runs/demo/checkpoints/step_00000100/refs.json"})

zarr's crc32c codec expects the checksum behind each chunk, where the data files have it, so a plain zarr-python finds
a flipped bit too. Addresses are absolute through one template; of a folder that was moved, add
``"template_overrides": {"here": "<the folder now>"}`` to the storage options. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.checkpoint.dtypes import STORAGE
from pretrain.checkpoint.manifest import CRC_BYTES, Stored
from stoker import canonical

#: Endianness is said of items that have several bytes only (zarr v3 specification, bytes codec).
_ONE_BYTE = ("bool", "int8", "uint8")


def reference_map(folder: Path, tensors: Mapping[str, Stored], attributes: Mapping[str, Any]) -> bytes:
    """The reference map of a checkpoint that will lie in ``folder``; ``attributes`` go to the root group."""
    nodes = {name: _array(stored) for name, stored in tensors.items()}
    for name in tensors:
        nodes.update((str(parent), _group({})) for parent in PurePosixPath(name).parents if parent.name)
    # Listed in the root as well (zarr's inline consolidated metadata): zarr 3.1.6 lists nothing but the root of an
    # fsspec store without it, and one look-up replaces a thousand.
    listed = {"kind": "inline", "must_understand": False, "metadata": nodes}
    refs: dict[str, Any] = {"zarr.json": canonical.dumps({**_group(attributes), "consolidated_metadata": listed})}
    refs.update((f"{name}/zarr.json", canonical.dumps(node)) for name, node in nodes.items())
    for name, stored in tensors.items():
        refs.update(_chunks(name, stored))
    return canonical.dumps({"version": 1, "templates": {"here": str(folder)}, "refs": refs}).encode()


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _array(stored: Stored) -> dict[str, Any]:
    storage = STORAGE[stored.dtype]
    order = {} if storage in _ONE_BYTE else {"configuration": {"endian": "little"}}
    fill: bool | float = False if storage == "bool" else 0.0 if storage.startswith("float") else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": stored.grid.shape,
        "data_type": storage,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": stored.grid.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
        "attributes": {"dtype": stored.dtype},
    }


def _chunks(name: str, stored: Stored) -> Iterator[tuple[str, list[Any]]]:
    for number, at in enumerate(stored.chunks):
        key = "/".join((name, "c", *map(str, stored.grid.index(number))))
        yield key, [f"{{{{here}}}}/{at.file}", at.offset, stored.chunk_bytes + CRC_BYTES]
