"""``stoker data prepare``: a recipe becomes token stores, step by step.

In ``<output>``:

    recipe.yaml                                   as resolved
    documents/<source>/<unit>.parquet             and inputs/<source>/<unit>.json: what they were made from
    attributes/<stage>/<source>/<unit>.parquet    what each stage found out, row for row
    quarantine/<source>/<unit>.jsonl              samples of what could not be read
    tokenizer.json, stores/<source>/              the result
    manifests/<stage>/..., timings.jsonl          what was done (stages.py)
    decontamination.json                          for every evaluation item, which documents hold it
    funnel.json, report.html                      what was kept, and why the rest was not
    work/                                         what stages hand to one another: may be removed, is then made again

Everything but ``timings.jsonl`` is a function of the recipe and its inputs, whoever did the work, however often it was
killed.
"""

from __future__ import annotations

from pathlib import Path

from dataio.pipeline import Pipeline, locked
from dataio.recipe import Recipe
from dataio.stages import Executor, room_for
from dataio.steps import copies, documents, tokens
from dataio.steps.work import Work
from stoker.files import write_atomic


def prepare(recipe: Recipe, base: Path, executor: Executor) -> None:
    """Do what the recipe says; `base` is the folder its paths are relative to. What is done already stays as it is.

    Refuses what cannot be done, naming file, source or key; what was finished by then is kept.
    """
    folder = recipe.folder(base)
    with room_for(str(folder)), locked(folder):
        write_atomic(folder / "recipe.yaml", recipe.to_yaml())
        work = Work(recipe, base, Pipeline(folder, executor))

        documents.ingest(work)
        documents.filters(work)

        copies.exact(work)
        copies.near(work)
        copies.substring(work)
        copies.decontaminate(work)
        documents.choose(work)

        tokens.tokenizer(work)
        tokens.order(work)
        tokens.tokens(work)
        tokens.stores(work)
        documents.report(work)
