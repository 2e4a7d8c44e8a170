"""The chunk table, by property."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.chunks import chunk_table, max_chunks
from kernels.samples import cu_seqlens_of

lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(lengths=lengths_strategy, size=st.integers(1, 9), group_chunks=st.integers(1, 20))
def test_every_token_has_one_slot_and_no_chunk_holds_two_segments(
    lengths: list[int], size: int, group_chunks: int
) -> None:
    num_tokens = sum(lengths)
    table = chunk_table(cu_seqlens_of(lengths), num_tokens, size, group_chunks)
    segment_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen: list[int] = []
    for group in table.groups:
        for chunk in range(len(group)):
            slots = range(chunk * size, (chunk + 1) * size)
            tokens = [int(group.tokens[slot]) for slot in slots if slot in group.filled.tolist()]
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert len(set(segment_of_token[tokens].tolist())) == 1
            seen += tokens
        assert sorted(group.filled.tolist() + group.padding.tolist()) == list(range(len(group) * size))
    assert sorted(seen) == list(range(num_tokens))
    assert table.num_chunks == sum(-(-length // size) for length in lengths)
    assert table.num_chunks <= max_chunks(num_tokens, len(lengths), size)


@given(lengths=lengths_strategy, size=st.integers(1, 9), group_chunks=st.integers(1, 20))
def test_scan_steps_follow_each_segment_from_its_start(lengths: list[int], size: int, group_chunks: int) -> None:
    """At every step, place p of the live prefix is the next chunk of the p-th longest segment."""
    bounds = cu_seqlens_of(lengths).tolist()
    table = chunk_table(cu_seqlens_of(lengths), sum(lengths), size, group_chunks)
    order, step, alive = table.segment_order.tolist(), 0, table.num_alive
    for group in table.groups:
        for start, count, survivors in group.steps:
            assert count == alive
            for place in range(count):
                assert int(group.tokens[(start + place) * size]) == bounds[order[place]] + step * size
            alive, step = survivors, step + 1
    assert alive == 0


@given(lengths=lengths_strategy, size=st.integers(1, 9), group_chunks=st.integers(1, 20))
def test_cut_then_join_is_the_identity_and_padding_is_zero(lengths: list[int], size: int, group_chunks: int) -> None:
    num_tokens = sum(lengths)
    x = torch.arange(1.0, num_tokens * 6 + 1).view(num_tokens, 2, 3)
    table = chunk_table(cu_seqlens_of(lengths), num_tokens, size, group_chunks)
    out = torch.full_like(x, torch.nan)
    for group in table.groups:
        chunks = group.cut(x).contiguous()
        assert not chunks.transpose(1, 2).flatten(0, 1)[group.padding].any()
        group.join(chunks, out)
    assert torch.equal(out, x)
