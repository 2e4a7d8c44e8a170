"""The CUDA side of the toolchain: nvcc and ptxas found and noted, what ptxas and the machine code say is read right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.toolchain import __main__ as command
from kernels.toolchain import build as builder
from kernels.toolchain import ptxas, report, sass, sources, tools
from kernels.toolchain.cache import Entry
from kernels.toolchain.libraries import obtain
from kernels.toolchain.library import Library, NativeError
from kernels.toolchain.report import BuildReport, Kernel
from launch import doctor
from stoker.errors import Refusal
from tests.kernels.test_toolchain import SAMPLES, ScaleParams

# What ptxas 13.0.88 printed for three kernels of which one spills, one waits too early and one is well.
PTXAS_OUTPUT = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized in '_Z3serPfmmi'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6spillsPfi' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsPfi
    408 bytes stack frame, 748 bytes spill stores, 820 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 408 bytes cumulative stack size
ptxas info    : Compile time = 66.884 ms
ptxas info    : Compiling entry function '_Z5scaleILi256EEv1P' for 'sm_90a'
ptxas info    : Function properties for _Z5scaleILi256EEv1P
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 256 bytes cumulative stack size, 1024 bytes smem, 16 bytes cmem[0]
ptxas info    : Compile time = 47.730 ms
ptxas info    : Function properties for _Z6helperfPKf
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""


def test_registers_shared_memory_and_spills_are_read_from_what_ptxas_prints() -> None:
    assert ptxas.functions(PTXAS_OUTPUT) == [
        ptxas.Function("_Z6spillsPfi", registers=32, shared_bytes=0, stack_bytes=408, spill_bytes=1568),
        ptxas.Function("_Z5scaleILi256EEv1P", registers=30, shared_bytes=1024, stack_bytes=256, spill_bytes=0),
        ptxas.Function("_Z6helperfPKf", registers=None, shared_bytes=0, stack_bytes=0, spill_bytes=12),
    ]
    assert ptxas.functions("nvcc warning : nothing of ptxas") == []


def function(name: str, *lines: str) -> str:
    """As cuobjdump prints it: an instruction every 16 bytes, its encoding behind it."""
    code = "\n".join(f"        /*{16 * i:04x}*/  {line:40} /* 0x{i:016x} */" for i, line in enumerate(lines))
    return f'\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"\n{code}\n'


WAIT = ["SYNCS.TRYWAIT P0 ;", "@!P0 BRA 0x50 ;"]
CALL_0x30 = "CALL.REL.NOINC 0x30 ;"
RETURN = "RET.REL.NODEC R4 0x0 ;"


@pytest.mark.parametrize(
    ("lines", "in_loop"),
    [
        # before the loop and behind it; the last branch, to itself, ends every function
        (["STL [R1], R2 ;", "IADD R3, R3, 0x1 ;", "@P0 BRA 0x10 ;", "LDL R2, [R1] ;", "EXIT ;", "BRA 0x50;"], False),
        (["NOP;", "LDL.64 R2, [R1] ;", "@!P0 BRA 0x10 ;", "EXIT ;"], True),
        # a barrier's waiting loop, put behind the end: its jump back spans the load, but nothing comes twice to it
        ([*WAIT, "NOP ;", "LDL R2, [R1] ;", "EXIT ;", *WAIT, "BRA 0x20 ;"], False),
        # behind the end, and inside the loop all the same
        (["NOP ;", "@!P0 BRA 0x40 ;", "@P1 BRA 0x0 ;", "EXIT ;", "STL.128 [R1], R4 ;", "BRA 0x20 ;"], True),
        # two ways to say that a branch has a condition
        (["NOP ;", "BRA !P2, 0x30 ;", "LDL R2, [R1] ;", "@P0 BRA 0x0 ;", "EXIT ;"], True),
        (["BRA.U UP0, 0x20 ;", "EXIT ;", "LDL R2, [R1] ;", "BRA.U !UP0, 0x0 ;", "EXIT ;"], True),
        # a subroutine, called inside a loop, called twice outside of one, and called by one called in a loop
        ([CALL_0x30, "@P0 BRA 0x0 ;", "EXIT ;", "STL [R1], R2 ;", RETURN], True),
        ([CALL_0x30, CALL_0x30, "EXIT ;", "STL [R1], R2 ;", RETURN], False),
        ([CALL_0x30, "@P0 BRA 0x0 ;", "EXIT ;", "CALL.REL.NOINC 0x50 ;", RETURN, "LDL R2, [R1] ;", RETURN], True),
        # nobody knows where an indirect branch goes
        (["LDL R2, [R1] ;", "BRX R2 -0x120 ;", "EXIT ;"], True),
        (["NOP ;", "BRX R2 -0x120 ;", "EXIT ;"], False),
    ],
)
def test_local_memory_counts_where_the_control_flow_comes_back_to_it(lines: list[str], in_loop: bool) -> None:
    other = function("_Z5otherv", "LDL R2, [R1] ;", "EXIT ;", "BRA 0x20;")
    found = sass.local_memory_in_loops("Fatbin elf code:\n" + function("_Z3onev", *lines) + other)
    assert found == {"_Z3onev": in_loop, "_Z5otherv": False}


def entry(kernels: list[dict[str, object]], **changes: object) -> Entry:
    versions = {"c++": "g++ 12", "nvcc": "13.0.88", "ptxas": "13.0.88"}
    record = {"target": "sm_90a", "seconds": 3.0, "tools": versions, "warnings": [], "objects": [], "kernels": kernels}
    return Entry(Path("libstoker_sm_90a.so"), record | changes)


def kernel(symbol: str = "_Z1kv", spills: int = 0) -> dict[str, object]:
    bytes_ = {"shared_bytes": 0, "stack_bytes": spills, "spill_bytes": spills}
    return {"symbol": symbol, "name": "k", "source": "k.cu", "registers": 8, **bytes_}


@pytest.mark.parametrize(
    ("version", "arch", "wrong"),
    [
        ("13.0.88", "sm_90a", True),
        ("12.8.93", "sm_90a", True),
        ("13.1.115", "sm_90a", False),
        ("13.0.88", "sm_100f", False),
    ],
)
def test_a_ptxas_known_to_write_wrong_code_is_warned_of(version: str, arch: str, wrong: bool) -> None:
    warnings = BuildReport.of(entry([], target=arch, tools={"ptxas": version})).warnings
    expected = f"ptxas {version}: known wrong code on {arch}, 13.1 or newer advised (or STOKER_PTXAS)"
    assert warnings == ((expected,) if wrong else ())


def test_a_spill_fails_unless_the_machine_code_shows_it_outside_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    built = entry([kernel(spills=8), kernel("_Z6calleev", spills=8)])
    outside = function("_Z1kv", "STL [R1], R2 ;", "EXIT ;")
    inside = function("_Z1kv", "STL [R1], R2 ;", "@P0 BRA 0x0 ;", "EXIT ;")
    for code, num_failures in ((None, 2), (outside, 0), (inside, 1)):
        monkeypatch.setattr(report, "cuobjdump", lambda *arguments, code=code: code)
        assert len(BuildReport.of(built, look=True).failures) == num_failures, code
    lost = "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored"
    assert BuildReport.of(entry([kernel()], warnings=[lost, "x.cu(3): warning #177-D"])).failures == [lost]


def test_the_command_prints_every_kernel_and_fails_where_it_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = BuildReport.of(entry([kernel()]))
    bad = replace(good, kernels=(Kernel(**kernel(spills=4)),))  # type: ignore[arg-type]
    absent = BuildReport("sm_100f", None, reason="no nvcc")
    asked: list[object] = []
    for reports, arguments, code in (
        ([good, absent], [], 0),
        ([good, absent], ["--check"], 0),
        ([good, absent], ["--arch", "sm_100f"], 2),
        ([bad], [], 0),
        ([bad], ["--check"], 1),
    ):
        monkeypatch.setattr(command, "build_all", lambda archs, isas, reports=reports: asked.append(isas) or reports)
        assert command.main(arguments) == code
        assert asked.pop() == (sources.known_isas() if "--check" in arguments else [sources.best_isa()])
    assert command.main(["--check", "--isa", "baseline"]) == 1 and asked.pop() == ["baseline"]
    said = capsys.readouterr().out
    assert "sm_100f: not built: no nvcc" in said and "c++ g++ 12, nvcc 13.0.88, ptxas 13.0.88" in said
    assert "FAILED: k: spills 4 bytes, and without cuobjdump and nvdisasm nobody knows where" in said


@pytest.fixture(scope="module")
def toolkit() -> tools.CudaToolkit:
    try:
        return tools.cuda_toolkit("sm_100f")
    except tools.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """nvcc takes seconds: the tests of this file share what is built."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STOKER_CACHE", str(tmp_path_factory.mktemp("a cache")))
    yield
    patch.undo()


def test_a_source_is_compiled_for_the_architectures_that_its_first_line_names(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    for name, text in (("all", ""), ("one", "// arch: sm_90a\n"), ("two", "// arch: sm_90a sm_100f\n")):
        (tmp_path / "cuda" / f"{name}.cu").write_text(text)

    def compiled(target: str) -> list[str]:
        return [Path(unit.source).stem for unit in builder.recipe(target, tmp_path).units]

    assert [compiled(target) for target in ("sm_90a", "sm_100f", "simt")] == [
        ["all", "one", "two"],
        ["all", "two"],
        ["all", "one", "two"],
    ]
    (tmp_path / "cuda" / "one.cu").write_text("// arch: sm_9a\n")
    for target in ("sm_100f", "simt"):
        with pytest.raises(Refusal, match=r"one\.cu, line 1: architecture 'sm_9a' is unknown: choose from sm_90a"):
            builder.recipe(target, tmp_path)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100f"])
def test_a_cuda_library_loads_without_a_driver_and_a_launch_says_what_is_missing(
    arch: str, toolkit: tools.CudaToolkit
) -> None:
    built = obtain(arch, SAMPLES)
    library = Library(built.library, arch)
    assert library.function("sample_local", ScaleParams)
    if not shutil.which("nvidia-smi"):
        with pytest.raises(NativeError, match=r"sample_scale: error 35 \(CUDA driver version is insufficient"):
            library.function("sample_scale", ScaleParams)(ScaleParams(None, None, 0, 1.0))
    found = BuildReport.of(built, look=True)
    assert found.tools == toolkit.versions and found.tools["nvcc"].count(".") == 2
    rows = {row.name: row for row in found.kernels}
    assert set(rows) == {"scale_kernel<128>", "local_in_loop_kernel"}
    assert (rows["scale_kernel<128>"].shared_bytes, rows["local_in_loop_kernel"].stack_bytes) == (512, 256)
    if tools.cuobjdump("--version") is None:
        pytest.skip("everything but the machine code: no cuobjdump and nvdisasm (pip install 'stoker[native]')")
    assert [row.local_in_loop for row in found.kernels] == ["local" in row.name for row in found.kernels]
    assert found.failures == ["local_in_loop_kernel: reads or writes local memory inside a loop"]


@pytest.fixture
def noting_ptxas(toolkit: tools.CudaToolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """STOKER_PTXAS is a script that notes its calls, in a folder with a space; gives what was noted."""
    notes, script = tmp_path / "notes", tmp_path / "my tools" / "another-ptxas"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\nexec "{toolkit.ptxas}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("STOKER_PTXAS", str(script))
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--no-such-flag")
    return lambda: notes.read_text() if notes.exists() else ""


def test_the_chosen_ptxas_assembles(noting_ptxas: Callable[[], str]) -> None:
    library = Library(obtain("sm_90a", SAMPLES).library, "sm_90a")
    assert "-arch=sm_90a" in noting_ptxas()
    assert library.function("sample_scale", ScaleParams)


def test_a_newer_ptxas_in_a_wheel_is_taken_and_an_older_one_is_not(
    toolkit: tools.CudaToolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "nvidia" / "cu13" / "bin" / "ptxas"
    wheel.parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for version, taken in (("13.99.1", True), ("12.8.93", False)):
        wheel.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
        wheel.chmod(0o755)
        found = tools.cuda_toolkit("sm_90a")
        assert (found.ptxas == str(wheel), found.ptxas_version == version) == (taken, taken)
        assert ("--dont-use-profile" in found.command) == (taken or not toolkit.own_ptxas)


def test_a_ptxas_that_does_not_run_is_refused(toolkit: tools.CudaToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_PTXAS", "/nowhere/ptxas")
    with pytest.raises(Refusal, match="STOKER_PTXAS=/nowhere/ptxas is no ptxas that runs: correct it or unset it"):
        obtain("sm_90a", SAMPLES)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_an_nvcc_that_is_too_old_or_incomplete_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cicc").touch()
    macros = "-D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=8 -D__CUDACC_VER_BUILD__=93"
    for name, cicc in (("old", tmp_path), ("part", tmp_path / "nothing")):
        script = tmp_path / name / "bin" / "nvcc"
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\necho '#$ CICC_PATH={cicc}'\necho '#$ gcc {macros}'\n")
        script.chmod(0o755)
    monkeypatch.setattr(tools, "_folders", lambda: [tmp_path / "old" / "bin", tmp_path / "part" / "bin"])
    unfit = r"old/bin/nvcc 12\.8\.93 does not know sm_100f: 12\.9 does; .*part/bin/nvcc is not complete"
    with pytest.raises(tools.Unavailable, match=unfit):
        tools.cuda_toolkit("sm_100f")


def test_the_doctor_tells_the_tools_and_what_their_absence_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> dict[str, doctor.Finding]:
        return {finding.name: finding for finding in doctor._compilers()}

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "wheel_folders", lambda: [])
    assert (rows()["C++ compiler"].status, rows()["nvcc"].status) == ("absent", "absent")
    assert rows()["kernel cache"].status == "ok"
    (tmp_path / "file").touch()
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "file"))
    assert rows()["kernel cache"] == doctor.Finding(
        "kernel cache",
        "absent",
        f"{tmp_path / 'file'} cannot be written",
        "kernels that are not in it yet cannot be kept, and a run that needs them is refused",
        "set STOKER_CACHE to a folder that can be written",
    )
