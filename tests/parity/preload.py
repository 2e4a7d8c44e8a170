"""Imported once by the pool's fork server: what every worker would import for itself."""

from __future__ import annotations

import warnings

from parallel.engine import seam

seam.install()

import megatron.core.distributed  # noqa: E402
import megatron.core.pipeline_parallel.schedules  # noqa: E402
import megatron.core.transformer  # noqa: E402, F401

import pretrain.trainer  # noqa: E402, F401
from kernels import delta_chunks  # noqa: E402

# Windows of the suite are shorter than a chunk: with chunks of 8 tokens a document crosses several, and the suite does
# not spend its time on the padding of chunks.
delta_chunks.CHUNK = 8

# torch 2.13 renames collectives that Megatron-core 0.16 calls; every worker would say so.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
