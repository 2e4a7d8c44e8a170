"""A folder of safetensors files with its ``config.json``, as the Hugging Face hub lays it out. No pickle.

One ``model.safetensors``, or shards ``model-00001-of-00003.safetensors`` with ``model.safetensors.index.json``, which
maps each tensor to its shard.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stoker.errors import Refusal
from stoker.files import sync_directory, write_atomic

_WHOLE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name; a tensor is read when it is asked for, and not kept.

    Refuses a folder without safetensors, an index that names a file that is not there, and a damaged file, by name.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        if (directory / _INDEX).is_file():
            files = read_json(directory / _INDEX).get("weight_map", {})
        elif (directory / _WHOLE).is_file():
            files = dict.fromkeys(_open(directory / _WHOLE).keys(), _WHOLE)
        else:
            raise Refusal(
                f"{directory}: neither {_WHOLE} nor {_INDEX} is there; other formats (.bin, .pt) run code when loaded "
                "and are not read: convert them to safetensors first"
            )
        for name in sorted(set(files.values())):
            if Path(name).name != name or not (directory / name).is_file():
                raise Refusal(f"{directory / _INDEX} names {name!r}, which is not a file of that folder")
        self._files = {name: directory / file for name, file in files.items()}
        self._open = {path: _open(path) for path in sorted(set(self._files.values()))}

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            return self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise Refusal(f"{path}: tensor {name!r} cannot be read ({error}); fetch the file again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    return read_json(Path(directory) / _CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refusal(f"{path} is not there: give the folder of a Hugging Face checkpoint") from None
    except ValueError as error:
        raise Refusal(f"{path}: damaged ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def write_folder(
    directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], shard_bytes: int
) -> None:
    """Write tensors in shards of at most `shard_bytes` (a larger tensor gets its own), then ``config.json`` with the
    ``dtype`` that most bytes have.

    Memory: one shard, since tensors are taken in the mapping's order and not kept. Shards get their names once all are
    on disk and ``config.json`` comes last: a folder that has it is whole. Refuses a folder that is not empty.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise Refusal(f"{directory} is not empty: a checkpoint is written to a folder of its own")

    shards: list[list[str]] = []
    bytes_of: Counter[str] = Counter()
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, _part(directory, len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        for tensor in shard.values():
            bytes_of[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes

    count = len(shards)
    names = [_WHOLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for index, name in enumerate(names):
        with open(_part(directory, index), "rb") as file:
            os.fsync(file.fileno())
        os.replace(_part(directory, index), directory / name)
    sync_directory(directory)
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index_json = {"metadata": {"total_size": bytes_of.total()}, "weight_map": weight_map}
        write_atomic(directory / _INDEX, json.dumps(index_json, indent=2, sort_keys=True) + "\n")
    dtype = bytes_of.most_common(1)[0][0]
    write_atomic(directory / _CONFIG, json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True) + "\n")


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def _part(directory: Path, index: int) -> Path:
    return directory / f".{index}.safetensors.tmp"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Refusal(f"{path}: damaged ({error}); fetch the file again") from None
