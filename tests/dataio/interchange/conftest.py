"""A tokenizer that knows little more than bytes."""

from __future__ import annotations

import pytest

from dataio.tokenizer import Tokenizer, train
from tests.dataio.interchange.texts import TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(TEXTS * 50, 280, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
