"""Chunks of a kilobyte, so that small tensors meet every case of the grid; see ``state.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretrain.checkpoint import assembly, chunks
from tests.checkpoint.state import CHUNK_BYTES, EXCHANGE_BYTES


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "TARGET_BYTES", CHUNK_BYTES)
        patch.setattr(assembly, "EXCHANGE_BYTES", EXCHANGE_BYTES)
        yield
