"""The short trainings of ``stoker plan calibrate``: small models that between them weigh each kind of work differently.

None has the shape of a preset: what is fitted to these is to hold for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dataio.store import StoreWriter
from dataio.types import TokenizerId
from pretrain import events
from pretrain.config import RunConfig, load
from stoker.yaml_core import dump_yaml

#: Steps of a training, and those of them that warm up.
STEPS, WARM_UP = 12, 4
#: The store that all read: random bytes in documents of uneven length. Its identity is no tokenizer's.
TOKENIZER = TokenizerId("0" * 64, vocab_size=256, eos_id=255)
DOCUMENTS, LONGEST = 200, 2000

NAME, STORE = "calibration", "store"

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Model:
    """``layers`` and the sections that they use, as in a configuration; ``windows``: of a step and of a micro-batch.

    ``anchor``: it weighs constants that no other does, so that no fit goes without it and none is judged by it.
    """

    name: str
    width: int
    vocab_size: int
    layers: Sequence[str]
    seq_len: int
    windows: tuple[int, int]
    sections: Sections
    anchor: bool = False


@dataclass(frozen=True)
class Training:
    model: Model
    ranks: int
    dtype: str
    layout: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        model, layout = self.model, [f"{axis} {degree}" for axis, degree in self.layout.items() if degree is not True]
        batch = f"{model.windows[0]} x {model.seq_len}"
        return ", ".join([model.name, batch, f"{self.ranks} rank{'s' * (self.ranks > 1)}", *layout])

    def write(self, folder: Path) -> Path:
        """Its configuration, to be run in ``folder``, which holds the store."""
        model = self.model
        global_batch, micro_batch = model.windows
        values = {
            "run": {"name": NAME, "dir": str(folder), "steps": STEPS, "dtype": self.dtype},
            "model": {"width": model.width, "vocab_size": model.vocab_size, "layers": list(model.layers)}
            | {name: dict(section) for name, section in model.sections.items()},
            "data": {"blend": {str(folder.parent / STORE): 1}, "seq_len": model.seq_len},
            "train": {"global_batch": global_batch, "micro_batch": micro_batch, "lr": 1e-3},
            "parallel": dict(self.layout) or {"tp": 1},
            "log": {"wandb": "off", "quiet": True},
        }
        path = folder / "config.yaml"
        path.write_text(dump_yaml(values), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Timed:
    """A training that was run: seconds of its steps, and the share of the cores that other processes took meanwhile."""

    training: Training
    config: RunConfig
    step_s: float
    others: float


def finished(path: Path) -> tuple[RunConfig, float]:
    """The configuration of a training that has ended, and its seconds a step."""
    config = load(path)
    times = [event.timing.step_time_s for event in events.read(config.run_dir)[WARM_UP:]]
    return config, median(took for took in times if took is not None)


def write_store(folder: Path) -> None:
    """The tokens that every training reads."""
    random = np.random.default_rng(0)
    lengths = random.integers(LONGEST // 20, LONGEST, DOCUMENTS)
    tokens = random.integers(0, TOKENIZER.eos_id, lengths.sum()).astype(np.int32)
    tokens[np.cumsum(lengths) - 1] = TOKENIZER.eos_id
    ids = np.stack([np.zeros(DOCUMENTS), np.arange(DOCUMENTS)], axis=1).astype(np.uint64)
    with StoreWriter(folder / STORE, "random", TOKENIZER, chunk_tokens=4096, shard_chunks=16) as writer:
        writer.append(tokens, lengths, lengths, ids)
        writer.commit()


def trainings(most_ranks: int, cuda: bool) -> list[Training]:
    """What to run on so many ranks; two at most are asked for."""
    found = _on_gpu() if cuda else _on_cpu()
    return [training for training in found if training.ranks <= most_ranks]


def _on_cpu() -> Iterator[Training]:
    attention, delta = "attention/dense", "gated_delta/dense"
    heads = {"num_heads": 4, "num_kv_heads": 2, "rope_fraction": 0.5}
    rule = {"num_qk_heads": 2, "num_v_heads": 4, "key_dim": 32, "value_dim": 32}

    def model(
        width: int, vocab: int, layers: Sequence[str], seq_len: int, windows: tuple[int, int], **sections: Any
    ) -> Model:
        used = {part for layer in layers for part in layer.split("/")}
        usual: Sections = {
            "attention": {**heads, "head_dim": width // 4},
            "dense": {"hidden": 3 * width},
            "gated_delta": rule,
            "kda": {"num_heads": 4, "key_dim": 32, "value_dim": 32, "gate_rank": 16},
        }
        chosen = {name: section for name, section in {**usual, **sections}.items() if name in used}
        kinds = "+".join(sorted(used))
        return Model(f"{kinds} {width}", width, vocab, layers, seq_len, windows, chosen)

    def runs(of: Model, alone: bool, *layouts: Mapping[str, Any]) -> Iterator[Training]:
        if alone:
            yield Training(of, 1, "float32")
        for layout in layouts:
            yield Training(of, 2, "float32", layout)

    shared = {"num_experts": 16, "top_k": 2, "hidden": 64, "shared_hidden": 64, "shared_gate": True}
    few = {"num_experts": 6, "top_k": 3, "hidden": 96, "shared_hidden": 128}
    mixed = ["attention/moe", "gated_delta/moe", "gated_delta/moe"]
    tensor, sequence, pipeline = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}
    # Many operations that do next to nothing: what an operation costs, and what a step does, whatever is in it.
    for windows, layouts in (((1, 1), ()), ((8, 1), ({}, tensor))):
        thin = replace(model(32, 512, [attention] * 8, 64, windows), anchor=True)
        yield from runs(thin, True, *layouts)
    # Wide products; a large vocabulary; long windows.
    yield from runs(model(256, 1024, [attention] * 4, 128, (8, 4)), True, {}, sequence)
    yield from runs(model(160, 6144, [attention] * 2, 128, (8, 4)), True, pipeline)
    yield from runs(model(48, 1024, [attention] * 3, 1024, (2, 1)), True, {})
    # Delta rules.
    yield from runs(model(80, 1536, [delta] * 4, 256, (8, 4)), True, {}, pipeline)
    yield from runs(model(112, 3072, [delta, delta, attention], 512, (4, 2)), True, tensor)
    yield from runs(model(80, 2048, ["kda/dense", "kda/dense", attention], 128, (8, 4)), True)
    # Experts.
    yield from runs(model(96, 2048, mixed, 256, (4, 2), moe=shared), True, {}, {"ep": 2})
    yield from runs(model(160, 3072, mixed[:2], 128, (8, 4), moe=few), False, {}, tensor)


def _on_gpu() -> Iterator[Training]:
    heads = {"num_heads": 16, "num_kv_heads": 4, "head_dim": 128, "rope_fraction": 0.5}
    delta = {"num_qk_heads": 8, "num_v_heads": 16, "key_dim": 128, "value_dim": 128}
    dense: Sections = {"attention": heads, "dense": {"hidden": 5632}}
    hybrid: Sections = {"attention": heads, "gated_delta": delta, "dense": {"hidden": 4096}}
    experts: Sections = {
        "attention": heads,
        "gated_delta": delta,
        "moe": {"num_experts": 16, "top_k": 4, "hidden": 768, "shared_hidden": 768},
    }
    models = (
        Model("dense 2048", 2048, 32_768, ["attention/dense"] * 4, 4096, (8, 2), dense),
        Model("hybrid 1536", 1536, 32_768, ["gated_delta/dense"] * 3 + ["attention/dense"], 2048, (8, 2), hybrid),
        Model("moe 1024", 1024, 16_384, ["gated_delta/moe", "attention/moe"] * 2, 2048, (8, 2), experts),
    )
    for model in models:
        yield Training(model, 1, "bfloat16")
        yield Training(model, 2, "bfloat16", {})
        yield Training(model, 2, "bfloat16", {"tp": 2, "sequence_parallel": True})
    yield Training(models[-1], 2, "bfloat16", {"ep": 2})
    yield Training(models[0], 2, "bfloat16", {"pp": 2})
