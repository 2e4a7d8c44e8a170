"""From raw files to documents with the reason, if any, for which each is dropped."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from pydantic import BaseModel

from dataio import funnel, selection
from dataio.dedup import decontaminate, substring
from dataio.filters import code, language, licence, prose, redact
from dataio.funnel import Funnel
from dataio.ingest import source as sources
from dataio.ingest.options import Source
from dataio.pipeline import Job, Unit
from dataio.recipe import options_of
from dataio.selection import KEPT, Verdict
from dataio.stages import Counts, total
from dataio.steps.work import Work
from stoker import canonical
from stoker.errors import Refusal

#: Filters, in the order in which their reasons count.
FILTERS: dict[str, Any] = {
    "licence": licence,
    "code": code,
    "language": language,
    "prose": prose,
    "redact": redact,
}


def ingest(work: Work) -> None:
    """documents/, quarantine/ and inputs/. Refuses a source of which too much is malformed."""
    jobs = []
    for source in work.recipe.sources:
        # Where the files lie is in the unit's inputs; how many may be malformed is judged after reading.
        described = canonical.sha256(source.model_dump(mode="json", exclude={"paths", "max_malformed"}))
        names = work.input_files.setdefault(source.name, [])
        for raw in sources.units(source, work.base):
            unit = Unit(source.name, raw.number)
            writes = [unit.documents, f"quarantine/{unit.name}.jsonl", f"inputs/{unit.name}.json"]
            run = partial(sources.ingest, source, raw, *work.all_at(writes))
            jobs.append(Job(unit.name, run, (), writes, inputs={"source": described, **raw.inputs()}))
            work.units.append(unit)
            names += [file.url for file in raw.files]
    manifests = work.line.stage("ingest", sources.VERSION, {}, jobs)
    for source in work.recipe.sources:
        _refuse_malformed(work, source, total(m for m in manifests if m.task.startswith(f"{source.name}/")))
    for manifest in manifests:
        work.firsts.append(work.num_documents)
        work.num_documents += manifest.counts["documents"]
    _forget_others(work)


def _forget_others(work: Work) -> None:
    """Remove what an earlier recipe or earlier inputs left beside the documents: whoever reads all files of a folder,
    or joins them, is to find what this recipe makes."""
    known = {unit.name for unit in work.units}
    asked = {name for name, options in work.recipe.stages if options is not None} | {"filter", "select"}
    for path in sorted(work.at("attributes").glob("*")):
        if path.name not in asked:
            shutil.rmtree(path)
    for pattern in ("documents", "inputs", "quarantine", "attributes/*", "work/alive/*", "work/*/units"):
        for folder in sorted(work.line.folder.glob(pattern)):
            for path in sorted(folder.glob("*/*")):
                if f"{path.parent.name}/{path.name.partition('.')[0]}" not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_malformed(work: Work, source: Source, counts: Counts) -> None:
    why = {key.partition(".")[2]: count for key, count in counts.items() if key.startswith("malformed.")}
    bad, records = sum(why.values()), counts["documents"] + sum(why.values())
    if bad > source.max_malformed * records:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(why.items(), key=lambda item: -item[1]))
        raise Refusal(
            f"source {source.name}: {bad} of {records} records are malformed ({kinds}), more than max_malformed="
            f"{source.max_malformed} allows; samples are in {work.at(f'quarantine/{source.name}')}: correct the source "
            "or its options, or raise max_malformed"
        )


def filters(work: Work) -> None:
    """Measure what each filter asks for, then judge by the thresholds: who is alive, and why the others are not."""
    asked = {name: options for name in FILTERS if (options := getattr(work.recipe.stages, name)) is not None}
    for name, options in asked.items():
        module = FILTERS[name]
        jobs = [work.over(unit, module.measure, unit.attributes(name), options) for unit in work.units]
        work.line.stage(name, module.VERSION, options_of(options, module.MEASURED), jobs)
    verdicts = [_verdict(name, FILTERS[name], options) for name, options in asked.items()]
    jobs = []
    for unit in work.units:
        measured = {name: work.at(unit.attributes(name)) for name in asked}
        writes = [unit.attributes("filter"), unit.alive("filter")]
        run = partial(selection.judge, work.at(unit.documents), measured, verdicts, *work.all_at(writes))
        jobs.append(Job(unit.name, run, [unit.documents, *(unit.attributes(name) for name in asked)], writes))
    work.line.stage("filter", 1, {name: options_of(options) for name, options in asked.items()}, jobs)
    work.alive_after = "filter"


def choose(work: Work) -> None:
    """What becomes of each document, after all that was found out, and the funnel."""
    stages = work.recipe.stages
    weigh = stages.near is not None and stages.near.mode == "weigh"
    verdicts: list[Verdict] = []
    if stages.exact:
        verdicts.append(selection.EXACT)
    if stages.near:
        verdicts.append(selection.NEAR_WEIGHED if weigh else selection.NEAR)
    if stages.substring:
        verdicts.append(_verdict("substring", substring, stages.substring))
    if stages.decontaminate:
        verdicts.append(_verdict("decontaminate", decontaminate, stages.decontaminate))
    names = ["filter", *(name for name in ("language", "redact") if getattr(stages, name))]
    names += [verdict.stage for verdict in verdicts]
    jobs = []
    for unit in work.units:
        files, to = {name: work.at(unit.attributes(name)) for name in names}, unit.attributes("select")
        run = partial(selection.select, work.at(unit.documents), files, verdicts, weigh, work.at(to))
        jobs.append(Job(unit.name, run, [unit.documents, *(unit.attributes(name) for name in names)], [to]))
    options = {verdict.stage: options_of(getattr(stages, verdict.stage)) for verdict in verdicts}
    work.line.stage("select", 1, options, jobs)
    counted = report(work)
    left = {source for source in counted.sources if counted.total(source, KEPT).documents}
    work.keep_stores(left)
    if not left:
        raise Refusal(f"{work.line.folder}: nothing is left of any source; `stoker data stats` shows what dropped it")


def report(work: Work) -> Funnel:
    """funnel.json and report.html, of what was done so far."""
    done = work.line.stages
    changed = [*done.get("encode", ()), *done.get("substring-match", ())]
    counted = funnel.count(done["ingest"], done["select"], changed)
    funnel.write(counted, work.line.folder, work.line.folder.name)
    return counted


def _verdict(stage: str, module: Any, options: BaseModel) -> Verdict:
    return Verdict(stage, tuple(module.SCHEMA.names), tuple(module.COLUMNS), partial(module.judge, options=options))
