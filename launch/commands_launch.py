"""``stoker launch``: the same run on the nodes of a Slurm or Kubernetes cluster."""

from __future__ import annotations

from typing import Annotated

import typer

launch = typer.Typer(
    name="launch",
    help="Start a run on a cluster: the layout is checked against its hardware, then the scheduler takes over.",
    no_args_is_help=True,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A .yaml file, or the name of a preset.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="What differs from it.")]
Hardware = Annotated[
    str, typer.Option("--hardware", metavar="NAME", help="A preset such as gb200-nvl72 or cpu, or a .yaml file.")
]
Nodes = Annotated[int, typer.Option("--nodes", metavar="N", help="Nodes that train; launch.spare_nodes come on top.")]
RanksPerNode = Annotated[
    int | None,
    typer.Option("--ranks-per-node", metavar="N", help="Where nodes have no accelerators; else one for each device."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print exactly what would be submitted, and submit nothing.")]


@launch.command()
def slurm(
    config: Config,
    hardware: Hardware,
    nodes: Nodes,
    overrides: Overrides = None,
    ranks_per_node: RanksPerNode = None,
    dry_run: DryRun = False,
) -> None:
    """Submit one job to Slurm. Before its time limit it saves and is queued again, until the run is done."""
    from launch.launching import slurm as scheduler
    from launch.launching.folder import Folder
    from launch.launching.job import prepare
    from launch.launching.layout import Request

    prepared = prepare(Request(config, tuple(overrides or ()), hardware, nodes, ranks_per_node), _note)
    for note in prepared.notes:
        _note(note)
    folder = Folder.next(prepared.config.run_dir)
    if dry_run:
        typer.echo(scheduler.submission(prepared, folder).show())
        return
    number = scheduler.submit(prepared, folder)
    typer.echo(
        f"job {number}: {nodes} nodes, {prepared.plan.world_size} ranks\n"
        f"output of the nodes: {folder.path}/slurm-{number}.log\n"
        f"stoker status {prepared.config.run_dir}; squeue --job {number}; scancel {number} saves and ends it"
    )


@launch.command()
def kubernetes(
    config: Config,
    hardware: Hardware,
    nodes: Nodes,
    overrides: Overrides = None,
    ranks_per_node: RanksPerNode = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIABLE=SECRET/KEY",
            help="A variable of the nodes from a Secret, such as WANDB_API_KEY=wandb/key; may be given several times.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Apply a JobSet to Kubernetes: a pod a node, NVLink domains kept together."""
    from launch.launching import kubernetes as scheduler
    from launch.launching.job import prepare
    from launch.launching.layout import Request

    prepared = prepare(Request(config, tuple(overrides or ()), hardware, nodes, ranks_per_node), _note)
    for note in prepared.notes:
        _note(note)
    ready = scheduler.submission(prepared, secret or ())
    if dry_run:
        typer.echo(ready.show(), nl=False)
        return
    scheduler.submit(ready)
    typer.echo(
        f"JobSet {ready.name} in namespace {ready.namespace}: {nodes} nodes, {prepared.plan.world_size} ranks\n"
        f"kubectl -n {ready.namespace} get pods -l jobset.sigs.k8s.io/jobset-name={ready.name}\n"
        f"kubectl -n {ready.namespace} delete jobset {ready.name} saves and ends it"
    )


def _note(text: str) -> None:
    typer.echo(text, err=True)
