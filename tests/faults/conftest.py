"""One bench for the folder: the undisturbed runs are made once."""

from __future__ import annotations

import pytest

from tests.faults.bench import Bench


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))
