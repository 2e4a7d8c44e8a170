"""The pipeline runtime: Megatron-core's schedules behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from parallel.engine import seam
from parallel.engine.groups import Groups


def megatron_config(groups: Groups, width: int, num_layers: int, dtype: torch.dtype) -> Any:
    """What Megatron's schedules and buffers read of its TransformerConfig.

    ``calculate_per_token_loss``: gradients are summed, never averaged; the loss is divided by the global number of
    targets before the backward pass (P1), so that no schedule or data-parallel size scales anything.
    """
    seam.install()
    from megatron.core.transformer import TransformerConfig

    plan = groups.plan
    interleaved = plan.vpp > 1
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=width,
        num_attention_heads=plan.tp,  # unread, but must be a multiple of tp; heads are the model's own affair
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if interleaved else None,
        # Experts are ours (parallel/engine/experts.py): Megatron is told of a dense model.
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=plan.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        # Batched transfers give wrong gradients in the interleaved schedule at pp=2, without an error; Megatron's own
        # command line refuses them. Overlapped, unbatched transfers are right.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        microbatch_group_size_per_vp_stage=plan.microbatch_group_size() if interleaved else None,
    )


class Pipeline:
    """Runs the micro-batches of a step through this rank's chunks, in the plan's schedule.

    A chunk is called with a micro-batch and returns its output: hidden states ``[rows, 1, D]``, or on the last chunk
    the scalar loss (already divided by its global normaliser). ``set_input_tensor`` gives it the states received.
    """

    def __init__(self, chunks: Sequence[Any], groups: Groups, config: Any) -> None:
        seam.install()
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        plan = groups.plan
        self._chunks = list(chunks)
        self._groups = groups.megatron()
        if plan.pp == 1:
            self._schedule, self._p2p = schedules.forward_backward_no_pipelining, None
        else:
            self._p2p = P2PCommunicator(pp_group=groups["pp"], config=config)
            self._schedule = (
                schedules.forward_backward_pipelining_with_interleaving
                if plan.vpp > 1
                else schedules.forward_backward_pipelining_without_interleaving
            )

    def run(self, micro_batches: Sequence[Any], rows: int, forward_only: bool = False) -> list[torch.Tensor]:
        """Forward and backward of every micro-batch; ``rows``: tokens of a micro-batch. Returns the micro-batches'
        losses on the last stage, an empty list elsewhere."""
        iterators = [iter(micro_batches) for _ in self._chunks]
        losses = self._schedule(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=rows,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self._p2p,
            pg_collection=self._groups,
        )
        return list(losses)


def _forward_step(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    return chunk(next(iterator)), _loss


def _loss(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), loss.detach()
