"""What a launcher must set for a placed plan: Slurm options, NUMA binding and environment, each with its reason.

The values are those of published runs: NVIDIA's Megatron-Bridge recipes and MLPerf Training submissions (read 2026-11).
Where the rest of the machine is not NVIDIA's, no environment is known here and a warning says so. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from parallel.planning.execution import Execution
from parallel.planning.placement import Placement, local_block
from parallel.planning.topology import HardwareTopology
from stoker.errors import Refusal

#: HybridEP raises ValueError above it (Megatron-Bridge ``utils.py``, read 2026-11).
HYBRID_EP_MAX_RANKS = 72


@dataclass(frozen=True)
class LaunchSettings:
    """``segment``: hosts that Slurm places in one block (rack); None where a domain is one host.
    ``ranks_per_numa``: ranks that share a processor, which ``numa`` binds them to; None where ranks are not bound.

    ``numa``: what goes before the command of a rank. ``reasons``: by option or variable. ``checks``: what must hold
    before the first rank starts.
    """

    nodes: int
    ranks_per_node: int
    segment: int | None
    numa: str | None
    environment: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ranks_per_numa: int | None = None

    def slurm(self) -> list[str]:
        """Options of sbatch."""
        options = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_per_node}"]
        return options if self.segment is None else [*options, f"--segment={self.segment}"]

    def explain(self) -> str:
        """Every setting and its reason, a line each."""
        shown = {option.split("=")[0]: option for option in self.slurm()}
        if self.numa:
            shown["numactl"] = self.numa
        shown |= {name: f"{name}={value}" for name, value in self.environment.items()}
        lines = [f"{text}  ({self.reasons[name]})" if name in self.reasons else text for name, text in shown.items()]
        return "\n".join((*lines, *self.checks, *self.warnings))


def launch_settings(placement: Placement, execution: Execution | None = None) -> LaunchSettings:
    """Settings that follow from where the ranks lie and how they run (default: as Stoker's engine runs them).

    Refuses HybridEP over more than 72 ranks, and over more than one domain of a rack-scale machine by ``place``.

    >>> from parallel.planning.placement import place
    >>> from parallel.planning.plan import ParallelPlan
    >>> from parallel.planning.topology import load_hardware
    >>> plan = ParallelPlan(512, 512, 1, num_layers=8, ep=64)
    >>> launch_settings(place(plan, load_hardware("gb200-nvl72"))).slurm()
    ['--nodes=128', '--ntasks-per-node=4', '--segment=16']
    """
    execution = execution or Execution()
    topology = placement.topology
    reasons: dict[str, str] = {}
    warnings = list(placement.warnings)
    segment = _segment(placement, reasons, warnings) if topology.rack_scale else None
    reasons["--ntasks-per-node"] = f"a rank for each of the {placement.host_ranks} devices used of a host"
    numa, near = None, None
    environment = {}
    if topology.device.vendor == "nvidia":
        near = _near(topology)
        numa = _numa(near, reasons)
        for name, value, reason in _environment(placement, execution):
            environment[name], reasons[name] = value, reason
    elif topology.device.vendor != "generic":
        warnings.append(f"no settings of {topology.device.vendor}'s libraries are known here: take the vendor's own")
    if execution.dispatcher == "deepep" and topology.rack_scale:
        warnings.append("DeepEP's kernels count at most 8 GPUs on NVLink (DeepEP issue 392): use hybridep in a rack")
    return LaunchSettings(
        nodes=placement.hosts,
        ranks_per_node=placement.host_ranks,
        segment=segment,
        numa=numa,
        environment=environment,
        reasons=reasons,
        checks=tuple(_checks(placement)),
        warnings=tuple(warnings),
        ranks_per_numa=near,
    )


def _segment(placement: Placement, reasons: dict[str, str], warnings: list[str]) -> int | None:
    """Hosts of a domain in use; Slurm wants the number of nodes to be a multiple of it."""
    hosts, host_ranks = placement.hosts, placement.host_ranks
    block = local_block(placement.plan, placement.topology)
    least = -(-block // host_ranks)
    used = hosts if placement.domains == 1 else placement.domain_ranks // host_ranks
    whole = [size for size in range(least, used + 1) if size == hosts or size * host_ranks % block == 0]
    even = [size for size in whole if hosts % size == 0]
    if not even:
        warnings.append(f"{hosts} hosts have no divisor up to {used} that holds groups of {block} ranks: no --segment")
        return None
    segment = even[-1]
    if segment < used:
        warnings.append(f"--segment={segment}: the {used} hosts of a domain do not divide {hosts}")
    reasons["--segment"] = f"hosts that Slurm keeps in one rack; {even[0]} is the least that keeps the groups on NVLink"
    return segment


def _near(topology: HardwareTopology) -> int | None:
    """GPUs that hang on one processor: two on a Grace, four on a socket of an HGX host; None where it is not known."""
    return {("c2c", 4): 2, ("pcie", 8): 4}.get((topology.host_link.kind, topology.domain.per_host))


def _numa(near: int | None, reasons: dict[str, str]) -> str | None:
    """Binding of a rank to the processor that its GPU hangs on."""
    if near is None:
        return None
    reasons["numactl"] = f"host memory and cores of the rank's own processor, which {near} GPUs share (Megatron-Bridge)"
    node = f"$((SLURM_LOCALID/{near}))"
    return f"numactl --cpunodebind={node} --membind={node}"


def _environment(placement: Placement, execution: Execution) -> Iterator[tuple[str, str, str]]:
    """(variable, value, reason) for NVIDIA's stack."""
    plan, topology = placement.plan, placement.topology
    experts = plan.ep * plan.etp > 1
    before_blackwell = topology.device.architecture in ("ampere", "hopper")
    if plan.zero == 3 or execution.expert_overlap or (experts and not (plan.tp > 1 and before_blackwell)):
        yield "CUDA_DEVICE_MAX_CONNECTIONS", "32", "exchanges of several groups run beside computation, a queue each"
    else:
        yield "CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron-core relies on one queue to start exchanges before products"
    yield "TORCH_NCCL_HIGH_PRIORITY", "1", "exchanges are scheduled before the computation that they run beside"
    if topology.rack_scale and placement.hosts > 1:
        yield "NCCL_CUMEM_ENABLE", "1", "NVLink between trays shares memory by cuMem handles"
    if topology.host_link.kind == "c2c":
        yield "NCCL_NET_GDR_LEVEL", "PHB", "the network card reaches GPU memory through Grace"
        yield "NCCL_NET_GDR_C2C", "1", "and takes NVLink-C2C to it rather than PCI Express"
    if plan.pp > 1 and placement.crossing("pp"):
        yield "NCCL_P2P_NET_CHUNKSIZE", "2097152", "pipeline messages over the network in pieces of 2 MiB (MLPerf)"
    if experts or execution.graphs != "none" or not before_blackwell:
        reason = (
            "memory that grows in place fragments less (out of memory without it: Megatron-Bridge pull request 3775)"
        )
        yield "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", reason
    if execution.graphs != "none":
        yield "NCCL_GRAPH_REGISTER", "0", "registered graph buffers do not go with expandable segments"
    if experts and topology.domain.in_network_reduction:
        yield "NCCL_NVLS_ENABLE", "0", "in-switch reduction takes SMs and memory that expert exchanges need"
    if execution.deterministic:
        yield "CUBLAS_WORKSPACE_CONFIG", ":4096:8", "without a fixed workspace cuBLAS is not deterministic"
    if execution.dispatcher == "hybridep" and experts:
        yield from _hybrid_ep(placement)


def _hybrid_ep(placement: Placement) -> Iterator[tuple[str, str, str]]:
    plan, topology = placement.plan, placement.topology
    group = plan.etp * plan.ep
    if group > HYBRID_EP_MAX_RANKS:
        raise Refusal(f"etp*ep={group}: HybridEP takes at most {HYBRID_EP_MAX_RANKS} ranks; lower ep, or use alltoall")
    size = topology.domain.size
    yield "NVLINK_DOMAIN_SIZE", str(size), "GPUs that HybridEP may reach by NVLink"
    yield "USE_MNNVL", "1" if topology.rack_scale else "0", "whether NVLink goes beyond the host"
    yield (
        "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN",
        str(min(group, size)),
        "expert ranks on one NVLink domain; a smaller number falls back to the network without a word (DeepEP 596)",
    )
    yield "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API", "128", "as NVIDIA's recipes set it"


def _checks(placement: Placement) -> Iterator[str]:
    if placement.topology.rack_scale and placement.topology.device.vendor == "nvidia" and placement.hosts > 1:
        yield (
            f"before ranks start: nvidia-imex is up with one node list on all {placement.hosts} trays, "
            "/dev/nvidia-caps-imex-channels has a channel for the job, and the trays of a segment report one "
            "ClusterUUID and clique in nvidia-smi -q"
        )
