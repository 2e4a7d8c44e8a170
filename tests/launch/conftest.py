"""One pool of gloo processes for all tests of this folder, and a process that is after each test what it was before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.parity.pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Programs that are called in this process go elsewhere, set variables and take signals."""
    folder, environment = os.getcwd(), dict(os.environ)
    taken = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    for number, handler in taken.items():
        signal.signal(number, handler)
