"""``stoker data``: prepare corpora, and look at what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.machine import cores
from stoker.errors import Refusal

if TYPE_CHECKING:
    from dataio.estimate import Estimate
    from dataio.funnel import Funnel

data = typer.Typer(name="data", help="Prepare and look at token stores.", no_args_is_help=True)

Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", help="Token stores, such as data/demo/train/code.")]


@data.command()
def demo(out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, such as data/demo.")]) -> None:
    """Make the demo corpus from the text that is on this machine: tokenizer, training and held-out stores."""
    from dataio.demo import main

    raise typer.Exit(main([str(out)]))


@data.command()
def view(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Token stores, or the folder of a recipe's output.")
    ],
    documents: Annotated[int, typer.Option(min=1, help="How many documents, evenly over each store.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, at most.")] = 200,
    first: Annotated[int | None, typer.Option(min=0, help="Number of the first, instead.")] = None,
    token: Annotated[int | None, typer.Option(min=0, help="Position of a token: the document that holds it.")] = None,
    id: Annotated[str | None, typer.Option(help="Beginning of a document's id, in hexadecimal digits.")] = None,
    language: Annotated[str | None, typer.Option(help="Only documents of this language.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that is searched in a browser, instead.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; by default the store's.")] = None,
    workspace: Annotated[Path | None, typer.Option(help="Folder that knows more; by default the store's.")] = None,
) -> None:
    """Show documents as the model reads them, where they come from and why they were kept."""
    from rich.console import Console

    from dataio.view.page import write_page
    from dataio.view.terminal import draw
    from dataio.view.viewer import Viewer

    viewers = [Viewer.open(path, tokenizer, workspace) for path in _stores(paths)]
    if html is not None:
        typer.echo(write_page(html, viewers, language=language))
        return
    for viewer in viewers:
        last = viewer.store.num_documents
        if token is not None:
            numbers = [viewer.at(token)]
        elif id is not None:
            numbers = viewer.with_id(id)
        elif first is not None:
            if first >= last:
                raise Refusal(f"{viewer.store.path} has documents 0 to {last - 1}: --first {first} is beyond them")
            numbers = list(range(first, min(first + documents, last)))
        else:
            numbers = viewer.sample(documents, language)
        draw(viewer.show(numbers, tokens), Console())


def _stores(paths: Sequence[Path]) -> list[Path]:
    """Token stores: those given, and all of a preparation's output."""
    found = [[*sorted((path / "stores").iterdir())] if (path / "stores").is_dir() else [path] for path in paths]
    return [store for stores in found for store in stores]


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
    folder = recipe.folder(base)
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
    if found.tokens:
        table = Table("tokens of", "MB", "million tokens", "bytes a token")
        for row in funnel.token_rows(found):
            table.add_row(*row)
        Console().print(table)
    for name, number in found.edits.items():
        typer.echo(f"{name}: {number:,}")


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
def repack(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A token store.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the new one goes.")],
    profile: Annotated[Literal["hot", "cold"], typer.Option(help="hot: mapped into memory; cold: compressed.")],
) -> None:
    """Write a store in another profile: the same documents, the same dataset id."""
    from dataio.repack import repack
    from dataio.store import Store

    made = repack(Store.open(store), out, profile)
    typer.echo(f"{out}: {made.num_documents:,} documents, dataset {made.dataset_id[:12]}")


@data.command("export")
def export_store(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A token store.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="megatron: prefix of .bin and .idx; mds: a folder.")],
    to: Annotated[Literal["megatron", "mds"], typer.Option(help="What it is written as.")],
    compress: Annotated[bool, typer.Option(help="mds: shards in zstd.")] = False,
) -> None:
    """Write a store's tokens for Megatron's IndexedDataset or MosaicML's StreamingDataset."""
    from dataio.interchange.mds import export_mds
    from dataio.interchange.megatron import export_megatron
    from dataio.store import Store

    opened = Store.open(store)
    if to == "megatron":
        export_megatron(opened, out)
    else:
        export_mds(opened, out, compress)
    typer.echo(f"{out}: {opened.num_documents:,} documents, {opened.num_tokens:,} tokens")


@data.command("import")
def import_store(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="megatron: prefix of .bin and .idx; mds: a folder.")],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Where the store goes.")],
    of: Annotated[Literal["megatron", "mds"], typer.Option("--from", help="What PATH is.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json that the tokens were made with.")],
    source: Annotated[str | None, typer.Option(help="Name of the source; by default the store's.")] = None,
    ends: Annotated[
        Literal["present", "append", "split"],
        typer.Option(help="Documents end with end-of-text; lack it; or are what lies between them."),
    ] = "present",
) -> None:
    """Make a token store of another project's tokens."""
    from dataio.interchange.mds import import_mds
    from dataio.interchange.megatron import import_megatron
    from dataio.tokenizer import Tokenizer

    make = import_megatron if of == "megatron" else import_mds
    made = make(path, store, source or store.name, Tokenizer.load(tokenizer), ends)
    typer.echo(f"{store}: {made.num_documents:,} documents, {made.num_tokens:,} tokens")


@data.command()
def verify(stores: Stores) -> None:
    """Read every byte and name what is damaged."""
    from dataio.store import Store

    found = {path: Store.open(path).verify() for path in _stores(stores)}
    for path, damages in found.items():
        for damage in damages:
            typer.echo(damage)
        if not damages:
            typer.echo(f"{path}: sound")
    if damaged := [str(path) for path, damages in found.items() if damages]:
        raise Refusal(f"{', '.join(damaged)}: damaged as said above; prepare again or restore")
