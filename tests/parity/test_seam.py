"""The seam: corrections are probed, and nobody else's torch changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.engine import seam
from stoker.errors import Refusal


def test_a_correction_that_corrects_nothing_any_more_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("CORRECTIONS", "CPU_CORRECTIONS"):
        rows = getattr(seam, table)
        gone = (replace(rows[0], because="text that no source holds"), *rows[1:])
        monkeypatch.setattr(seam, table, gone)
        seam.install.cache_clear()
        with pytest.raises(Refusal, match=rf"{rows[0].module} no longer holds `text that no source holds`"):
            seam.install()
        monkeypatch.undo()
    seam.install.cache_clear()
    assert len(seam.install()) == len(seam.CORRECTIONS) + (0 if torch.cuda.is_available() else 4)


def test_an_unchecked_version_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(seam, "CHECKED_VERSIONS", ("0.0.1",))
    seam.install.cache_clear()
    seam.install()
    assert "the parity suite was run against 0.0.1" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU seam is not installed where there is a CUDA device")
def test_the_view_of_torch_reads_cuda_as_the_cpu_and_leaves_torch_alone() -> None:
    seam.install()
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings

    assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert mappings.torch.cuda.current_device() == torch.device("cpu") and mappings.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
