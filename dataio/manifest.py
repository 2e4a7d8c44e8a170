"""A store's manifest: what it holds, how it is cut, and the identity of the whole.

It is of the same size for every store, and all that is read when one is opened. The hashes of the files, of which
there may be tens of thousands, lie beside it in files.json, for ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.checks import root, table_of
from dataio.shards import FileEntry, Grid, Profile, Written, write_array, write_file
from dataio.types import TokenizerId
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import sync_directory, write_atomic
from stoker.version import VERSION, code_commit

FORMAT = "stoker.store"
VERSION_READ = 2
#: `doc_lang` of a document whose language is not known.
NO_LANGUAGE = 2**16 - 1


@dataclass(frozen=True)
class SideArray:
    """An array of one row per document."""

    dtype: str
    columns: tuple[int, ...] = ()
    default: float | bool | None = None  # where a store does not say; None: it must


#: Beside `tokens` and `doc_offsets`.
SIDE_ARRAYS = {
    "doc_bytes": SideArray("int64"),
    "doc_id": SideArray("uint64", (2,)),
    "doc_masked": SideArray("bool", default=False),
    "doc_source_row": SideArray("int64", (2,), default=-1),
    "doc_weight": SideArray("float32", default=1.0),
    "doc_lang": SideArray("uint16", default=NO_LANGUAGE),
    "doc_flags": SideArray("uint32", default=0),
}


@dataclass(frozen=True)
class About:
    """What a store says of itself besides its arrays.

    `licences`: what is known of them, by SPDX name; `inputs`: hash of each thing it was made from; `recipe`: hash of
    the recipe; `input_files`: name of each input file, by the number that `doc_source_row` has for it.
    """

    source: str
    tokenizer: TokenizerId
    documents: int
    bytes: int
    languages: Sequence[str] = ()
    licences: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None
    input_files: Sequence[str] = ()


def vocabulary_dtype(tokenizer: TokenizerId) -> str:
    """Of the tokens of a store."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def partial_folder(path: Path) -> Path:
    """Empty folder beside `path` to write a store in, for ``seal``."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # left by a writer that was killed
    folder.mkdir(parents=True)
    return folder


def require_absent(path: Path) -> None:
    if path.exists():
        raise Refusal(f"{path}: exists already, and a store is never changed; remove it or choose another path")


def seal(
    folder: Path,
    path: Path,
    about: About,
    arrays: Mapping[str, Written],
    profile: Profile,
    replace: bool = False,
) -> None:
    """Make a store of the arrays in `folder`: add checks and manifest, make all durable, move it to `path`.

    Refuses a `path` that exists; with `replace` it may be a store, which is removed once this one is whole.
    """
    files: dict[str, FileEntry] = {}
    entries: dict[str, Any] = {}
    for name, written in arrays.items():
        files |= {f"{name}/{key}": entry for key, entry in written.files.items()}
        entries[name] = {
            "dtype": written.grid.dtype,
            "shape": written.grid.shape,
            "chunk": written.grid.chunk,
            "shard_chunks": written.grid.shard_chunks,
            "unit_rows": written.grid.unit,
            "content": root(written.leaves),
        }
        table, entries[name]["checks_crc32c"] = table_of(written.units)
        kept = write_array(folder / "checks" / name, table)
        files |= {f"checks/{name}/{key}": entry for key, entry in kept.items()}
    attributes = {"format": formats.stamp(FORMAT, VERSION_READ), "source": about.source}
    files["zarr.json"] = _write_group(folder, attributes)
    files["checks/zarr.json"] = _write_group(folder / "checks", {})
    files["input_files.json"] = write_file(folder / "input_files.json", canonical.dumps(about.input_files).encode())
    listed = {name: [entry.size, entry.sha256] for name, entry in sorted(files.items())}
    listing = write_file(folder / "files.json", canonical.dumps(listed).encode())
    manifest = {
        "format": formats.stamp(FORMAT, VERSION_READ),
        "profile": profile,
        **{key: value for key, value in asdict(about).items() if key != "input_files"},
        "input_files_sha256": files["input_files.json"].sha256,
        "tokens": arrays["tokens"].grid.shape[0],
        "arrays": entries,
        "code": {"version": VERSION, "commit": code_commit()},
        "files_sha256": listing.sha256,
        "dataset_id": _identity(entries, about.languages),
    }
    manifest["checksum"] = canonical.sha256(manifest)
    write_atomic(folder / "manifest.json", canonical.dumps(manifest))
    _sync(folder)
    _move(folder, path, replace)


def _sync(folder: Path) -> None:
    """Make a folder and all in it durable: many at a time, which the disk takes in one go (20 ms for 60 files instead
    of 130 to 250; measured 2026-11)."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    inside = list(folder.rglob("*"))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, [path for path in inside if path.is_file()]))
        list(pool.map(sync, [path for path in inside if path.is_dir()]))
    sync_directory(folder)


def _move(folder: Path, path: Path, replace: bool) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if replace and path.exists():
        if not (path / "manifest.json").is_file():
            raise Refusal(f"{path}: holds something that is not a token store; remove it or choose another output")
        os.rename(path, old)
    require_absent(path)
    os.rename(folder, path)
    sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_group(folder: Path, attributes: Mapping[str, Any]) -> FileEntry:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return write_file(folder / "zarr.json", canonical.dumps(group).encode())


def _identity(arrays: Mapping[str, Any], languages: Sequence[str]) -> str:
    """Hash of the values of all arrays: not of how they are cut, compressed or named."""
    content = {name: [entry["dtype"], entry["shape"], entry["content"]] for name, entry in arrays.items()}
    return canonical.sha256([content, languages])


def read_manifest(path: Path) -> dict[str, Any]:
    """Of the store in `path`. Refuses a folder without one, a damaged and a newer one."""
    file = path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise Refusal(
            f"{path}: no token store here ({file.name} is missing); run `make data` or give its path"
        ) from None
    except (OSError, ValueError) as error:
        raise Refusal(f"{file}: cannot be read ({error}); prepare this store again") from None
    version = formats.require(manifest, FORMAT, VERSION_READ, file)
    checksum = manifest.pop("checksum", None)
    if checksum != canonical.sha256(manifest) or manifest["dataset_id"] != _dataset_id(manifest, version):
        raise Refusal(f"{file}: damaged or edited (its checksum is wrong); prepare this store again")
    return manifest


def _dataset_id(manifest: Mapping[str, Any], version: int) -> str:
    if version == 1:  # the hash of the files, so it changed with how they were cut
        return canonical.sha256(manifest["files"])
    return _identity(manifest["arrays"], manifest["languages"])


def require_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a store of which a file is missing, naming it: by one listing of the shards, however many there are.

    Sizes and contents are checked as the files are first touched.
    """
    if manifest["format"]["version"] == 1:
        names, shards = [*manifest["files"]], 0
    else:
        grids = {name: grid_of(manifest, name) for name in manifest["arrays"]}
        shards = grids.pop("tokens").num_shards
        names = ["files.json", "input_files.json", "zarr.json", "tokens/zarr.json", "checks/zarr.json"]
        names += [f"{name}/{key}" for name, grid in grids.items() for key in ("zarr.json", grid.key(0))]
        names += [f"checks/{name}/{key}" for name in manifest["arrays"] for key in ("zarr.json", "c/0")]
    folder = path / "tokens/c"
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    absent = [path / name for name in names if not (path / name).is_file()]
    absent += [folder / name for name in map(str, range(shards)) if name not in present]
    if absent:
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise Refusal(f"{absent[0]}: missing{more}; prepare this store again or restore it")


def read_json(path: Path, sha256: str) -> Any:
    """Of a file whose hash the manifest has, directly or not."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error}); prepare this store again or restore it") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Refusal(f"{path}: damaged (its SHA-256 is not the one written); prepare this store again or restore it")
    return json.loads(content)


def grid_of(manifest: Mapping[str, Any], name: str) -> Grid:
    entry = manifest["arrays"][name]
    shape, profile = tuple(entry["shape"]), manifest["profile"]
    return Grid(entry["dtype"], shape, entry["chunk"], entry["shard_chunks"], profile, entry["unit_rows"])


def language_order(names: Sequence[str]) -> tuple[list[str], NDArray[np.uint16]]:
    """(names in order, [65536] place in it of each number that `names` gave). Refuses more than fit."""
    if len(names) >= NO_LANGUAGE:
        raise Refusal(f"{len(names)} languages; a store tells {NO_LANGUAGE - 1} apart at most")
    ordered = sorted(names)
    rank = np.full(2**16, NO_LANGUAGE, np.uint16)
    rank[: len(names)] = [ordered.index(name) for name in names]
    return ordered, rank


def side_default(name: str, documents: int) -> NDArray[Any]:
    """Rows of a side array for documents of which nothing is said."""
    side = SIDE_ARRAYS[name]
    assert side.default is not None
    return np.full((documents, *side.columns), side.default, side.dtype)
