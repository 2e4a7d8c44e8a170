"""Which compilers this machine has: a C++ compiler, and a CUDA toolkit from CUDA_HOME, PATH or installed wheels."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import Refusal

#: Where the wheels nvidia-cuda-nvcc, nvidia-cuda-cuobjdump and their like of CUDA 13 put programs and static libraries.
WHEEL = Path("nvidia", "cu13")


@dataclass(frozen=True)
class Architecture:
    """A target of nvcc: the oldest nvcc that knows it, and the compute capabilities of the devices that run it."""

    oldest_nvcc: tuple[int, int]
    capabilities: tuple[tuple[int, int], ...]


#: Source: CUDA C++ Programming Guide 13.0, section 5.1, and the release notes of CUDA 12.0 and of 12.9, the first with
#: family targets (the ``f``).
ARCHITECTURES = {
    "sm_90a": Architecture((12, 0), ((9, 0),)),
    "sm_100f": Architecture((12, 9), ((10, 0), (10, 3))),
}


class Unavailable(Exception):
    """A library cannot be had on this machine, for the reason in the message; slower code runs in its place."""


@dataclass(frozen=True)
class HostCompiler:
    """`command`: the program and the words of CXX behind it."""

    command: tuple[str, ...]
    version: str

    @property
    def link_words(self) -> tuple[str, ...]:
        return ()

    @property
    def versions(self) -> dict[str, str]:
        return {"c++": self.version}

    def environment(self, scratch: Path) -> dict[str, str]:
        return environment()


@dataclass(frozen=True)
class CudaToolkit:
    """One nvcc, and the ptxas that assembles what it writes; `own_ptxas` says whether it is the one nvcc would call.

    `profile`: the variables that nvcc takes from its ``nvcc.profile``, PATH among them.
    """

    nvcc: str
    version: str
    host: HostCompiler
    profile: dict[str, str]
    ptxas: str
    ptxas_version: str
    own_ptxas: bool

    @property
    def command(self) -> tuple[str, ...]:
        """nvcc looks for ptxas where its profile says, so another one needs the profile to be spelled out here."""
        nvcc = (self.nvcc, *_ccbin(self.host))
        if self.own_ptxas:
            return nvcc
        return (*nvcc, "--dont-use-profile", *self._words("INCLUDES"), *self._words("SYSTEM_INCLUDES"))

    @property
    def link_words(self) -> tuple[str, ...]:
        """nvcc's own, and the folder in which the wheels keep ``libcudart_static.a``, of which their nvcc knows not."""
        return (*self._words("LIBRARIES"), f"-L{Path(self.profile['TOP'], 'lib').resolve()}")

    @property
    def versions(self) -> dict[str, str]:
        return {**self.host.versions, "nvcc": self.version, "ptxas": self.ptxas_version}

    def environment(self, scratch: Path) -> dict[str, str]:
        """Variables under which nvcc finds `ptxas`; `scratch` is a folder for a link to it."""
        if self.own_ptxas:
            return environment()
        (scratch / "ptxas").symlink_to(Path(self.ptxas).absolute())
        return {**environment(), **self.profile, "PATH": os.pathsep.join([str(scratch), self.profile["PATH"]])}

    def _words(self, variable: str) -> list[str]:
        return shlex.split(self.profile.get(variable, ""))


def host_compiler() -> HostCompiler:
    """CXX if it is set, else g++, else clang++. Unavailable, saying what was looked for, if there is none."""
    wanted = os.environ.get("CXX", "").strip()
    for name, *words in ([wanted], shlex.split(wanted)) if wanted else (["g++"], ["clang++"]):
        program = shutil.which(name)
        if program and (version := _output([program, *words, "--version"])):
            return HostCompiler((program, *words), version.splitlines()[0])
    if wanted:
        raise Unavailable(f"no C++ compiler: CXX={wanted} is none that runs")
    raise Unavailable("no C++ compiler: CXX is not set, and neither g++ nor clang++ is on PATH")


def cuda_toolkit(arch: str) -> CudaToolkit:
    """The first nvcc that is complete and knows `arch`, with the newest ptxas. Unavailable if there is none.

    Refusal if STOKER_PTXAS, which has the say over the ptxas, names no program that runs.
    """
    host = host_compiler()
    oldest = ARCHITECTURES[arch].oldest_nvcc
    unfit = []
    for nvcc in _nvccs():
        profile, version = _profile(nvcc, host)
        if not Path(profile.get("CICC_PATH", "/nowhere"), "cicc").exists():
            unfit.append(f"{nvcc} is not complete")
        elif numbers(version) < oldest:
            unfit.append(f"{nvcc} {version} does not know {arch}: {oldest[0]}.{oldest[1]} does")
        else:
            return _toolkit(nvcc, version, host, profile)
    raise Unavailable("; ".join(["no nvcc in CUDA_HOME, on PATH or in the package nvidia-cuda-nvcc", *unfit]))


def cuobjdump(*arguments: str) -> str | None:
    """What ``cuobjdump`` prints; None if it, or nvdisasm, which it calls, is not here."""
    path = os.pathsep.join(map(str, _folders()))
    program, disassembler = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
    if program is None or disassembler is None:
        return None
    variables = environment() | {"PATH": path}
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True, env=variables).stdout


def _nvccs() -> list[str]:
    found = (shutil.which("nvcc", path=str(folder)) for folder in _folders())
    return list(dict.fromkeys(program for program in found if program))


def _folders() -> list[Path]:
    """Where programs of CUDA are looked for, in this order."""
    home = os.environ.get("CUDA_HOME")
    chosen = [Path(home, "bin")] if home else []
    path = [Path(entry) for entry in os.get_exec_path() if entry]
    return [*chosen, *path, *wheel_folders(), Path("/usr/local/cuda/bin")]


def wheel_folders() -> list[Path]:
    """The folders of programs that CUDA wheels have installed, in the order of the import path."""
    return [folder for entry in sys.path if (folder := Path(entry, WHEEL, "bin")).is_dir()]


def _profile(nvcc: str, host: HostCompiler) -> tuple[dict[str, str], str]:
    """What nvcc would set and its version, in one call: ``/usr/local/bin/nvcc`` may be a script that hides its home."""
    said = _output([nvcc, *_ccbin(host), "--dryrun", "-x", "cu", "-c", os.devnull], errors_too=True)
    profile = dict(re.findall(r"^#\$ (\w+)=(.*?) *$", said, re.MULTILINE))
    macros = dict(re.findall(r"-D__CUDACC_VER_(MAJOR|MINOR|BUILD)__=(\d+)", said))
    return profile, ".".join(macros.get(part, "0") for part in ("MAJOR", "MINOR", "BUILD"))


def _ccbin(host: HostCompiler) -> list[str]:
    """nvcc takes a program, and no words behind it: such a compiler is used for host code only."""
    return ["-ccbin", host.command[0]] if len(host.command) == 1 else []


def _toolkit(nvcc: str, version: str, host: HostCompiler, profile: dict[str, str]) -> CudaToolkit:
    own = shutil.which("ptxas", path=profile["PATH"])
    versions = _ptxas_versions(own)
    if not versions:
        raise Unavailable(f"{nvcc} has no ptxas")
    ptxas = max(versions, key=lambda program: numbers(versions[program]))
    return CudaToolkit(nvcc, version, host, profile, ptxas, versions[ptxas], ptxas == own)


def _ptxas_versions(own: str | None) -> dict[str, str]:
    """Program -> version: of STOKER_PTXAS alone if it is set, else of nvcc's own and the wheels'."""
    wanted = os.environ.get("STOKER_PTXAS")
    wheels = [shutil.which("ptxas", path=str(folder)) for folder in wheel_folders()]
    programs = [wanted] if wanted else [program for program in dict.fromkeys([own, *wheels]) if program]
    said = {program: _output([program, "--version"]) for program in programs}
    versions = {program: found[1] for program, text in said.items() if (found := re.search(r"V([\d.]+)", text))}
    if wanted and not versions:
        raise Refusal(f"STOKER_PTXAS={wanted} is no ptxas that runs: correct it or unset it")
    return versions


def numbers(version: str) -> tuple[int, ...]:
    """
    >>> numbers("13.1.115") > numbers("13.0.88")
    True
    """
    return tuple(int(part) for part in version.split("."))


def environment() -> dict[str, str]:
    """This process's, without the variables with which nvcc would change its own command line, and in English."""
    hidden = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"LC_ALL": "C"}


def _output(command: Sequence[str], errors_too: bool = False) -> str:
    """What a short command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr * errors_too) if done.returncode == 0 else ""
