"""Options of filters: no value becomes another, and what a recipe writes is what it reads."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from dataio.filters import code, language, licence, prose, redact
from stoker.sections import Section

OPTIONS: list[type[Section]] = [module.Options for module in (code, language, licence, prose, redact)]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (code.Options, {"max_lines": "100"}),
        (code.Options, {"max_lines": 1.0}),
        (code.Options, {"drop_vendored": 1}),
        (code.Options, {"max_mean_line_length": float("nan")}),
        (language.Options, {"min_score": "0.5"}),
        (language.Options, {"allowed": "en"}),
        (language.Options, {"allowed": [1]}),
        (licence.Options, {"denied": "MIT"}),
        (prose.Options, {"min_words": "50"}),
        (prose.Options, {"max_hash_share": float("inf")}),
        (redact.Options, {"at_least": True}),
        (redact.Options, {"kinds": "email"}),
    ],
)
def test_a_value_of_another_kind_is_refused(options: type[Section], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        options.model_validate(wrong)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.__module__.rpartition(".")[2])
def test_options_that_were_written_are_read_as_they_were_and_hash_and_pickle(options: type[Section]) -> None:
    first = options()
    for again in (options.model_validate(json.loads(first.model_dump_json())), pickle.loads(pickle.dumps(first))):
        assert again == first and hash(again) == hash(first)


def test_lists_and_whole_numbers_stand_for_tuples_and_shares() -> None:
    asked = language.Options.model_validate({"allowed": ["en", "fr"], "min_score": 1})
    assert asked.allowed == ("en", "fr") and asked.min_score == 1.0
    assert licence.Options.model_validate({"allowed": ["mit"], "denied": []}).allowed == ("MIT",)
    assert redact.Options.model_validate({"kinds": ["email", "ipv4"]}).kinds == ("email", "ipv4")
