"""From documents that are kept to token stores: tokenizer, order, tokens, shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataio import assemble, code_order, encode, selection
from dataio import tokenizer as bpe
from dataio.pipeline import Job, Unit
from dataio.stages import Counts, content_hash, total
from dataio.steps.work import Work
from stoker.errors import Refusal

TOKENIZER = "tokenizer.json"


def tokenizer(work: Work) -> None:
    """tokenizer.json: one that is given, or trained on a sample of what is kept."""
    options = work.recipe.tokenizer
    if options.path is not None:
        path = work.base / options.path
        if not path.is_file():
            raise Refusal(f"{path}: there is no tokenizer here; correct tokenizer.path, or leave it out to train one")
        run = partial(_adopt, path, work.at(TOKENIZER), options.pattern)
        work.line.stage(
            "tokenizer",
            1,
            {"pattern": options.pattern},
            [Job("adopt", run, (), [TOKENIZER], {str(path): content_hash(path)})],
        )
        return
    kept = sum(n for key, n in total(work.line.stages["select"]).items() if key.startswith(f"bytes/{selection.KEPT}/"))
    share = min(1.0, options.sample_bytes / max(1, kept))
    samples, jobs = [unit.work("tokenizer", ".parquet") for unit in work.units], []
    for unit, sample in zip(work.units, samples):
        run = partial(encode.sample, _texts(work, unit), share, work.at(sample))
        jobs.append(Job(unit.name, run, _read(work, unit), [sample]))
    work.line.stage("tokenizer-sample", encode.VERSION, {"share": share, **_how(work)}, jobs)
    run = partial(encode.train, work.all_at(samples), options.vocab_size, work.at(TOKENIZER))
    job = Job("train", run, samples, [TOKENIZER])
    work.line.stage("tokenizer", encode.VERSION, {"vocab_size": options.vocab_size}, [job])


def _adopt(source: Path, path: Path, pattern: str | None) -> Counts:
    bpe.adopt(source, path, pattern)
    return {"documents": 0}


def _texts(work: Work, unit: Unit) -> encode.Texts:
    """The kept texts of a unit as they are trained on."""
    stages = work.recipe.stages
    return encode.Texts(
        documents=work.at(unit.documents),
        select=work.at(unit.attributes("select")),
        redact=work.at(unit.attributes("redact")) if stages.redact else None,
        substring=work.at(unit.attributes("substring")) if stages.substring else None,
        header=work.recipe.order.header,
    )


def _read(work: Work, unit: Unit) -> list[str]:
    """What `_texts` are a function of, and, with it, `_how`."""
    names = ["select", *(name for name in ("redact", "substring") if getattr(work.recipe.stages, name))]
    return [unit.documents, *(unit.attributes(name) for name in names)]


def _how(work: Work) -> dict[str, Any]:
    return {"header": work.recipe.order.header}


def order(work: Work) -> None:
    """work/order/<source>.npy: (unit, row) of the documents of a source in their final order."""
    seed = work.recipe.seed
    jobs = []
    for unit in work.units:
        chosen, to = unit.attributes("select"), unit.work("imports", ".parquet")
        run = partial(code_order.imports, work.at(unit.documents), work.at(chosen), seed, work.at(to))
        jobs.append(Job(unit.name, run, [unit.documents, chosen], [to]))
    found = work.line.stage("order-imports", code_order.VERSION, {"seed": seed}, jobs)
    kept = {manifest.task: manifest.counts["kept"] for manifest in found}
    ranges: dict[str, list[str]] = {}
    jobs = []
    for source, units in work.by_source():
        files = [unit.work("imports", ".parquet") for unit in units]
        parts = work.parts(sum(kept[unit.name] for unit in units), code_order.BYTES_PER_DOCUMENT)
        ranges[source] = [f"work/order/{source}/{part:05d}.npy" for part in range(parts)]
        read = {"imports": work.line.together(files)}
        for part, to in enumerate(ranges[source]):
            run = partial(code_order.arrange, work.all_at(files), part, parts, work.at(to))
            jobs.append(Job(f"{source}/{part:05d}", run, (), [to], read))
    work.line.stage("order-arrange", code_order.VERSION, {}, jobs)
    jobs = []
    for source, files in ranges.items():
        to = _order_of(source)
        run = partial(code_order.join, work.all_at(files), work.at(to))
        jobs.append(Job(source, run, (), [to], {"ranges": work.line.together(files)}))
    work.line.stage("order", code_order.VERSION, {}, jobs)


def _order_of(source: str) -> str:
    return f"work/order/{source}.npy"


def tokens(work: Work) -> None:
    """work/encode/: the tokens of every document file."""
    jobs = []
    for unit in work.units:
        folder = unit.work("encode")
        run = partial(encode.encode, _texts(work, unit), work.at(TOKENIZER), work.at(folder))
        jobs.append(Job(unit.name, run, [*_read(work, unit), TOKENIZER], [f"{folder}/{name}" for name in encode.FILES]))
    work.line.stage("encode", encode.VERSION, _how(work), jobs)


def stores(work: Work) -> None:
    """stores/<source>: the tokens of a source in their final order. A source of which nothing is left has none."""
    form = assemble.Form(bpe.Tokenizer.load(work.at(TOKENIZER)).id, work.recipe.store.profile)
    options = {"profile": form.profile, "chunk_tokens": form.chunk_tokens}
    left = {manifest.task: manifest.counts["tokens"] for manifest in work.line.stages["encode"]}
    by_source = {source: units for source, units in work.by_source() if sum(left[unit.name] for unit in units) >= 2}
    if not by_source:
        raise Refusal(f"{work.line.folder}: nothing is left of any source; `stoker data stats` shows what dropped it")

    def encoded(units: Sequence[Unit]) -> list[str]:
        return [unit.work("encode") for unit in units]

    jobs, reads = [], {}
    for source, units in by_source.items():
        plan, at = f"work/store/{source}/plan", _order_of(source)
        reads[source] = [at, *(f"{folder}/{name}" for folder in encoded(units) for name in encode.FILES)]
        run = partial(assemble.plan_shards, work.at(at), work.all_at(encoded(units)), work.at(plan))
        read = {"encoded": work.line.together(reads[source])}
        jobs.append(Job(source, run, (), assemble.plan_outputs(plan), read))
    work.line.stage("store-plan", assemble.VERSION, {}, jobs)
    jobs, shards = [], {}
    for source, units in by_source.items():
        planned, folder = work.at(f"work/store/{source}/plan"), f"work/store/{source}/shards"
        shards[source] = [
            assemble.shard_outputs(folder, number) for number in range(assemble.num_shards(planned, form))
        ]
        read = {"encoded": work.line.together(reads[source])}
        for number, writes in enumerate(shards[source]):
            run = partial(assemble.write_shard, planned, work.all_at(encoded(units)), form, number, work.at(folder))
            jobs.append(Job(f"{source}/{number:05d}", run, (), writes, read))
    work.line.stage("store-shard", assemble.VERSION, options, jobs)
    jobs = []
    for source, units in by_source.items():
        chosen = [unit.attributes("select") for unit in units]
        inputs = {
            "documents": work.line.together(unit.documents for unit in units),
            "select": work.line.together(chosen),
            "encoded": work.line.together(reads[source]),
        }
        run = partial(
            assemble.commit,
            work.at(f"work/store/{source}/plan"),
            work.at(f"work/store/{source}/shards"),
            work.all_at(encoded(units)),
            work.all_at(unit.documents for unit in units),
            work.all_at(chosen),
            form,
            source,
            work.at(f"stores/{source}"),
            recipe=work.recipe.sha256(),
            inputs=inputs,
            input_files=work.input_files[source],
        )
        read = {"shards": work.line.together(path for writes in shards[source] for path in writes), **inputs}
        read["recipe"] = work.recipe.sha256()
        jobs.append(Job(source, run, (), [f"stores/{source}/manifest.json"], read))
    work.line.stage("store", assemble.VERSION, options, jobs)
