"""A stream's batches are a function of log and step, cut the same for every layout, with exact masks and boundaries."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.log import DataLog, Segment
from dataio.store import Store
from dataio.stream import BlendedStream, SequentialStream
from dataio.types import Batch, Part, TokenizerId
from stoker import canonical
from stoker.errors import Refusal
from tests.dataio import synthetic


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("stores")
    sizes = {"code": 5000, "prose": 2345, "rare": 700}
    return {
        name: synthetic.random_store(folder / name, size, seed, masked_share=0.1, source=name)
        for seed, (name, size) in enumerate(sizes.items())
    }


def join(batches: list[Batch]) -> dict[str, np.ndarray]:
    names = [field.name for field in fields(Batch) if field.name != "cu_seqlens"]
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}


@pytest.mark.parametrize("weights", [{"code": 1}, {"code": 2, "prose": 1}, {"code": 5, "prose": 3, "rare": 0.3}])
def test_p6_global_batches_are_bit_equal_for_every_number_of_data_ranks(
    stores: dict[str, Store], weights: dict[str, float]
) -> None:
    stream = synthetic.stream({name: stores[name] for name in weights}, 64, 24, weights)
    for step in (0, 1, 7):
        plan = stream.plan(step)
        whole = join([stream.read(plan, Part())])
        for dp in (2, 3, 4, 6, 8):
            parts = [Part(index, dp, micro_batch=24 // dp // (1 + (dp == 4))) for index in range(dp)]
            shares = join([stream.read(stream.plan(step), part) for part in parts])
            for name, array in whole.items():
                assert array.dtype == shares[name].dtype
                np.testing.assert_array_equal(array, shares[name], err_msg=f"{name}, dp={dp}")


def test_a_part_reads_its_share_of_the_bytes_and_nothing_else(stores: dict[str, Store]) -> None:
    stream = synthetic.stream(stores, 64, 24)
    before = sum(store.bytes_read for store in stores.values())
    plan = stream.plan(3)
    assert sum(store.bytes_read for store in stores.values()) == before, "a plan has no business with tokens"
    rows = Part(2, 6).rows(24)
    stream.read(plan, Part(2, 6))
    read = sum(store.bytes_read for store in stores.values()) - before
    assert read == 2 * (plan.length[rows] + 1).sum() <= 2 * 4 * 65


def oracle_rows(store: Store, start: int, length: int, seq_len: int) -> list[tuple[int, int, bool, int, int]]:
    """(token, target, counts, position, document) of each input of a window, token by token."""
    tokens, offsets = store.read(0, store.num_tokens).tolist(), store.doc_offsets.tolist()
    rows, first_document = [], None
    for t in range(seq_len):
        if t >= length:
            rows.append((0, 0, False, t - length, -1))
            continue
        p = start + t
        document = max(d for d in range(store.num_documents) if offsets[d] <= p)
        first_document = document if first_document is None else first_document
        counts = (p + 1) not in offsets and not store.doc_masked[document]
        position = p - max(offsets[document], start)
        rows.append((tokens[p], tokens[p + 1], counts, position, document - first_document))
    return rows


@pytest.mark.parametrize("seq_len", [1, 48, 256])
def test_p1_targets_masks_positions_and_documents_equal_a_token_by_token_oracle(
    stores: dict[str, Store], seq_len: int
) -> None:
    stream = synthetic.stream(stores, seq_len, 12)
    names = stream.sources
    for step in (0, 11):
        plan = stream.plan(step)
        batch = stream.read(plan, Part(micro_batch=3))
        for row in range(12):
            store = stores[names[plan.source[row]]]
            expected = oracle_rows(store, int(plan.start[row]), int(plan.length[row]), seq_len)
            columns = (batch.tokens, batch.targets, batch.loss_mask, batch.positions, batch.doc_index)
            for column, want in zip(columns, zip(*expected)):
                np.testing.assert_array_equal(column[row], want)
        starts = [(batch.positions[first : first + 3] == 0).ravel().nonzero()[0] for first in range(0, 12, 3)]
        for cu_seqlens, want in zip(batch.cu_seqlens, starts, strict=True):
            assert cu_seqlens.dtype == np.int32 and cu_seqlens.tolist() == [*want, 3 * seq_len]
            assert set(range(0, 3 * seq_len, seq_len)) <= set(cu_seqlens.tolist())


def test_p1_each_token_is_a_target_once_an_epoch_document_starts_excepted(stores: dict[str, Store]) -> None:
    store = stores["prose"]
    stream = synthetic.stream({"prose": store}, 96, 5)
    seen = np.zeros(store.num_tokens, np.int64)
    for step in itertools.count():
        plan = stream.plan(step)
        batch = stream.read(plan, Part(micro_batch=5))
        for row in np.flatnonzero(plan.epoch == 0):
            counted = np.flatnonzero(batch.loss_mask[row])
            seen[plan.start[row] + 1 + counted] += 1
        if plan.epoch.min() > 0:
            break
    expected = np.ones(store.num_tokens, np.int64)
    expected[store.doc_offsets[:-1]] = 0
    for document in np.flatnonzero(store.doc_masked):
        expected[store.doc_offsets[document] : store.doc_offsets[document + 1]] = 0
    np.testing.assert_array_equal(seen, expected)


CHANGE = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 12),
        "seq_len": st.sampled_from([8, 16, 24, 48]),
        "global_batch": st.integers(1, 9),
        "weights": st.dictionaries(st.sampled_from(["code", "prose", "rare"]), st.integers(1, 9), min_size=1),
        "skip_batches": st.integers(0, 2),
    }
)


@given(changes=st.lists(CHANGE, min_size=1, max_size=5))
def test_p3_changes_of_batch_length_and_blend_neither_repeat_nor_skip_tokens(
    stores: dict[str, Store], changes: list[dict]
) -> None:
    segments, at, ids = [], 0, {name: store.dataset_id for name, store in stores.items()}
    for change in changes:
        skip = change["skip_batches"] if segments else 0
        segments.append(Segment.of(at, change["seq_len"], change["global_batch"], change["weights"], ids, skip))
        at += change["steps"]
    stream = BlendedStream(DataLog(1, synthetic.TOKENIZER, tuple(segments), 48, 3), stores)

    read: list[tuple[str, int, int]] = []
    sample_ids: list[int] = []
    for step in range(at):
        plan = stream.plan(step)
        sample_ids += plan.sample_id.tolist()
        for source, epoch, start, length in zip(plan.source, plan.epoch, plan.start, plan.length):
            read += [(stream.sources[source], int(epoch), p) for p in range(start, start + length)]
    assert len(set(read)) == len(read), "a token was repeated"
    assert len(set(sample_ids)) == len(sample_ids) and sample_ids == sorted(sample_ids)
    if not any(segment.skip_batches for segment in segments):
        assert sample_ids == list(range(len(sample_ids)))
        for name, store in stores.items():
            epochs = [epoch for source, epoch, _ in read if source == name]
            whole = max(epochs, default=0) * (store.num_tokens - 1)
            assert sum(epoch < max(epochs, default=0) for epoch in epochs) == whole, f"a token of {name} was skipped"
            progress = stream.progress(at).get(name)
            assert (progress is None) == (name not in stream.sources)
            assert progress is None or progress["epochs"] == pytest.approx(len(epochs) / (store.num_tokens - 1))


def test_the_step_that_read_a_token_is_found_without_searching(stores: dict[str, Store]) -> None:
    ids = {name: store.dataset_id for name, store in stores.items()}
    log = DataLog(1, synthetic.TOKENIZER, (Segment.of(0, 24, 6, {"code": 2, "rare": 1}, ids),), 48, 3)
    log = log.append(Segment.of(7, 48, 4, {"rare": 1, "prose": 1}, ids, skip_batches=2), next_step=7)
    stream = BlendedStream(log, stores)
    seen = {}
    for step in range(60):
        plan = stream.plan(step)
        for row in range(plan.global_batch):
            name, start = stream.sources[plan.source[row]], int(plan.start[row])
            for token in range(start + 1, start + int(plan.length[row]) + 1):
                seen[name, int(plan.epoch[row]), token] = (step, row)
    store = stores["rare"]
    for token in range(1, store.num_tokens):
        found = stream.step_of("rare", token)
        assert found == seen.get(("rare", 0, token)) or (found is not None and found[0] >= 60)
    passed_over = [t for t in range(1, store.num_tokens) if stream.step_of("rare", t) is None]
    assert len(passed_over) == 2 * 2 * 24, "two batches of six windows, a third of them of this source"


def test_p3_plan_is_a_pure_function_of_log_and_step(stores: dict[str, Store]) -> None:
    one, other = (synthetic.stream(stores, 48, 8, {"code": 3, "prose": 2, "rare": 1}) for _ in range(2))
    forwards = [one.plan(step) for step in range(40)]
    for step in reversed(range(40)):
        plan = other.plan(step)
        for field in fields(plan):
            np.testing.assert_array_equal(getattr(plan, field.name), getattr(forwards[step], field.name))
    different = synthetic.stream(stores, 48, 8, {"code": 3, "prose": 2, "rare": 1}, seed=1)
    assert not np.array_equal(different.plan(0).start, forwards[0].start)


def test_state_is_small_equal_everywhere_and_refuses_other_data(stores: dict[str, Store], tmp_path: Path) -> None:
    many = {f"source-with-a-long-name-{i:03}": stores["code"] for i in range(100)}
    state = synthetic.stream(many, 64, 8).state_dict()
    assert len(canonical.dumps(state)) < 2048 and state == synthetic.stream(many, 64, 8).state_dict()

    stream = synthetic.stream(stores, 64, 8)
    state = stream.state_dict()
    stream.require_state(state, 3)
    ids = {name: store.dataset_id for name, store in stores.items()}
    longer = BlendedStream(stream.log.append(Segment.of(9, 32, 4, {"code": 1}, ids), 5), stores)
    longer.require_state(state, 3)
    with pytest.raises(Refusal, match="holds from step 9, which has begun; an entry can hold from step 10"):
        longer.require_state(state, 10)
    with pytest.raises(Refusal, match="not the beginning"):
        stream.require_state(longer.state_dict(), 3)
    with pytest.raises(Refusal, match="seed"):
        synthetic.stream(stores, 64, 8, seed=1).require_state(state, 3)
    with pytest.raises(Refusal, match="not the beginning"):
        synthetic.stream(stores, 64, 4).require_state(state, 3)
    with pytest.raises(Refusal, match="another tokenizer"):
        stream.require_state(state | {"tokenizer_sha256": "0" * 64}, 3)
    with pytest.raises(Refusal, match="not the data that the data log names as prose"):
        BlendedStream(stream.log, stores | {"prose": stores["rare"]})
    with pytest.raises(Refusal, match="no store is given"):
        BlendedStream(stream.log, {"code": stores["code"]})
    with pytest.raises(Refusal, match="made with the tokenizer 5a5a"):
        BlendedStream(replace(stream.log, tokenizer=TokenizerId("0" * 64, 257, 256)), stores)


def test_a_pass_over_held_out_text_reads_every_target_once_and_pads_the_rest(stores: dict[str, Store]) -> None:
    store = stores["rare"]
    for seq_len, global_batch in ((64, 4), (1000, 3), (7, 1)):
        stream = SequentialStream(store, seq_len, global_batch)
        targets, counted = [], 0
        for step in range(stream.num_steps):
            batch = stream.read(stream.plan(step), Part(micro_batch=global_batch))
            targets.append(batch.targets[~batch.padding])
            counted += int(batch.loss_mask.sum())
            assert not batch.loss_mask[batch.padding].any() and not batch.tokens[batch.padding].any()
        np.testing.assert_array_equal(np.concatenate(targets), store.read(1, store.num_tokens))
        lengths = np.diff(store.doc_offsets)
        assert counted == (lengths - 1)[~store.doc_masked].sum()
        with pytest.raises(IndexError):
            stream.plan(stream.num_steps)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"dp_size": 5}, "nearest that is: 20 or 25"),
        ({"dp_size": 4, "micro_batch": 4}, "nearest that is: 16 or 32"),
        ({"dp_size": 2, "dp_index": 2}, "dp_index=2"),
        ({"cp_size": 2}, "not cut along time yet"),
        ({"micro_batch": 0}, "at least one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(stores: dict[str, Store], part: dict[str, int], message: str) -> None:
    stream = synthetic.stream(stores, 64, 24)
    with pytest.raises(Refusal, match=message):
        stream.read(stream.plan(0), Part(**part))
