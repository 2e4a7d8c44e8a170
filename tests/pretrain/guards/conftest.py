"""One pool of gloo processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
