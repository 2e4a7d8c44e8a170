"""Models of transformers' qwen3_next and kimi_linear under Stoker's global names, both ways, bit for bit::

    spec, params = hf.read("Qwen3-Next-80B-A3B-Base", drop=("mtp.",))
    hf.write("exported", spec, params)

Both sides hold the same values: transformers packs several of Stoker's tensors into one, head by head, and spreads the
experts of a layer over one tensor each. The module of a family says which.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.exchange.folder import TensorFolder, read_config, write_folder
from pretrain.exchange.hf_config import FAMILIES, family_of, hf_config, require_statable, spec_from_hf
from pretrain.exchange.packing import Converted, Packing, Tensors, require_same_names
from pretrain.spec import ModelSpec, Parameter

__all__ = ["export_state", "hf_config", "import_state", "read", "spec_from_hf", "write"]

#: Size of a shard in bytes; the hub asks for files well under 50 GB.
SHARD_BYTES = 5 * 10**9


def read(directory: str | os.PathLike[str], drop: tuple[str, ...] = ()) -> tuple[ModelSpec, Mapping[str, Tensor]]:
    """Spec and parameters (each read when asked for) of a folder with ``config.json`` and safetensors files; see
    `import_state` for `drop` and refusals."""
    spec = spec_from_hf(read_config(directory))
    return spec, import_state(spec, TensorFolder(directory), drop)


def write(
    directory: str | os.PathLike[str], spec: ModelSpec, params: Tensors, shard_bytes: int = SHARD_BYTES, **inert: Any
) -> None:
    """A folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads. `inert`: more keys of
    ``config.json``, such as ``eos_token_id`` and ``max_position_embeddings``."""
    write_folder(directory, hf_config(spec, **inert), export_state(spec, params), shard_bytes)


def import_state(spec: ModelSpec, hf_tensors: Tensors, drop: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
    """``{global name: tensor}`` from transformers' tensors by name, in the dtype they have.

    Names may be those of files or of ``model.state_dict()`` of transformers 5. Tensors whose name starts with one of
    `drop` are left out, such as the multi-token prediction head of qwen3_next, ``mtp.``. What transformers lacks
    (router counters, and a router bias in qwen3_next) starts at zero. Values are made when asked for, packing by
    packing in the mapping's order, and may share memory with the source. Refuses missing and unknown names at once,
    wrong shapes and mixed dtypes of packed tensors when they are read.
    """
    family = FAMILIES[family_of(spec)]
    require_statable(spec, family.config_of(spec), ignore={"bias_update_rate"})
    parameters = spec.parameters()
    packings = list(family.packings(spec, hf_tensors.keys()))
    require_same_names(
        {name for name in hf_tensors if not name.startswith(drop)},
        {name for packing in packings for name in packing.theirs},
        "is config.json the one of these files? drop=('mtp.',) would leave out a multi-token prediction head",
    )
    packed = {name: packing for packing in packings for name in packing.ours}
    begun = {name: Packing((name,), {}) for name in parameters if name not in packed}

    def ours(packing: Packing) -> dict[str, Tensor]:
        if not packing.theirs:
            return {name: _zeros(parameters[name]) for name in packing.ours}
        return packing.to_ours(hf_tensors, parameters)

    return Converted(packed | begun, ours)


def export_state(spec: ModelSpec, params: Tensors) -> Mapping[str, Tensor]:
    """``{transformers' name: tensor}`` as in published files; the inverse of `import_state`.

    Router counters, which transformers lacks, are left out. Refuses a spec that its family cannot state (a router bias
    in qwen3_next, for one), missing and unknown names, wrong shapes, and packing tensors of different dtype.
    """
    hf_config(spec)
    parameters = spec.parameters()
    packings = list(FAMILIES[family_of(spec)].packings(spec))
    packed = {name for packing in packings for name in packing.ours}
    left_out = parameters.keys() - packed
    require_same_names(params.keys() - left_out, packed, "are they the parameters of this spec?")
    return Converted(
        {name: packing for packing in packings for name in packing.theirs},
        lambda packing: packing.to_theirs(params, parameters),
    )


def _zeros(parameter: Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=torch.int64 if parameter.dtype == "int64" else torch.float32)
