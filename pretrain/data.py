"""The data of a run: stores opened and checked, the data log kept, the stream of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dataio.log import DataLog, Segment
from dataio.store import Store
from dataio.stream import BlendedStream
from pretrain.config import RunConfig
from stoker.errors import Refusal
from stoker.hashing import sha256_file

DATA_LOG = "data_log.jsonl"
TOKENIZER = "tokenizer.json"


def open_stores(config: RunConfig) -> dict[str, Store]:
    """The stores of ``data.blend`` by source name. Refuses stores that do not fit together or the model."""
    stores: dict[str, Store] = {}
    for path in config.data.blend:
        store = Store.open(path)
        if store.source in stores:
            raise Refusal(
                f"data.blend: {path} and {stores[store.source].path} are both the source {store.source!r}; "
                "prepare one of them under another name"
            )
        stores[store.source] = store
    first = next(iter(stores.values()))
    for store in (*stores.values(), *open_heldout(config).values()):
        if store.tokenizer != first.tokenizer:
            raise Refusal(
                f"{store.path} was made with another tokenizer ({store.tokenizer.sha256[:12]}) than {first.path} "
                f"({first.tokenizer.sha256[:12]}); prepare both with one"
            )
    if first.tokenizer.vocab_size > config.model.vocab_size:
        raise Refusal(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of {first.path} "
            f"({first.tokenizer.vocab_size} tokens): set model.vocab_size={first.tokenizer.vocab_size}"
        )
    return stores


def open_heldout(config: RunConfig) -> dict[str, Store]:
    """The stores of ``data.heldout`` by domain."""
    return {domain: Store.open(path) for domain, path in config.data.heldout.items()}


def read_tokenizer(config: RunConfig, stores: Mapping[str, Store]) -> bytes | None:
    """The ``tokenizer.json`` that the stores were made with: ``data.tokenizer``, or the file of that name and hash
    beside a store or above it. None where there is none: the run then has no bits per byte, and writes no text."""
    store = next(iter(stores.values()))
    named = config.data.tokenizer
    places = [Path(named)] if named else [folder / TOKENIZER for folder in (store.path, *store.path.absolute().parents)]
    for path in places:
        if path.is_file() and sha256_file(path) == store.tokenizer.sha256:
            return path.read_bytes()
    if named:
        raise Refusal(
            f"data.tokenizer={named} is not the tokenizer of {store.path} (SHA-256 {store.tokenizer.sha256[:12]}), or "
            "not there: give its tokenizer.json"
        )
    return None


def validate_data(config: RunConfig) -> None:
    """Refuse what would be refused once the run reads: its stores, its tokenizer, and the order of its windows."""
    stores = open_stores(config)
    read_tokenizer(config, stores)
    BlendedStream(first_log(config, stores), stores)
    if (config.run_dir / DATA_LOG).exists():
        BlendedStream(DataLog.open(config.run_dir / DATA_LOG), stores)


def first_log(config: RunConfig, stores: Mapping[str, Store]) -> DataLog:
    """The data log with which a new run begins."""
    tokenizer = next(iter(stores.values())).tokenizer
    return DataLog(config.run.seed, tokenizer, (segment_of(config, stores, 0),))


def segment_of(config: RunConfig, stores: Mapping[str, Store], from_step: int) -> Segment:
    """What the configuration says of the data, as a segment of the log."""
    by_path = {store.path: name for name, store in stores.items()}
    weights = {by_path[Path(path)]: weight for path, weight in config.data.blend.items()}
    datasets = {name: store.dataset_id for name, store in stores.items()}
    return Segment.of(from_step, config.data.seq_len, config.train.global_batch, weights, datasets)
