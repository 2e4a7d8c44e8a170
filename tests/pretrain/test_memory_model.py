"""The memory model against Stoker itself: every tensor, every buffer, what autograd keeps and a step's peak.

Ranks of a larger world are built one by one in this process, where a group knows its size and its rank and no peers;
pipelines run as they are, on two processes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from parallel.engine import collectives
from parallel.engine.groups import USED, Groups, create
from parallel.engine.pipeline import Pipeline, megatron_config
from parallel.engine.replicas import Replicas
from parallel.planning.execution import Execution
from parallel.planning.memory.blocks import Cut, block_memory
from parallel.planning.memory.prediction import LOGIT_BYTES, predict_memory
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import load_hardware
from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build, high
from pretrain.model.chunk import Chunk, build_chunks
from pretrain.model.sharding import layouts
from pretrain.objective import Normalisers, cross_entropy
from pretrain.optim.adamw import AdamW
from pretrain.restore import alone
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from pretrain.workload import workload_of
from tests.parity.pool import Pool
from tests.parity.specs import DENSE, HYBRID

CPU = load_hardware("cpu")
META = torch.device("meta")


class Peerless:
    """A group of a rank that is alone in its process."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def groups_of(plan: ParallelPlan, rank: int) -> Groups:
    made = {}
    for axes in USED:
        ranks = next(ranks for ranks in plan.group(axes) if rank in ranks)
        made[axes] = Peerless(len(ranks), ranks.index(rank))
    return Groups(plan, rank, plan.coords(rank), made, made[("tp",)])  # type: ignore[arg-type]


PLANS = {
    "one": ParallelPlan(1, 12, 1, num_layers=4, zero=0),
    "tp 2": ParallelPlan(4, 12, 1, num_layers=4, tp=2, sequence_parallel=True),
    "tp 3": ParallelPlan(3, 12, 1, num_layers=4, tp=3),
    "pp 3": ParallelPlan(6, 12, 1, num_layers=4, pp=3),
    "pp 2 vpp 2": ParallelPlan(2, 12, 1, num_layers=4, pp=2, vpp=2),
    "ep 3": ParallelPlan(6, 12, 1, num_layers=4, ep=3),
    "tp 2 ep 3 etp 2": ParallelPlan(6, 12, 1, num_layers=4, tp=2, ep=3, etp=2, sequence_parallel=True),
    "tp 2 pp 2 ep 2": ParallelPlan(8, 12, 1, num_layers=4, tp=2, pp=2, ep=2, sequence_parallel=True, zero=0),
}
SPECS = {"dense": DENSE, "hybrid": HYBRID}
CASES = [
    pytest.param(spec, plan, id=f"{name}, {layout}")
    for name, spec in SPECS.items()
    for layout, plan in PLANS.items()
    if name == "hybrid" or plan.ep == 1
]

#: Operations whose parameters are several tensors.
TENSORS = {"gates": ("A_log", "dt_bias"), "qk_norm.weight": ("q_norm.weight", "k_norm.weight")}


def tensors_of(name: str) -> tuple[str, ...]:
    """An operation's name in the workload -> its tensors' names in a layer."""
    if name in ("mixer.norm", "ffn.norm"):
        return (f"{name}.weight",)
    feed, _, rest = name.partition(".")
    if feed in ("mlp", "experts", "shared") and rest:
        return (f"ffn.{rest}.weight",) if feed == "mlp" else (f"ffn.{name}.weight",)
    if name == "router":
        return ("ffn.router.weight",)
    return tuple(f"mixer.{field}" for field in TENSORS.get(name, (name.removesuffix(".weight") + ".weight",)))


@pytest.mark.parametrize(("spec", "plan"), CASES)
def test_every_tensor_of_a_rank_is_an_operation_of_the_workload(spec: ModelSpec, plan: ParallelPlan) -> None:
    """By name and by number of elements, on one rank of each stage; the sum is that of the modules."""
    workload = workload_of(spec, seq_len=24)
    cut = Cut.of(plan, workload)
    for rank in range(0, plan.world_size, plan.world_size // plan.pp):
        chunks, builds = build_chunks(spec, groups_of(plan, rank), torch.bfloat16, META)
        held = {name: tensor.numel() for build in builds for name, tensor in build.parameters.items()}
        assert sum(held.values()) == sum(p.numel() for p in {p for chunk in chunks for p in chunk.parameters()})
        found: dict[str, float] = {}
        for index in (index for chunk in plan.chunks(plan.coords(rank)["pp"]) for index in chunk):
            for op in workload.layers[index].operations:
                if op.parameters:
                    names = [f"layers.{index}.{tensor}" for tensor in tensors_of(op.name)]
                    found[" ".join(names)] = cut.parameters(op)
                    held[" ".join(names)] = sum(held.pop(name) for name in names)
        ends = {"embed.weight": workload.embedding.operations[0]}
        ends |= dict(zip(("final_norm.weight", "head.weight"), workload.head.operations, strict=False))
        found |= {name: cut.parameters(ends[name]) for name in ends if name in held}
        assert found == held


def measured_state(spec: ModelSpec, plan: ParallelPlan, rank: int, dtype: torch.dtype) -> tuple[Counter[str], int]:
    """Bytes of weights, gradients and optimizer as ``Trainer`` allocates them, and the number of tensors."""
    alone(len(spec.layers))  # Megatron's buffers log, and ask which rank of the world this is
    groups = groups_of(plan, rank)
    config = megatron_config(groups, spec.width, len(spec.layers), dtype)
    chunks, builds = build_chunks(spec, groups, dtype, torch.device("cpu"), config)
    replicas = Replicas(
        chunks, [build.parameters for build in builds], layouts(spec, plan), groups, config, high(dtype)
    )
    options = SimpleNamespace(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decay_embedding=True)
    optimizer = AdamW(replicas.shards, spec.parameters(), options)  # type: ignore[arg-type]
    taken: Counter[str] = Counter()
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage() for build in builds for p in build.parameters.values()
    }
    taken["weights"] = sum(storage.nbytes() for storage in storages.values())
    for chunk in replicas.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            taken["gradients"] += buffer.grad_data.untyped_storage().nbytes()
    for _, _, tensor in optimizer.tensors():
        taken["optimizer"] += tensor.numel() * tensor.element_size()
    return taken, sum(len(build.parameters) for build in builds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("spec", "plan"), CASES)
def test_state_is_predicted_to_the_padding_of_megatrons_buffers(
    spec: ModelSpec, plan: ParallelPlan, dtype: str
) -> None:
    """Under ZeRO each tensor begins on 64 elements and each of a chunk's buffers ends on a multiple of 128 and of its
    ranks; else not a byte is added. The optimizer has no padding: over the ranks of a stage it is exact."""
    workload = workload_of(spec, seq_len=24, element_bytes=getattr(torch, dtype).itemsize)
    prediction = predict_memory(workload, plan, Execution(precision=dtype), CPU)  # type: ignore[arg-type]
    optimizer: Counter[int] = Counter()
    for rank in range(plan.world_size):
        taken, tensors = measured_state(spec, plan, rank, getattr(torch, dtype))
        stage = prediction.stages[plan.coords(rank)["pp"]]
        ends = 4 * plan.vpp * 128 * plan.dp  # of dense and expert buffers of two dtypes
        padding = 4 * (64 * tensors + ends) if plan.zero else 0
        for name in ("weights", "gradients"):
            assert 0 <= taken[name] - stage.components[name] <= padding, name
        optimizer[stage.pp] += taken["optimizer"]
    for stage in prediction.stages:
        ranks = plan.world_size // plan.pp
        assert optimizer[stage.pp] == pytest.approx(stage.components["optimizer"] * ranks, rel=1e-12)


class Live(TorchDispatchMode):
    """Bytes of the tensors that live, and the most there were; those in ``known`` do not count."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


WIDTH, SEQ_LEN = 256, 512
ATTENTION, EXPERTS = Attention(4, 2, 64), MoE(8, 2, 128, shared_hidden=64, shared_gate=True)
LAYERS = {
    "attention, dense": LayerSpec(ATTENTION, Dense(512)),
    "gated attention without qk norm": LayerSpec(Attention(4, 2, 64, qk_norm=False, output_gate=True), Dense(512)),
    "gated delta": LayerSpec(GatedDelta(2, 4, 64, 64), Dense(512)),
    "kda": LayerSpec(Kda(4, 64, 64, 32), Dense(512)),
    "experts": LayerSpec(ATTENTION, EXPERTS),
    "experts, losses": LayerSpec(
        GatedDelta(2, 4, 64, 64), MoE(8, 2, 128, router="sigmoid", balance_loss=1e-2, z_loss=1e-3)
    ),
}
DTYPES = ("bfloat16", "float32")


def model_of(spec: ModelSpec, dtype: torch.dtype, plan: ParallelPlan) -> tuple[Chunk, Build]:
    (model,), (build,) = build_chunks(spec, groups_of(plan, 0), dtype, torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for tensor in build.state.values():
        tensor.zero_()
    return model, build


def micro_batch(windows: int, vocabulary: int) -> MicroBatch:
    N = windows * SEQ_LEN
    tokens, ones = torch.randint(vocabulary, (N,)), torch.ones(N, dtype=torch.bool)
    return MicroBatch(
        tokens=tokens,
        targets=tokens,
        positions=torch.arange(N) % SEQ_LEN,
        loss_mask=ones,
        valid=ones,
        document=torch.zeros(N, dtype=torch.int64),
        cu_seqlens=torch.arange(0, N + 1, SEQ_LEN),
        windows=windows,
        normalisers=Normalisers(N, N, windows),
    )


def tensors_in(batch: MicroBatch) -> Iterator[torch.Tensor]:
    return (value for value in vars(batch).values() if isinstance(value, torch.Tensor))


def saved_bytes(model: Chunk, batch: MicroBatch, tokens: int) -> int:
    """What autograd saves in the first layer for a stream of ``tokens``, parameters and the batch not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tensors_in(batch))}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage().data_ptr()) not in known:
            saved[key] = tensor
        return tensor

    dtype = next(model.parameters()).dtype
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers[0](torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True), batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def kept_bytes(spec: ModelSpec, plan: ParallelPlan, dtype: str) -> float:
    workload = workload_of(spec, SEQ_LEN, getattr(torch, dtype).itemsize)
    execution = Execution(precision=dtype)  # type: ignore[arg-type]
    return block_memory(workload.layers[0], Cut.of(plan, workload), plan.recompute, execution, on_cpu=True).kept


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_keeps_is_what_autograd_saves(name: str, dtype: str, recompute: Any) -> None:
    """Within 8 %: what has no name in the workload are angles of the rotation, indices of routed tokens and the second
    matrix of KDA's chunks, more of a layer as narrow as this one than of one in use."""
    spec, plan = ModelSpec(WIDTH, 257, (LAYERS[name],)), ParallelPlan(1, 1, 1, num_layers=1, recompute=recompute)
    model, _ = model_of(spec, getattr(torch, dtype), plan)
    taken = saved_bytes(model, micro_batch(1, spec.vocab_size), SEQ_LEN)
    assert kept_bytes(spec, plan, dtype) == pytest.approx(taken, rel=0.08)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_tensor_rank_keeps_is_what_autograd_saves(
    name: str, sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one of two ranks, whose collectives give tensors of the right size."""

    def spread(x: torch.Tensor, group: Peerless, *_: Any) -> torch.Tensor:
        return x.repeat(group.size(), 1)

    def part(x: torch.Tensor, group: Peerless, *_: Any) -> torch.Tensor:
        return x[: len(x) // group.size()]

    for collective, of_one in {
        "gather_rows": spread,
        "collect_rows": spread,
        "reduce_scatter_rows": part,
        "split_rows": part,
        "replicate_in": lambda x, group: x,
        "reduce_out": lambda x, group: x,
    }.items():
        monkeypatch.setattr(collectives, collective, of_one)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    spec = ModelSpec(WIDTH, 257, (LAYERS[name],))
    plan = ParallelPlan(2, 1, 1, num_layers=1, tp=2, sequence_parallel=sequence_parallel)
    model, _ = model_of(spec, torch.bfloat16, plan)
    tokens = SEQ_LEN // 2 if sequence_parallel else SEQ_LEN
    taken = saved_bytes(model, micro_batch(1, spec.vocab_size), tokens)
    assert kept_bytes(spec, plan, "bfloat16") == pytest.approx(taken, rel=0.1)


def forget_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Each gradient goes when it is whole, as where Megatron adds it to its buffer."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("vocabulary", [257, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["attention, dense", "gated delta", "experts"])
def test_a_steps_peak_is_what_lives_at_most(name: str, dtype: str, vocabulary: int, recompute: Any) -> None:
    """Forward and backward of four layers. The estimate is within 6 % where the loss or what is kept decides; where a
    layer is made again its working set is taken for larger than it is, by up to 20 %."""
    kind = getattr(torch, dtype)
    spec = ModelSpec(WIDTH, vocabulary, (LAYERS[name],) * 4)
    plan = ParallelPlan(1, 1, 1, num_layers=4, recompute=recompute)
    model, _ = model_of(spec, kind, plan)
    batch = micro_batch(1, vocabulary)
    forget_gradients(model.parameters())
    with Live([*model.parameters(), *tensors_in(batch)]) as live:
        model(batch).backward()
    workload = workload_of(spec, SEQ_LEN, kind.itemsize)
    (stage,) = predict_memory(workload, plan, Execution(precision=dtype), CPU).stages  # type: ignore[arg-type]
    predicted = sum(stage.components[part] for part in ("activations", "working", "logits"))
    assert 0.94 <= predicted / live.peak <= (1.2 if recompute == "full" else 1.06)


PIPELINED = ModelSpec(WIDTH, 257, (LAYERS["attention, dense"],) * 8)


def peak_of_a_pipeline_rank(plan: dict[str, Any]) -> int:
    """The most bytes that live on this rank while the engine runs a step's micro-batches; a job of the pool."""
    layout = ParallelPlan.from_dict(plan)
    groups = create(layout)
    config = megatron_config(groups, WIDTH, layout.num_layers, torch.bfloat16)
    chunks, _ = build_chunks(PIPELINED, groups, torch.bfloat16, torch.device("cpu"), config)
    batches = [micro_batch(1, PIPELINED.vocab_size) for _ in range(layout.num_micro_batches)]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    forget_gradients(parameters)
    pipeline = Pipeline(chunks, groups, config)
    with Live([*parameters, *(tensor for batch in batches for tensor in tensors_in(batch))]) as live:
        pipeline.run(batches, rows=SEQ_LEN)
    return live.peak


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.parametrize("vpp", [1, 2, 4])
def test_a_pipelines_peak_is_what_lives_at_most_on_each_of_its_ranks(vpp: int, pool: Pool) -> None:
    """1F1B and interleaved, six micro-batches on two ranks, as the engine runs them."""
    plan = ParallelPlan(2, 6, 1, num_layers=8, pp=2, vpp=vpp, zero=0)
    peaks = pool.run(2, peak_of_a_pipeline_rank, plan.to_dict())
    for stage, peak in zip(predict_memory(workload_of(PIPELINED, SEQ_LEN), plan, Execution(), CPU).stages, peaks):
        predicted = sum(stage.components[part] for part in ("activations", "working", "logits", "messages"))
        assert 0.94 <= predicted / peak <= 1.02


@pytest.mark.parametrize("tp", [1, 2])
def test_the_loss_takes_the_bytes_of_a_logit_that_the_model_says(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From bfloat16 logits to their gradient; the logits themselves live while the loss is made, and not after."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    rows, N = 4000, 64
    hidden = torch.randn(N, 8, dtype=torch.bfloat16)
    weight = torch.randn(rows, 8, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(rows, (N,))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets, 0, Peerless(tp, 0)).sum()  # type: ignore[arg-type]

    with Live([hidden, weight, targets]) as live:
        loss(hidden @ weight.T).backward()
    assert live.peak / (N * rows) == pytest.approx(LOGIT_BYTES["stoker"][tp - 1], rel=0.02)
