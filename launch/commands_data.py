"""``stoker data``: prepare corpora, and look at what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.machine import cores
from stoker.errors import Refusal

if TYPE_CHECKING:
    from dataio.estimate import Estimate
    from dataio.funnel import Funnel
    from dataio.store import Store
    from dataio.tokenizer import Tokenizer

data = typer.Typer(name="data", help="Prepare and look at token stores.", no_args_is_help=True)

Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", help="Token stores, such as data/demo/train/code.")]


@data.command()
def demo(out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, such as data/demo.")]) -> None:
    """Make the demo corpus from the text that is on this machine: tokenizer, training and held-out stores."""
    from dataio.demo import main

    raise typer.Exit(main([str(out)]))


@data.command()
def view(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="A token store.")],
    first: Annotated[int, typer.Option(min=0, help="Number of the first document.")] = 0,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, at most.")] = 200,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default the store's.")] = None,
) -> None:
    """Show documents as the model reads them."""
    from dataio.store import Store

    store = Store.open(path)
    decode = _tokenizer(store, tokenizer).decode
    if first >= store.num_documents:
        raise Refusal(f"{path} has documents 0 to {store.num_documents - 1}: --first {first} is beyond them")
    for number in range(first, min(first + documents, store.num_documents)):
        start, stop = (int(offset) for offset in store.doc_offsets[number : number + 2])
        masked = ", masked: no target" if store.doc_masked[number] else ""
        typer.echo(f"== document {number}: {stop - start} tokens, {store.doc_bytes[number]} bytes{masked}")
        typer.echo(decode(store.read(start, min(stop, start + tokens))))
        if stop - start > tokens:
            typer.echo(f".. and {stop - start - tokens} tokens more")


@data.command()
def prepare(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml, see docs/data.md.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done and what is missing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default the recipe's, or the cores.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, or auto.")
    ] = None,
) -> None:
    """From raw corpora to token stores, as a recipe says. Killed and started again, it goes on where it was."""
    from dataio import estimate, funnel
    from dataio.prepare import prepare
    from dataio.recipe import load
    from dataio.stages import LocalPool

    recipe, base = load(path)
    found, workers = estimate.estimate(recipe, base), workers or recipe.resources.workers or cores()
    if dry_run:
        _show_estimate(found, workers)
        return
    estimate.require(found)
    folder = base / recipe.output
    if ray is None:
        with LocalPool(workers) as pool:
            prepare(recipe, base, pool)
    else:
        from dataio.ray_executor import RayCluster

        folder.mkdir(parents=True, exist_ok=True)
        with RayCluster(folder, None if ray == "auto" else ray) as cluster:
            prepare(recipe, base, cluster)
    _show_funnel(funnel.read(folder))
    typer.echo(f"{folder / 'report.html'}; token stores in {folder / 'stores'}")


@data.command()
def stats(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders of a recipe's output, token stores.")],
) -> None:
    """What was kept of a prepared corpus and why the rest was not; what token stores hold."""
    from dataio import funnel

    for path in paths:
        if (path / "manifests").is_dir():
            _show_funnel(funnel.read(path))
        else:
            _show_store(path)


def _show_store(path: Path) -> None:
    import numpy as np

    from dataio.store import Store

    store = Store.open(path)
    lengths = np.diff(store.doc_offsets)
    middle, longest = int(np.median(lengths)), int(lengths.max())
    typer.echo(
        f"{store.path}: source {store.source}, dataset {store.dataset_id[:12]}\n"
        f"  {store.num_documents:,} documents, {int(store.doc_masked.sum()):,} masked; tokens of one: "
        f"median {middle:,}, most {longest:,}\n"
        f"  {store.num_tokens:,} tokens, {store.num_bytes:,} bytes, {store.num_bytes / store.num_tokens:.2f} bytes "
        f"per token\n"
        f"  tokenizer {store.tokenizer.sha256[:12]}, vocabulary of {store.tokenizer.vocab_size:,}"
    )


def _show_funnel(found: Funnel) -> None:
    from rich.console import Console
    from rich.table import Table

    from dataio import funnel

    for source in found.sources if len(found.sources) == 1 else (*found.sources, None):
        table = Table("", "documents", "MB", "of the bytes", title=source or "all sources", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in funnel.rows(found, source):
            table.add_row(*row)
        for why, records in sorted(found.unread.get(source or "", {}).items()):
            table.add_row(f"not read: {why}", f"{records:,}", "", "", style="dim")
        Console().print(table)


def _show_estimate(found: Estimate, workers: int) -> None:
    from rich.console import Console
    from rich.table import Table

    sources = Table("source", "format", "files", "MB", "tasks of ingest")
    for source in found.sources:
        sources.add_row(
            source.name, source.format, f"{source.files:,}", f"{source.bytes / 1e6:,.1f}", f"{source.units:,}"
        )
    stages = Table("stage", "tasks", "done before", "core seconds, about")
    for stage in found.stages:
        stages.add_row(stage.name, f"{stage.tasks:,}", f"{stage.done:,}", f"{stage.core_seconds:,.0f}")
    console = Console()
    console.print(sources, stages)
    typer.echo(f"about {found.seconds(workers) / 60:.1f} minutes with {workers} processes, if nothing is done yet")
    for sentence in found.missing:
        typer.echo(f"missing: {sentence}")


@data.command()
def verify(stores: Stores) -> None:
    """Read every byte and name what is damaged."""
    from dataio.store import Store

    found = {path: Store.open(path).verify() for path in stores}
    for path, damages in found.items():
        for damage in damages:
            typer.echo(damage)
        if not damages:
            typer.echo(f"{path}: sound")
    if damaged := [str(path) for path, damages in found.items() if damages]:
        raise Refusal(f"{', '.join(damaged)}: damaged as said above; prepare again or restore")


def _tokenizer(store: Store, given: Path | None) -> Tokenizer:
    """The tokenizer that a store was made with: the one given, or of that name and hash beside it or above."""
    from dataio.tokenizer import Tokenizer
    from stoker.hashing import sha256_file

    folders = (store.path, *store.path.absolute().parents)
    for place in [given] if given else [folder / "tokenizer.json" for folder in folders]:
        if place.is_file() and sha256_file(place) == store.tokenizer.sha256:
            return Tokenizer.load(place)
    where = given or f"a folder above {store.path}"
    raise Refusal(f"the tokenizer of {store.path} ({store.tokenizer.sha256[:12]}) is not {where}: give --tokenizer")
