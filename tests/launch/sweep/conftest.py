"""A Slurm for a test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.launching.slurm_cluster import Cluster, missing


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()
