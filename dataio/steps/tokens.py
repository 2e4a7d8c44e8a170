"""From documents that are kept to token stores: tokenizer, order, tokens, shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataio import assemble, code_order, encode, selection
from dataio import tokenizer as bpe
from dataio.pipeline import Job, Unit
from dataio.stages import Counts, content_hash, total
from dataio.steps.work import Work
from dataio.store import Store
from stoker import canonical
from stoker.errors import Refusal

TOKENIZER = "tokenizer.json"


def tokenizer(work: Work) -> None:
    """tokenizer.json: one that is given, or trained on a sample of what is kept."""
    options = work.recipe.tokenizer
    if options.path is not None:
        path = work.base / Path(options.path).expanduser()
        if not path.is_file():
            raise Refusal(f"{path}: there is no tokenizer here; correct tokenizer.path, or leave it out to train one")
        run = partial(_adopt, path, work.at(TOKENIZER), options.pattern)
        job = Job("all", run, (), [TOKENIZER], inputs={"given": content_hash(path)})
        work.line.stage("tokenizer", 1, {"pattern": options.pattern}, [job])
        return
    kept = sum(n for key, n in total(work.line.stages["select"]).items() if key.startswith(f"bytes/{selection.KEPT}/"))
    share = min(1.0, options.sample_bytes / max(1, kept))
    samples, jobs = [unit.work("tokenizer", ".parquet") for unit in work.units], []
    for unit, sample in zip(work.units, samples):
        run = partial(encode.sample, _texts(work, unit), share, work.at(sample))
        jobs.append(Job(unit.name, run, _read(work, unit), [sample]))
    work.line.stage("tokenizer-sample", encode.VERSION, {"share": share, **_how(work)}, jobs)
    run = partial(encode.train, work.all_at(samples), options.vocab_size, work.at(TOKENIZER))
    job = Job("all", run, samples, [TOKENIZER])
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
        paths = work.all_at(files)
        parts = work.parts(sum(kept[unit.name] for unit in units), code_order.BYTES_PER_DOCUMENT)
        ranges[source] = [f"work/order/{source}/{part:05d}.npy" for part in range(parts)]
        for part, to in enumerate(ranges[source]):
            run = partial(code_order.arrange, paths, part, parts, work.at(to))
            jobs.append(Job(f"{source}/{part:05d}", run, (), [to], {"imports": files}, {"parts": str(parts)}))
    work.line.stage("order-arrange", code_order.VERSION, {}, jobs)
    jobs = []
    for source, files in ranges.items():
        to = _order_of(source)
        run = partial(code_order.join, work.all_at(files), work.at(to))
        jobs.append(Job(source, run, (), [to], {"ranges": files}))
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


@dataclass(frozen=True)
class _Made:
    """What the store of a source is made of. Paths relative to the workspace."""

    source: str
    units: Sequence[Unit]

    @property
    def folders(self) -> list[str]:
        return [unit.work("encode") for unit in self.units]

    @property
    def reads(self) -> list[str]:
        return [_order_of(self.source), *(f"{folder}/{name}" for folder in self.folders for name in encode.FILES)]

    @property
    def plan(self) -> str:
        return f"work/store/{self.source}/plan"

    @property
    def shards(self) -> str:
        return f"work/store/{self.source}/shards"


def stores(work: Work) -> None:
    """stores/<source>: the tokens of a source in their final order. A source of which nothing is left has none."""
    left = {manifest.task: manifest.counts["tokens"] for manifest in work.line.stages["encode"]}
    made = [_Made(source, units) for source, units in work.by_source() if sum(left[u.name] for u in units) >= 2]
    work.keep_stores({of.source for of in made})
    if not made:
        raise Refusal(f"{work.line.folder}: nothing is left of any source; `stoker data stats` shows what dropped it")
    form = assemble.Form(bpe.Tokenizer.load(work.at(TOKENIZER)).id, work.recipe.store.profile)
    options = {"profile": form.profile, "chunk_tokens": form.chunk_tokens}
    folders = {of.source: work.all_at(of.folders) for of in made}
    reads = {of.source: of.reads for of in made}
    _plan(work, made, folders, reads)
    shards = _write_shards(work, made, folders, reads, form, options)
    jobs = []
    for of in made:
        chosen, texts = [unit.attributes("select") for unit in of.units], [unit.documents for unit in of.units]
        recipe, names = work.recipe.sha256(), work.input_files[of.source]
        run = partial(
            assemble.commit,
            work.at(of.plan),
            work.at(of.shards),
            folders[of.source],
            work.all_at(texts),
            work.all_at(chosen),
            form,
            of.source,
            work.at(f"stores/{of.source}"),
            recipe=recipe,
            inputs={"documents": work.line.together(texts), "select": work.line.together(chosen)},
            input_files=names,
        )
        read = {"shards": shards[of.source], "encoded": reads[of.source], "documents": texts, "select": chosen}
        said = {"recipe": recipe, "input_files": canonical.sha256(names)}
        jobs.append(Job(of.source, run, (), [f"stores/{of.source}/manifest.json"], read, said))
        _forget_damaged(work, of.source)
    work.line.stage("store", assemble.VERSION, options, jobs)


def _plan(work: Work, made: Sequence[_Made], folders: Mapping[str, list[Path]], reads: Mapping[str, list[str]]) -> None:
    jobs = []
    for of in made:
        run = partial(assemble.plan_shards, work.at(_order_of(of.source)), folders[of.source], work.at(of.plan))
        jobs.append(Job(of.source, run, (), assemble.plan_outputs(of.plan), {"encoded": reads[of.source]}))
    work.line.stage("store-plan", assemble.VERSION, {}, jobs)


def _write_shards(
    work: Work,
    made: Sequence[_Made],
    folders: Mapping[str, list[Path]],
    reads: Mapping[str, list[str]],
    form: assemble.Form,
    options: Mapping[str, Any],
) -> dict[str, list[str]]:
    """Files of every source."""
    jobs: list[Job] = []
    shards: dict[str, list[str]] = {}
    for of in made:
        plan, encoded = work.at(of.plan), folders[of.source]
        read = {"encoded": reads[of.source], "plan": assemble.plan_outputs(of.plan)}
        shards[of.source] = []
        for number in range(assemble.num_shards(plan, form)):
            writes = assemble.shard_outputs(of.shards, number)
            run = partial(assemble.write_shard, plan, encoded, form, number, work.at(of.shards))
            jobs.append(Job(f"{of.source}/{number:05d}", run, (), writes, read))
            shards[of.source] += writes
    work.line.stage("store-shard", assemble.VERSION, options, jobs)
    return shards


def _forget_damaged(work: Work, source: str) -> None:
    """A store that does not open any more is made again."""
    try:
        Store.open(work.at(f"stores/{source}"))
    except Refusal:
        work.at(f"manifests/store/{source}.json").unlink(missing_ok=True)
