"""``stoker checkpoint``: look at checkpoints, compare them, and bring them to other formats and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from stoker.errors import Refusal

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore

checkpoint = typer.Typer(name="checkpoint", help="Look at checkpoints and exchange them.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one step's folder in it.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint; by default the newest.")]


@checkpoint.command()
def ls(run: Run) -> None:
    """List a run's checkpoints, damaged ones too."""
    store, named = find(run)
    for step in steps_of(store, named):
        try:
            manifest = store.manifest(step)
        except Refusal as refusal:
            typer.echo(f"step {step:8,}  {refusal}")
            continue
        size = sum(manifest.data.values()) + sum(sealed.bytes for sealed in manifest.sealed.values())
        typer.echo(
            f"step {step:8,}  {size / 2**20:9.1f} MiB  {len(manifest.tensors):5,} tensors  written by attempt "
            f"{manifest.attempt} on {manifest.world_size} ranks"
        )
    if named is None:
        for folder in set_aside(store):
            typer.echo(f"{folder}  set aside as damaged")


@checkpoint.command()
def verify(run: Run, step: Step = None) -> None:
    """Read every byte of a checkpoint and name what is damaged; all of the run's, unless one is named. Exit code 1 if
    any is, those included that a resume has set aside."""
    store, named = find(run, step)
    damaged = 0
    for number in steps_of(store, named):
        found = store.verify(number)
        for damage in found:
            typer.echo(f"step {number}: {damage}")
        if not found:
            typer.echo(f"step {number}: whole")
        damaged += bool(found)
    for folder in set_aside(store) if named is None else ():
        typer.echo(f"{folder}: set aside as damaged")
        damaged += 1
    if damaged:
        typer.echo(f"damaged: {damaged} of the checkpoints of {run}, as said above: resume from another", err=True)
        raise typer.Exit(1)


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
    """The checkpoints of a run directory, whole or not, and the step that was named: by number, or by giving its
    folder. Raises Refusal where there is none; a folder that was set aside is no step of the run."""
    from pretrain.checkpoint import folders
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.rundir import CHECKPOINTS

    if not run.name.startswith("step_"):
        root = run / CHECKPOINTS
        if not folders.found(root) and not folders.damaged(root):
            _refuse_absent(run)
        return CheckpointStore(root), step
    if step is not None:
        raise Refusal(f"--step={step}, and {run} is the folder of a step: give the run directory, or leave out --step")
    named = [number for number in folders.found(run.parent) if folders.path(run.parent, number).name == run.name]
    return CheckpointStore(run.parent), named[0] if named else _refuse_absent(run)


def newest(run: Path, step: int | None = None) -> tuple[CheckpointStore, int]:
    """As ``find``, with the newest committed step where none was named."""
    store, named = find(run, step)
    if named is None:
        named = store.latest()
    return store, _refuse_absent(run) if named is None else named


def steps_of(store: CheckpointStore, named: int | None) -> list[int]:
    """The step that was named, or every step that has a folder: one that lost its COMMIT too."""
    from pretrain.checkpoint.folders import found

    return found(store.root) if named is None else [named]


def set_aside(store: CheckpointStore) -> list[str]:
    """Names of the folders that a resume found damaged and renamed."""
    from pretrain.checkpoint.folders import damaged

    return [name for name in damaged(store.root) if ".quarantined" in name]


def _refuse_absent(run: Path) -> NoReturn:
    raise Refusal(f"{run} holds no committed checkpoint: give a run directory (runs/demo) or a step's folder in it")
