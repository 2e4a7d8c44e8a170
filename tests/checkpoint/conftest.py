"""Chunks of a kilobyte, so that small tensors meet every case of the grid; see ``state.py``."""

from __future__ import annotations

import pytest

from pretrain.checkpoint import assembly, chunks
from tests.checkpoint.state import CHUNK_BYTES, EXCHANGE_BYTES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "TARGET_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(assembly, "EXCHANGE_BYTES", EXCHANGE_BYTES)
