"""Imported once by the pool's fork server: what every worker would import for itself."""

from __future__ import annotations

from parallel.engine import seam

seam.install()

import megatron.core.distributed  # noqa: E402, F401
import megatron.core.pipeline_parallel.schedules  # noqa: E402, F401
import megatron.core.transformer  # noqa: E402, F401

import pretrain.trainer  # noqa: E402, F401
