"""``stoker data``: make the demo corpus, and look at token stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stoker.errors import Refusal

if TYPE_CHECKING:
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
def stats(stores: Stores) -> None:
    """Count what stores hold."""
    import numpy as np

    from dataio.store import Store

    for store in map(Store.open, stores):
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
