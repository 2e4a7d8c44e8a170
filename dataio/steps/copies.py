"""Who is a copy of whom: whole documents, nearly whole ones, passages, and items of evaluation sets."""

from __future__ import annotations

from functools import partial

from dataio.dedup import decontaminate as items
from dataio.dedup import evaluation, ngrams
from dataio.dedup import exact as exact_copies
from dataio.dedup import near as near_copies
from dataio.dedup import substring as passages
from dataio.dedup.sketch import NUM_BANDS
from dataio.pipeline import Job
from dataio.recipe import options_of
from dataio.steps.work import Work

#: What was found of every evaluation item.
REPORT = "decontamination.json"


def exact(work: Work) -> None:
    if work.recipe.stages.exact is None:
        return
    digests = [unit.work("exact", ".npy") for unit in work.units]
    jobs = [work.over(unit, exact_copies.digest, to) for unit, to in zip(work.units, digests)]
    work.line.stage("exact-digest", 1, {}, jobs)
    alive, parts = work.alive(), work.parts(work.num_documents, exact_copies.BYTES_PER_DOCUMENT)
    read, paths = {"digests": digests, "alive": alive}, (work.all_at(digests), work.all_at(alive))
    gathered, jobs = [f"work/exact/gathered/{part:05d}.npy" for part in range(parts)], []
    for part, to in enumerate(gathered):
        run = partial(exact_copies.gather, *paths, part, parts, work.at(to))
        jobs.append(Job(f"{part:05d}", run, (), [to], read))
    work.line.stage("exact-gather", 1, {"parts": parts}, jobs)
    work.decide("exact", partial(exact_copies.decide, gathered=work.all_at(gathered)), gathered, {})


def near(work: Work) -> None:
    options = work.recipe.stages.near
    if options is None:
        return
    folders = [unit.work("near") for unit in work.units]
    jobs = []
    for unit, folder in zip(work.units, folders):
        run = partial(near_copies.sketch, work.at(unit.documents), work.at(folder))
        jobs.append(Job(unit.name, run, [unit.documents], [f"{folder}/{name}" for name in near_copies.FILES]))
    work.line.stage("near-sketch", 1, {}, jobs)
    alive, parts = work.alive(), work.parts(work.num_documents, near_copies.BYTES_PER_DOCUMENT)
    sketches = [path for job in jobs for path in job.writes]
    read, paths = {"sketches": sketches, "alive": alive}, (work.all_at(folders), work.all_at(alive))
    pairs, jobs = [], []
    for band in range(NUM_BANDS):
        for part in range(parts):
            to = f"work/near/pairs/{band:02d}-{part:05d}.npy"
            run = partial(near_copies.band, *paths, band, part, parts, work.at(to), work.recipe.resources.memory_bytes)
            jobs.append(Job(f"{band:02d}-{part:05d}", run, (), [to], read))
            pairs.append(to)
    work.line.stage("near-band", 1, {"parts": parts}, jobs)
    clusters = "work/near/clusters.npy"
    run = partial(near_copies.cluster, work.all_at(pairs), work.all_at(folders), work.at(clusters))
    job = Job("all", run, (), [clusters], {"pairs": pairs, "sketches": sketches})
    work.line.stage("near-cluster", 1, {}, [job])
    drop = options.mode == "drop"
    work.decide("near", partial(near_copies.decide, clusters=work.at(clusters), drop=drop), [clusters], {"drop": drop})


def substring(work: Work) -> None:
    options = work.recipe.stages.substring
    if options is None:
        return
    measured = options_of(options, passages.MEASURED)
    folders, jobs = [unit.work("substring") for unit in work.units], []
    for unit, folder, alive in zip(work.units, folders, work.alive()):
        run = partial(passages.anchors, work.at(unit.documents), work.at(alive), work.at(folder), options)
        jobs.append(Job(unit.name, run, [unit.documents, alive], [f"{folder}/{name}" for name in passages.FILES]))
    found = work.line.stage("substring-anchors", passages.VERSION, measured, jobs)
    parts = work.parts(sum(manifest.counts["anchors"] for manifest in found), passages.BYTES_PER_ANCHOR)
    read, paths = {"anchors": [path for job in jobs for path in job.writes]}, work.all_at(folders)
    matched, jobs = [f"work/substring/matched/{part:05d}.npy" for part in range(parts)], []
    memory = work.recipe.resources.memory_bytes
    for part, to in enumerate(matched):
        run = partial(passages.match, paths, part, parts, work.at(to), options, memory)
        jobs.append(Job(f"{part:05d}", run, (), [to], read))
    work.line.stage("substring-match", passages.VERSION, {**measured, "parts": parts}, jobs)
    read, spans, first, jobs = read | {"matched": matched}, work.all_at(matched), 0, []
    for unit, folder, manifest in zip(work.units, folders, found):
        to = unit.attributes("substring")
        run = partial(passages.decide, work.at(unit.documents), work.at(folder), first, spans, work.at(to))
        jobs.append(Job(unit.name, run, [unit.documents], [to], read))
        first += manifest.counts["bytes_in"]
    work.line.stage("substring", passages.VERSION, measured, jobs)


def decontaminate(work: Work) -> None:
    """Attributes, and `REPORT`."""
    options = work.recipe.stages.decontaminate
    if options is None:
        return
    measured = options_of(options, items.MEASURED)
    folder, frequency = "work/decontaminate/index", "work/decontaminate/frequency.npy"
    index = [f"{folder}/{name}" for name in ngrams.FILES]
    run = partial(items.index, options, work.base, work.at(folder))
    job = Job("index", run, (), index, inputs=evaluation.files(options.sets, work.base))
    work.line.stage("decontaminate-index", items.VERSION, measured, [job])
    made, jobs = [], []
    for unit, alive in zip(work.units, work.alive()):
        writes = [unit.work("decontaminate", ".parquet"), unit.work("decontaminate", ".npy")]
        run = partial(items.scan, work.at(unit.documents), work.at(alive), work.at(folder), *work.all_at(writes))
        jobs.append(Job(unit.name, run, [unit.documents, alive, *index], writes))
        made.append(writes)
    work.line.stage("decontaminate-scan", items.VERSION, measured, jobs)
    counted = [path for _, path in made]
    run = partial(items.total, work.all_at(counted), work.at(frequency))
    job = Job("all", run, (), [frequency], {"frequencies": counted})
    work.line.stage("decontaminate-total", items.VERSION, measured, [job])
    jobs = []
    for unit, (matches, _) in zip(work.units, made):
        to = unit.attributes("decontaminate")
        documents, found, known, common, attributes = work.all_at([unit.documents, matches, folder, frequency, to])
        run = partial(items.decide, documents, found, known, common, attributes, options)
        jobs.append(Job(unit.name, run, [unit.documents, matches, *index, frequency], [to]))
    work.line.stage("decontaminate", items.VERSION, measured, jobs)
    texts, decided = [u.documents for u in work.units], [u.attributes("decontaminate") for u in work.units]
    run = partial(
        items.report,
        work.all_at(texts),
        work.all_at(decided),
        work.at(folder),
        work.at(frequency),
        work.at(REPORT),
        options,
    )
    job = Job("report", run, [*index, frequency], [REPORT], {"documents": texts, "found": decided})
    work.line.stage("decontaminate-report", items.VERSION, options_of(options), [job])
