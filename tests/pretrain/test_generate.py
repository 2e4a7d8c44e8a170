"""Generation: decoding with state is the model, token for token."""

from __future__ import annotations

import pytest
import torch

from pretrain.generate import Sampling, choose, sample
from pretrain.initialise import initialise
from pretrain.model.chunk import Chunk, build_chunks, named_tensors
from pretrain.model.decode import Decoder, packed
from pretrain.restore import alone
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from stoker.errors import Refusal

GATED_DELTA = GatedDelta(num_qk_heads=2, num_v_heads=4, key_dim=8, value_dim=6)
KDA = Kda(num_heads=3, key_dim=8, value_dim=6, gate_rank=5, conv_width=3)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope_fraction=0.5, output_gate=True)
EXPERTS = MoE(num_experts=4, top_k=2, hidden=16, shared_hidden=16, shared_gate=True)
SPEC = ModelSpec(
    width=24,
    vocab_size=57,
    layers=(
        LayerSpec(GATED_DELTA, Dense(32)),
        LayerSpec(ATTENTION, EXPERTS),
        LayerSpec(KDA, EXPERTS),
    ),
    init_std=0.5,
)


@pytest.fixture(scope="module")
def model() -> Chunk:
    groups = alone(len(SPEC.layers))
    (chunk,), builds = build_chunks(SPEC, groups, torch.float64, torch.device("cpu"))
    initialise(SPEC, named_tensors(builds), builds[0].layouts, groups.coords, seed=3)
    return chunk


def full_logits(model: Chunk, documents: list[list[int]]) -> torch.Tensor:
    """Logits at the last token of each document, by the training forward."""
    batch = packed(documents, torch.device("cpu"))
    with torch.no_grad():
        x = model.hidden(batch)
        assert model.head is not None and model.final_norm is not None
        return model.head(model.final_norm(x))[batch.cu_seqlens[1:] - 1]


@pytest.mark.parametrize("lengths", [(1,), (2, 3), (1, 70, 5), (63, 64, 65)])
def test_decoding_with_state_gives_the_logits_of_the_full_forward(model: Chunk, lengths: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    documents = [torch.randint(57, (n,), generator=random).tolist() for n in lengths]
    decoder = Decoder(model)
    logits = decoder.prefill(documents)
    for _ in range(8):
        expected = full_logits(model, documents)
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-12
        tokens = torch.randint(57, (len(lengths),), generator=random)
        for document, token in zip(documents, tokens.tolist(), strict=True):
            document.append(token)
        logits = decoder.step(tokens)


def test_greedy_decode_is_the_argmax_of_the_full_forward(model: Chunk) -> None:
    prompts = [[5, 9, 3], [11]]
    new = sample(model, prompts, Sampling(max_tokens=12, temperature=0.0), eos=None)
    documents = [list(prompt) for prompt in prompts]
    for position in range(12):
        best = full_logits(model, documents).argmax(-1).tolist()
        assert [sequence[position] for sequence in new] == best
        for document, token in zip(documents, best, strict=True):
            document.append(token)


def test_a_sequence_does_not_depend_on_what_is_generated_beside_it(model: Chunk) -> None:
    sampling = Sampling(max_tokens=10, temperature=1.0, seed=7)
    together = sample(model, [[5, 9], [11, 2, 8]], sampling, eos=None)
    assert sample(model, [[5, 9]], sampling, eos=None) == together[:1]
    assert sample(model, [[11, 2, 8]], sampling, eos=None) == together[1:]


def test_generation_ends_at_the_end_of_text_token(model: Chunk) -> None:
    greedy = Sampling(max_tokens=6, temperature=0.0)
    (free,) = sample(model, [[5, 9, 3]], greedy, eos=None)
    (ended,) = sample(model, [[5, 9, 3]], greedy, eos=free[3])
    assert ended == free[: free.index(free[3])]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=1.0, top_p=0.7), generator) for _ in range(200)}
    assert drawn == {0, 1}
    counts = [choose(logits, Sampling(temperature=1.0, top_p=1.0), generator) for _ in range(4000)]
    assert abs(counts.count(0) / 4000 - 0.5) < 0.03 and counts.count(3) > 0


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_refuses_what_it_cannot_do(bad: dict[str, float]) -> None:
    with pytest.raises(Refusal, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]
