"""A run that takes a second: every mixer and feed-forward, float64, on stores made for the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import events
from pretrain.events import StepEvent, deterministic
from stoker.yaml_core import dump_yaml
from tests.dataio.synthetic import random_store

CONFIG: Mapping[str, Any] = {
    "model": {
        "width": 16,
        "vocab_size": 257,
        "layers": ["gated_delta/dense", "kda/dense", "attention/moe"],
        "gated_delta": {"num_qk_heads": 2, "num_v_heads": 2, "key_dim": 8, "value_dim": 8},
        "kda": {"num_heads": 2, "key_dim": 8, "value_dim": 8, "gate_rank": 4},
        "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
        "dense": {"hidden": 24},
        "moe": {"num_experts": 4, "top_k": 2, "hidden": 16},
    },
    "train": {"global_batch": 12, "lr": 1e-2},
    "log": {"wandb": "off", "every": 1},
}


def tiny(folder: Path, layers: Sequence[str] = CONFIG["model"]["layers"], **run: Any) -> Path:
    """A configuration in ``folder``, with its stores beside it; returns its path. ``run``: keys of the run section."""
    if not (folder / "train").exists():
        random_store(folder / "train", 6000, seed=1, source="train", masked_share=0.2)
        random_store(folder / "heldout", 900, seed=2, source="heldout")
    used = {"width", "vocab_size", *(part for layer in layers for part in layer.split("/"))}
    values = {
        **CONFIG,
        "model": {key: value for key, value in CONFIG["model"].items() if key in used} | {"layers": list(layers)},
        "run": {"name": "tiny", "dir": str(folder / "runs"), "steps": 8, "dtype": "float64", **run},
        "data": {"blend": {str(folder / "train"): 1}, "heldout": {"text": str(folder / "heldout")}, "seq_len": 32},
        "checkpoint": {"every": 3},
        "eval": {"windows": 5},
    }
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(values))
    return path


def trained(run_dir: Path) -> list[StepEvent]:
    return events.read(run_dir)


def fixed(run_dir: Path) -> list[dict[str, Any]]:
    """The deterministic keys of every step that stands (P5)."""
    return [deterministic(event) for event in events.read(run_dir)]
