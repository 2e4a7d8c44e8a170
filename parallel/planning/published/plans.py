"""The plan of a published run: its degrees, batch and stages, read from a row or chosen where the row is silent.

What other columns determine is inferred; what a source is known to do is taken; the rest is chosen as a practitioner
would. Whatever is not determined is appended, in words, to the reader's ``assumed``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan, Recompute, Stages, stages_from_counts
from parallel.planning.published.models import Model
from parallel.planning.published.recipes import Recipe
from parallel.planning.published.rows import Row
from stoker.errors import Refusal

#: Tokens of a micro-batch beyond which a practitioner would not go, without and with full recompute, on up to four
#: tensor-parallel ranks.
MICRO_BATCH_TOKENS = {"none": 8192, "full": 32768}
#: Micro-batches a pipeline rank wants at least, so that its bubble is small (Megatron's SC21 runs: 6 and more).
MICRO_BATCHES_PER_STAGE = 5
#: Chunks of a pipeline rank that interleaves: the middle of those that are published.
USUAL_CHUNKS = 4
#: World of a run that states neither devices nor data parallelism: a common one in the table.
USUAL_WORLD = 64
#: Of a device's memory, what weights and gradients may take of it.
USABLE = 0.9
#: NeuronCores of a Trainium1 chip; Neuron's tables count degrees in cores.
CORES_PER_CHIP = 2
#: Sources whose expert layers are not cut by tensor parallelism unless they say so.
WHOLE_EXPERTS = ("bridge", "nemo", "modelzoo", "megatron core")


class PlanReader:
    """Reads the plan of one row; ``plan`` is what it is for, and ``doubtful`` why it doubts what the row states.
    ``memory_bytes``: of a device, None where it is not known."""

    def __init__(
        self,
        row: Row,
        model: Model,
        execution: Execution,
        recipe: Recipe | None,
        memory_bytes: float | None,
        assumed: list[str],
    ) -> None:
        self.row, self.model, self.execution, self.recipe, self.assumed = row, model, execution, recipe, assumed
        self.memory_bytes, self.doubtful = memory_bytes, None  # type: float | None, str | None
        self.num_layers = len(model.workload.layers)

    def plan(self) -> ParallelPlan:
        """Refusal where the row's layout contradicts itself."""
        degrees = self._degrees()
        world, dp, tp, pp = degrees.pop("world"), degrees.pop("dp"), degrees["tp"], degrees["pp"]
        recompute = self._recompute()
        batch = self.row.global_batch_seqs
        micro_batch = self.row.micro_batch or self._micro_batch(batch, dp, tp, pp, recompute)
        if batch is None:
            batch = dp * micro_batch * MICRO_BATCHES_PER_STAGE * pp
            self._assume(f"global_batch={batch}")
        settings: dict[str, Any] = {
            **degrees,
            "world_size": world,
            "global_batch": batch,
            "micro_batch": micro_batch,
            "num_layers": self.num_layers,
            "recompute": recompute,
            "zero": self._zero(degrees),
            "sequence_parallel": self._sequence_parallel(tp),
        }
        return self._pipeline(pp, settings)

    def _assume(self, what: str) -> None:
        self.assumed.append(what)

    def _degrees(self) -> dict[str, int]:
        """tp, pp, cp, dp, ep, etp and world: stated, or following from the others."""
        row = self.row
        tp, pp, cp, dp, world = row.tp, row.pp, row.cp, row.dp, row.gpus
        if self.execution.stack == "neuron" and world and tp and tp * (pp or 1) * (dp or 1) == CORES_PER_CHIP * world:
            tp //= CORES_PER_CHIP
            self._assume(f"tp={tp}: the row counts cores, {CORES_PER_CHIP} a chip, and a plan counts chips")
        if tp is None and pp is None and cp is None and dp is None:
            tp, cp = self._spread(world)
        elif unknown := [name for name, value in (("tp", tp), ("pp", pp), ("cp", cp)) if value is None]:
            self._assume(f"{', '.join(unknown)}=1")
        tp, pp, cp, ep = tp or 1, pp or 1, cp or 1, row.ep or 1
        etp = row.etp or self._etp(tp)
        if world is None:
            world = tp * pp * cp * dp if dp else max(USUAL_WORLD, tp * pp * cp, etp * ep * pp)
            self._assume(f"gpus={world}" + ("" if dp else ": neither devices nor dp are stated"))
        dp = dp or max(1, world // (tp * pp * cp))
        if tp * pp * cp * dp != world:
            raise Refusal(f"tp*pp*cp*dp = {tp}*{pp}*{cp}*{dp} = {tp * pp * cp * dp} is not the {world} devices stated")
        return {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "ep": ep, "etp": etp, "world": world}

    def _spread(self, world: int | None) -> tuple[int, int]:
        """tp and cp of a row that states no degree: data parallel, and where the batch is smaller than the world,
        context parallel up to 4 and tensor parallel beyond (as the MLPerf runs do that name theirs)."""
        if not world:
            raise Refusal("neither the devices nor any degree is stated")
        excess = -(-world // (self.row.global_batch_seqs or world))
        cp = min(excess, 4)
        self._assume(f"layout: tp={excess // cp} pp=1 cp={cp}, none is stated")
        return excess // cp, cp

    def _etp(self, tp: int) -> int:
        """Megatron cuts experts over tp unless told otherwise; the recipes of some sources tell it."""
        if not self.model.workload.has_experts or tp == 1:
            return 1
        whole = any(name in self.row.source.lower() for name in WHOLE_EXPERTS)
        if self.row.gpus and self.row.gpus % (tp * (self.row.ep or 1) * (self.row.pp or 1)):
            whole = True  # cut over tp as well they would need more devices
        etp = 1 if whole or self.execution.stack != "megatron" else tp
        self._assume(f"etp={etp}")
        return etp

    def _recompute(self) -> Recompute:
        """Of whole layers; modules are ``Execution``'s. A recipe recomputes so many layers of each chunk."""
        row, recipe = self.row, self.recipe
        if row.recompute or not recipe:
            if not row.recompute:
                self._assume("recompute=none")
            return "full" if row.recompute.lower() == "full" else "none"
        chunk = -(-self.num_layers // ((row.pp or 1) * (row.vpp or 1)))
        if 0 < recipe.recomputed_layers < chunk:
            self._assume(f"recompute=none, though the recipe recomputes {recipe.recomputed_layers} of {chunk} layers")
        return "full" if recipe.recomputed_layers >= chunk else "none"

    def _micro_batch(self, batch: int | None, dp: int, tp: int, pp: int, recompute: str) -> int:
        """What gradient accumulation leaves, where it is stated; else the largest power of two that keeps a micro-batch
        and the pipeline's bubble small. A pipeline that keeps all activations takes 1."""
        each, size = (batch or 0) // dp, 1
        limit = MICRO_BATCH_TOKENS[recompute] * max(1, tp // 4)
        stages = MICRO_BATCHES_PER_STAGE * pp if pp > 1 else 1
        accumulated = re.search(r"\b(?:GA|grad accum) (\d+)", self.row.notes)
        if accumulated:
            size = max(1, each // int(accumulated[1]))
        elif pp == 1 or recompute == "full":
            while each and each % (2 * size) == 0 and each >= 2 * size * stages and 2 * size * self._seq_len <= limit:
                size *= 2
        self._assume(f"micro_batch={size}")
        return size

    @property
    def _seq_len(self) -> int:
        return self.model.workload.seq_len

    def _zero(self, degrees: dict[str, int]) -> int:
        stated, held = self.row.zero_stage, self._weights_bytes(degrees)
        if stated != 3 and self.memory_bytes and held > USABLE * self.memory_bytes:
            why = f"weights and gradients alone would take {held / 1e9:.0f} of {self.memory_bytes / 1e9:.0f} GB"
            self._assume(f"zero=3: {why}")
            self.doubtful = None if stated is None else f"zero_stage={stated}, with which {why}"
            return 3
        if stated is not None:
            return stated
        stack, generation = self.execution.stack, self.execution.generation
        zero = 3 if stack in ("fsdp", "torchtitan", "automodel") else 1
        if "FSDP-style" in self.row.notes and degrees["pp"] > 1:
            zero = 2  # weights stay gathered between the micro-batches of a pipeline (arXiv 2407.21783, section 3.3.2)
        if stack == "megatron" and generation < (2022, 1):
            zero = 0  # before Megatron's distributed optimizer
        self._assume(f"zero={zero}")
        return zero

    def _weights_bytes(self, degrees: dict[str, int]) -> float:
        """Weights and gradients that a rank would hold whole, on average over the pipeline."""
        parameters = 0.0
        for block in self.model.workload.blocks:
            for axes, count in block.parameters_by_axes().items():
                parameters += count / math.prod(degrees[axis] for axis in axes)
        return parameters / degrees["pp"] * (self.execution.element_bytes + self.execution.gradient_bytes)

    def _sequence_parallel(self, tp: int) -> bool:
        if tp == 1:
            return False
        if self.row.seq_parallel is not None:
            return bool(self.row.seq_parallel)
        on = self.execution.generation >= (2022, 5)  # introduced by arXiv 2205.05198
        self._assume(f"sequence_parallel={str(on).lower()}")
        return on

    def _pipeline(self, pp: int, settings: dict[str, Any]) -> ParallelPlan:
        """The plan with the layers on its stages: as the source's layout has them, else balanced. Chunks that a source
        keeps for embedding or head alone are not modelled: there the next smaller number of chunks is taken."""
        stated = re.search(r"layout (E\S+)", self.row.notes)
        layout = stated[1] if stated else self.recipe.layout if self.recipe else ""
        counts = layout_counts(layout) if pp > 1 else []
        if sum(counts) == self.num_layers and min(counts) and len(counts) % pp == 0:
            return ParallelPlan(**settings, vpp=len(counts) // pp, stages=stages_from_counts(counts))
        wanted = self.row.vpp or self._interleaving(pp)
        vpp = min(wanted, self.num_layers // pp) if pp > 1 else 1
        if vpp < wanted and pp > 1:
            self._assume(f"vpp={vpp} instead of {wanted}, which leaves chunks without a layer")
        return ParallelPlan(**settings, vpp=max(1, vpp), stages=self._stages(pp * vpp))

    def _stages(self, chunks: int) -> Stages:
        """Where prediction layers and the loss share the last chunk, they weigh like ``mtp`` + 2 layers (layouts of
        Megatron-Bridge's DeepSeek-V3 recipes: 16, 16, 16, 13 of 61 layers on four ranks); else balanced."""
        size = -(-(self.num_layers + self.model.mtp + 2) // chunks)
        counts = [size] * (chunks - 1) + [self.num_layers - size * (chunks - 1)]
        return stages_from_counts(counts) if self.model.mtp and chunks > 1 and counts[-1] > 0 else ()

    def _interleaving(self, pp: int) -> int:
        """Chunks a rank where a row does not say: about ``USUAL_CHUNKS`` where its notes tell of interleaving,
        or of pipeline messages under computation, which Megatron does in that schedule only; else 1."""
        if pp == 1:
            return 1
        vpp = 1
        if re.search("interleaved|PP/DP overlap", self.row.notes):
            ends = 2 * bool(self.num_layers % pp)  # embedding and head count as layers where the layers do not divide
            each = (self.num_layers + ends) // pp
            vpp = min((n for n in range(2, each + 1) if each % n == 0), key=lambda n: abs(n - USUAL_CHUNKS), default=1)
        self._assume(f"vpp={vpp}")
        return vpp


def layout_counts(text: str) -> list[int]:
    """Layers of each chunk of a Megatron pipeline layout.

    >>> layout_counts("Et*2|(tt|)*5t|tmL")
    [2, 2, 2, 2, 2, 2, 1, 1]
    """

    def unfold(match: re.Match[str]) -> str:
        return (match[1] or match[2]) * int(match[3])

    flat, folded = text, ""
    while flat != folded:
        flat, folded = re.sub(r"(?:\(([^()*]*)\)|([A-Za-z]))\*(\d+)", unfold, flat), flat
    return [chunk.count("t") for chunk in flat.split("|")]
