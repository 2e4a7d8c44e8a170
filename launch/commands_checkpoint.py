"""``stoker checkpoint``: look at checkpoints, compare them, and bring them to other formats and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stoker.errors import Refusal

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore

checkpoint = typer.Typer(name="checkpoint", help="Look at checkpoints and exchange them.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one step's folder in it.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint; by default the newest.")]


@checkpoint.command()
def ls(run: Run) -> None:
    """List a run's checkpoints."""
    store, _ = find(run)
    for step in store.steps():
        manifest = store.manifest(step)
        size = sum(manifest.data.values()) + sum(sealed.bytes for sealed in manifest.sealed.values())
        typer.echo(
            f"step {step:8,}  {size / 2**20:9.1f} MiB  {len(manifest.tensors):5,} tensors  written by attempt "
            f"{manifest.attempt} on {manifest.world_size} ranks"
        )


@checkpoint.command()
def verify(run: Run, step: Step = None) -> None:
    """Read every byte of a checkpoint and name what is damaged; all of the run's, unless one is named."""
    store, named = find(run, step)
    damaged = 0
    for number in store.steps() if named is None else [named]:
        found = store.verify(number)
        for damage in found:
            typer.echo(f"step {number}: {damage}")
        if not found:
            typer.echo(f"step {number}: whole")
        damaged += bool(found)
    if damaged:
        raise Refusal(f"{damaged} of the checkpoints of {run} are damaged, as said above: resume from another step")


@checkpoint.command()
def diff(a: Run, b: Run) -> None:
    """Compare two checkpoints tensor by tensor: the newest of two runs, or two steps' folders."""
    from launch.checkpoint_diff import compare

    for line in compare(*newest(a), *newest(b)):
        typer.echo(line)


@checkpoint.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, not there yet.")],
    to: Annotated[Literal["zarr", "hf"], typer.Option(help="zarr v3 group, or Hugging Face safetensors.")],
    step: Step = None,
) -> None:
    """Write a checkpoint in another format: all of it (zarr), or its weights for transformers (hf)."""
    from launch.exchange import export_hf, export_zarr

    store, number = newest(run, step)
    write = {"zarr": export_zarr, "hf": export_hf}[to]
    write(store, number, out)
    typer.echo(f"{out}: step {number} of {store.root.parent}")


@checkpoint.command("import")
def import_(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The run that goes on from it: .yaml or preset.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="config.json and safetensors files.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    source: Annotated[Literal["hf"], typer.Option("--from", help="What the folder holds.")] = "hf",
    drop: Annotated[list[str] | None, typer.Option(help="Leave out tensors whose name starts so, such as mtp.")] = None,
) -> None:
    """Begin a run from the weights of another project: they become its checkpoint of step 0."""
    from launch.exchange import import_hf

    typer.echo(import_hf(config, overrides or (), folder, tuple(drop or ())))


def find(run: Path, step: int | None = None) -> tuple[CheckpointStore, int | None]:
    """The checkpoints of a run directory, and the step that was named: by number, or by giving its folder."""
    from pretrain.checkpoint.folders import found
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.rundir import CHECKPOINTS

    if run.name.startswith("step_"):
        named = [number for number in found(run.parent) if int(run.name[5:].split(".")[0]) == number]
        return CheckpointStore(run.parent), named[0] if named else _refuse_absent(run)
    store = CheckpointStore(run / CHECKPOINTS)
    if not store.steps():
        _refuse_absent(run)
    return store, step


def newest(run: Path, step: int | None = None) -> tuple[CheckpointStore, int]:
    """As ``find``, with the newest step where none was named."""
    store, named = find(run, step)
    return store, max(store.steps()) if named is None else named


def _refuse_absent(run: Path) -> int:
    raise Refusal(f"{run} holds no committed checkpoint: give a run directory (runs/demo) or a step's folder in it")
