"""What the steps of a preparation share: the recipe, the pipeline, and the document files that ingest made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from dataio.dedup.arrays import parts_within
from dataio.pipeline import Job, Pipeline, Unit
from dataio.recipe import Recipe
from dataio.stages import Counts


@dataclass
class Work:
    """`base`: the folder that the recipe's paths are relative to."""

    recipe: Recipe
    base: Path
    line: Pipeline
    units: list[Unit] = field(default_factory=list)  # in the order of the recipe's sources
    firsts: list[int] = field(default_factory=list)  # number of each unit's first document, over all
    num_documents: int = 0
    input_files: dict[str, list[str]] = field(default_factory=dict)  # of each source, by their numbers
    alive_after: str = ""  # the last stage that dropped documents

    def at(self, path: str) -> Path:
        return self.line.folder / path

    def all_at(self, paths: Iterable[str]) -> list[Path]:
        return [self.at(path) for path in paths]

    def alive(self) -> list[str]:
        """Of every unit, which documents are."""
        return [unit.alive(self.alive_after) for unit in self.units]

    def by_source(self) -> Iterator[tuple[str, list[Unit]]]:
        for source, units in groupby(self.units, lambda unit: unit.source):
            yield source, list(units)

    def parts(self, count: int, bytes_each: int) -> int:
        """Ranges that something is cut into, so that one fits the memory of a process."""
        return parts_within(count, bytes_each, self.recipe.resources.memory_bytes)

    def over(self, unit: Unit, function: Callable[..., Counts], to: str, *more: Any) -> Job:
        """A job that reads a document file and writes one file."""
        return Job(unit.name, partial(function, self.at(unit.documents), self.at(to), *more), [unit.documents], [to])

    def keep_stores(self, sources: Collection[str]) -> None:
        """Remove the token stores of all other sources: a recipe that leaves nothing of a source leaves no store."""
        for path in sorted(self.at("stores").glob("*")):
            if path.name not in sources:
                shutil.rmtree(path)
                self.at(f"manifests/store/{path.name}.json").unlink(missing_ok=True)

    def decide(
        self, stage: str, function: Callable[..., Counts], found: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        """The last step of finding copies: attributes of every document file, and who is alive after it."""
        jobs = []
        for unit, first, alive in zip(self.units, self.firsts, self.alive()):
            writes = [unit.attributes(stage), unit.alive(stage)]
            attributes, after = self.all_at(writes)
            paths = {"alive": self.at(alive), "attributes": attributes, "alive_after": after}
            run = partial(function, self.at(unit.documents), first, **paths)
            number = {"first": str(first)}
            jobs.append(Job(unit.name, run, [unit.documents, alive], writes, {"found": found}, number))
        self.line.stage(stage, 1, options, jobs)
        self.alive_after = stage
