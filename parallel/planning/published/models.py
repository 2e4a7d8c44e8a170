"""The model of a published run: its columns first, then its notes, then what its name says."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from parallel.planning.models.architectures import Architecture, Form, architecture_of, workload_from
from parallel.planning.published.rows import Row
from parallel.planning.workload import Workload
from stoker.errors import Refusal

COLUMNS = ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "head_dim", "experts", "topk", "moe_ffn", "vocab")
#: A model whose parameters differ by more from what its row states is told of.
PARAMETERS_TOLERANCE = 0.05
#: The vocabulary of a model of which neither the columns nor the name tell: Llama 3's.
USUAL_VOCAB = 128256


@dataclass(frozen=True)
class Model:
    """A row's model: ``workload`` (the same object for equal models), its depths of multi-token prediction, and in
    words what was assumed."""

    workload: Workload
    mtp: int
    assumed: tuple[str, ...]


def model_of(row: Row, form: Form) -> Model:
    """The model of a row. Raises Refusal naming the sizes that neither the columns nor the name give."""
    named = architecture_of(row.model)
    assumed = [] if named else ["architecture from the columns alone: the name is not known"]
    said: dict[str, Any] = {**_columns(row, named, assumed), **_notes(row, named or Architecture())}
    entry = replace(named or Architecture(), **said)
    try:
        if row.seq_len is None:
            raise Refusal("seq_len unknown")
        workload = _closest(row, entry, form, assumed)
    except Refusal as refusal:
        raise Refusal(f"{row.model}: {refusal}") from None
    return Model(workload, entry.mtp, tuple(assumed))


def _columns(row: Row, named: Architecture | None, assumed: list[str]) -> dict[str, int]:
    stated = {name: getattr(row, name) for name in COLUMNS if getattr(row, name)}
    if filled := [name for name in COLUMNS if named and getattr(named, name) and name not in stated]:
        assumed.append(f"{', '.join(filled)} from the model's name")
    if "vocab" not in stated and "vocab" not in filled:
        stated["vocab"] = USUAL_VOCAB
        assumed.append(f"vocab={USUAL_VOCAB}")
    return stated


def _notes(row: Row, named: Architecture) -> dict[str, Any]:
    """What notes and the words of a column say of the architecture."""
    notes, found = row.notes, dict[str, Any]()
    if mla := re.search(r"MLA \(q_lora (\d+), kv_lora (\d+), qk (\d+)\+(\d+) rope, v (\d+)\)", notes):
        names = ("q_lora", "kv_lora", "nope", "rope", "value_dim")
        found["mla"] = tuple(zip(names, map(int, mla.groups()), strict=True))
    if dense := re.search(r"first (?:(\d+) )?layers? dense", notes):
        found["dense_layers"] = int(dense[1] or 1)
    if latent := re.search(r"moe_latent (\d+)", notes):
        found["latent"] = int(latent[1])
    if fused := re.search(r"shared ffn (\d+)", notes) or re.search(r"fused (\d+)", row.shared_experts):
        found["shared"] = int(fused[1])
    elif row.shared_experts.isdigit():
        found["shared"] = int(row.shared_experts) * (row.moe_ffn or named.moe_ffn or 0)
    return {**found, "mtp": _depths(row, named)}


def _depths(row: Row, named: Architecture) -> int:
    """Depths of multi-token prediction: as the notes say, else as those train the model who built it."""
    if "w/o MTP" in row.notes or any(source in row.source for source in named.mtp_not_in):
        return 0
    if stated := re.search(r"(\d+) MTP", row.notes):
        return int(stated[1])
    return named.mtp or int("w/ MTP" in row.notes or "incl. MTP" in row.notes)


def _closest(row: Row, entry: Architecture, form: Form, assumed: list[str]) -> Workload:
    """The workload; what is not known of gating and tied embeddings is chosen to meet the stated parameters."""
    choices = [
        workload_from(replace(entry, activation=activation, tied=tied), row.seq_len or 0, form)
        for activation, tied in product(
            [entry.activation] if entry.activation else ["swiglu", "gelu"],
            [entry.tied] if entry.tied is not None else [False, True],
        )
    ]
    stated = (row.params_total_b or 0) * 1e9
    if not stated:
        if len(choices) > 1:
            assumed.append("a gated feed-forward and untied embeddings")
        return choices[0]
    best = min(choices, key=lambda workload: abs(workload.parameters - stated))
    if len(choices) > 1:
        assumed.append("gating and tied embeddings as the stated parameters suggest")
    if abs(best.parameters / stated - 1) > PARAMETERS_TOLERANCE:
        assumed.append(f"{best.parameters / 1e9:.4g} B parameters where the row states {row.params_total_b:g} B")
    return best
