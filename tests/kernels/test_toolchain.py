"""The compiled libraries: built once for each content, whole or not there, refused when they are not right."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kernels import toolchain
from kernels.toolchain import libraries, sources
from kernels.toolchain.libraries import obtain
from kernels.toolchain.library import Library, NativeError
from kernels.toolchain.tools import Unavailable
from stoker.errors import Refusal
from tests.house.sources import HOME

SAMPLES = Path(__file__).parent / "native_samples"
GPP = shutil.which("g++")

needs_compiler = pytest.mark.skipif(GPP is None, reason="no g++ on PATH")


class ScaleParams(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64), ("factor", ctypes.c_float))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CXX", "STOKER_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A package of one source and one header, which compile in a tenth of a second."""
    (tmp_path / "home" / "op" / "host").mkdir(parents=True)
    (tmp_path / "home" / "op" / "host" / "one.cpp").write_text(
        '#include "op/version.h"\n'
        'extern "C" __attribute__((visibility("default"))) int stoker_abi_version() { return V; }\n'
    )
    (tmp_path / "home" / "op" / "version.h").write_text("#define V 1\n")
    return tmp_path / "home"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes CXX a script that notes every compilation in a file, does what is asked, and is g++ otherwise."""

    def make(before_compiling: str = "") -> Path:
        notes, script = tmp_path / "compiled", tmp_path / "bin" / "c++"
        script.parent.mkdir(exist_ok=True)
        compiling = f'case " $* " in *" -c "*) echo $$ >> "{notes}"; {before_compiling or ":"};; esac'
        script.write_text(f'#!/bin/sh\n{compiling}\nexec "{GPP}" "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return notes

    return make


def num_compiled(notes: Path) -> int:
    return len(notes.read_text().splitlines()) if notes.exists() else 0


BUILD = """
import sys
from pathlib import Path
from kernels.toolchain.libraries import obtain
entry = obtain("host", Path(sys.argv[1]))
assert "torch" not in sys.modules
print(entry.made, entry.library)
"""


@contextmanager
def building(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that builds; it and its compilers are ended at the end."""
    command = [sys.executable, "-c", BUILD, str(home)]
    process = subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()


@needs_compiler
def test_functions_take_their_structs_and_raise_their_codes() -> None:
    library = Library(obtain("host", SAMPLES).library, "host")
    assert library.has("sample_scale") and not library.has("sample_absent")
    scale = library.function("sample_scale", ScaleParams)
    x = np.arange(65, dtype=np.float32)
    y = np.full(65, np.nan, np.float32)
    scale(ScaleParams(x.ctypes.data, y.ctypes.data, 65, 2.5))
    assert (y == x * np.float32(2.5)).all()
    with pytest.raises(NativeError, match=r"sample_scale: error 7 \(negative length\) in libstoker_host_\w+.so"):
        scale(ScaleParams(None, None, -1, 0))
    with pytest.raises(NativeError, match="sample_scale: error 8 in") as caught:
        scale(ScaleParams(None, None, -2, 0))
    assert caught.value.code == 8
    assert library.query("sample_repeated", ScaleParams, ctypes.c_int)(ScaleParams(n=2**40), 3) == 3 * 2**40


@needs_compiler
@pytest.mark.parametrize("isa", sources.known_isas())
def test_each_instruction_set_has_a_library_of_its_own(isa: str) -> None:
    if sources.known_isas().index(isa) > sources.known_isas().index(toolchain.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    entry = obtain(f"host_{isa}", SAMPLES)
    library = Library(entry.library, entry.record["target"])
    assert (library.isa, library.path.name) == (isa, f"libstoker_host_{isa}.so")
    flags = library.query(f"sample_flags_{isa}", ScaleParams)
    assert flags(ScaleParams()) == {"baseline": 0, "avx2": 2, "avx512": 512}[isa]
    assert [name for name in sources.ISA_FLAGS if library.has(f"sample_flags_{name}")] == [isa]
    assert (obtain("host", SAMPLES).library == entry.library) == (isa == toolchain.best_isa())


@needs_compiler
def test_without_a_compiler_a_library_for_an_older_set_will_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a machine with an older processor left it in a cache that both share."""
    monkeypatch.setattr(libraries, "best_isa", lambda: sources.known_isas()[-1])
    older = obtain("host_baseline", home)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setenv("PATH", "/nowhere")
        assert obtain("host", home).library == older.library
    assert f"{older.library} was built by" in caplog.text
    best = obtain("host", home)
    monkeypatch.setenv("PATH", "/nowhere")
    assert obtain("host", home).library == best.library


@pytest.mark.parametrize(
    ("features", "isa"),
    [
        ("fpu sse2 avx avx2 fma f16c", "avx2"),
        ("fpu sse2 avx avx2 f16c", "baseline"),
        ("sse2 avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_fp16", "avx512"),
        ("sse2 avx2 fma f16c avx512f avx512cd", "avx2"),
    ],
)
def test_a_set_is_taken_when_the_processor_has_all_of_it(
    features: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CPUINFO", tmp_path / "cpuinfo")
    found = sources.best_isa.__wrapped__
    sources.CPUINFO.write_text(f"processor\t: 0\nflags\t\t: {features}\n\nprocessor\t: 1\nflags\t\t: {features}\n")
    assert found() == isa
    sources.CPUINFO.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert found() == "baseline"
    sources.CPUINFO.unlink()
    assert found() == "baseline", "of systems without /proc"


@needs_compiler
def test_cuda_sources_are_compiled_for_emulation_too(home: Path) -> None:
    (home / "op" / "cuda").mkdir()
    (home / "op" / "cuda" / "one.cu").write_text(
        '#pragma unroll\n#if defined(STOKER_SIMT)\n#include "../host/one.cpp"\n#else\n__global__ void k() {}\n#endif\n'
    )
    emulated = obtain("simt", home)
    assert Library(emulated.library, "simt").path.name == "libstoker_simt.so" and emulated.record["warnings"] == []
    assert emulated.library.parent != obtain("host", home).library.parent


def test_a_source_is_compiled_for_the_sets_that_its_first_line_names(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    for name, text in (("any", ""), ("one", "// isa: avx2\n"), ("two", "// isa: baseline avx2\n")):
        (tmp_path / "host" / f"{name}.cpp").write_text(text)

    def units(isa: str) -> list[tuple[str, str | None]]:
        return [(Path(unit.source).stem, unit.isa) for unit in sources.host_units(tmp_path, isa)]

    assert units("baseline") == [("any", None), ("two", "baseline")]
    assert units("avx2") == [("any", None), ("one", "avx2"), ("two", "avx2")]
    assert units("avx512") == [("any", None)]
    assert sources.known_isas("aarch64") == ["baseline"]
    (tmp_path / "host" / "a.cpp").write_text("// isa: baseline avx1024\n")
    with pytest.raises(Refusal, match=r"a\.cpp, line 1: instruction set 'avx1024' is unknown: choose from baseline"):
        sources.host_units(tmp_path, "avx2")


@needs_compiler
def test_a_library_is_built_once_and_again_when_anything_that_goes_into_it_changes(
    home: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = compiler("")
    first = obtain("host", home)
    again = obtain("host", home)
    assert (first.made, again.made, first.library) == (True, False, again.library)
    assert num_compiled(notes) == 1
    assert first.record["tools"]["c++"].startswith("g++ ")

    (home / "op" / "version.h").write_text("#define V 1  // another comment\n")
    (home / "op" / "host" / "notes.txt").write_text("no source")
    assert obtain("host", home).made
    monkeypatch.setattr(libraries.builder, "HOST_FLAGS", (*libraries.builder.HOST_FLAGS, "-DX"))
    assert obtain("host", home).made
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("exec", '[ "$1" = --version ] && echo "g++ 99" && exit\nexec'))
    assert obtain("host", home).record["tools"] == {"c++": "g++ 99"}
    assert num_compiled(notes) == 4


@needs_compiler
def test_of_processes_that_build_at_once_one_builds_and_the_others_wait(
    home: Path, compiler: Callable[[str], Path], own_cache: Path
) -> None:
    notes = compiler("sleep 1")
    with building(home) as a, building(home) as b, building(home) as c:
        said = sorted(process.communicate(timeout=60)[0].split()[0] for process in (a, b, c))
    assert said == ["False", "False", "True"]
    assert num_compiled(notes) == 1
    assert len(list(own_cache.iterdir())) == 2, "an entry and the lock"


@needs_compiler
def test_a_killed_build_leaves_no_entry_and_the_next_one_cleans_up(
    home: Path, compiler: Callable[[str], Path], own_cache: Path
) -> None:
    notes = compiler("exec sleep 60")
    with building(home) as process:
        while not num_compiled(notes):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.kill(int(notes.read_text()), signal.SIGKILL)
    assert [path.name for path in own_cache.glob("*")] == [path.name for path in own_cache.glob(".*")]
    assert list(own_cache.glob(".host_*-*.tmp"))
    compiler("")
    assert obtain("host", home).made
    assert not list(own_cache.glob(".host_*-*.tmp"))


@needs_compiler
def test_paths_may_have_spaces(
    home: Path, tmp_path: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("")
    spaced = tmp_path / "two words"
    shutil.copytree(home, spaced / "the home")
    monkeypatch.setenv("CXX", str(shutil.copy(os.environ["CXX"], spaced / "my c++")))
    monkeypatch.setenv("STOKER_CACHE", str(spaced / "a cache"))
    library = obtain("host", spaced / "the home").library
    assert Library(library, "host").path.is_relative_to(spaced / "a cache")


@needs_compiler
def test_the_same_sources_in_another_folder_are_the_same_library(home: Path, tmp_path: Path) -> None:
    built = obtain("host", home)
    assert obtain("host", home.rename(tmp_path / "moved")).library == built.library


@needs_compiler
def test_a_source_that_does_not_compile_is_refused_with_its_name_and_what_the_compiler_says(
    home: Path, own_cache: Path
) -> None:
    (home / "op" / "host" / "two.cpp").write_text("int f() { return undeclared; }\n")
    with pytest.raises(Refusal, match=r"(?s)op/host/two\.cpp: .*STOKER_NATIVE=0.*'undeclared' was not declared"):
        obtain("host", home)
    (home / "op" / "host" / "two.cpp").write_text("int g(); int f() { return g(); }\n")
    with pytest.raises(Refusal, match=r"(?s)linking: .*undefined reference to `g\(\)'"):
        obtain("host", home)
    assert [path.name for path in own_cache.iterdir()] == [f".host_{toolchain.best_isa()}.lock"]


def test_without_a_compiler_there_is_none_with_a_reason_unless_another_machine_left_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = obtain("host", home) if GPP else None
    monkeypatch.setenv("PATH", "/nowhere")
    if built:
        with caplog.at_level(logging.INFO):
            assert obtain("host", home).library == built.library
        assert "no C++ compiler" in caplog.text and "was built by {'c++': 'g++" in caplog.text
    (home / "op" / "version.h").write_text("#define V 3\n")
    with pytest.raises(Unavailable, match=r"CXX is not set, and neither g\+\+ nor clang\+\+ is on PATH"):
        obtain("host", home)
    monkeypatch.setenv("CXX", "my-c++ -O1")
    with pytest.raises(Unavailable, match=r"CXX=my-c\+\+ -O1 is none that runs"):
        obtain("host", home)


def test_none_and_why_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries._attempt.cache_clear()
    monkeypatch.setenv("STOKER_NATIVE", "0")
    assert toolchain.host_library() is None and toolchain.why_not() == "STOKER_NATIVE=0"
    assert toolchain.cuda_library("sm_90a") is None and toolchain.why_not("sm_90a") == "STOKER_NATIVE=0"
    libraries._attempt.cache_clear()
    monkeypatch.delenv("STOKER_NATIVE")
    monkeypatch.setattr(libraries, "obtain", lambda target: (_ for _ in ()).throw(Unavailable(f"no {target}")))
    assert toolchain.host_library() is None and toolchain.why_not() == "no host"
    assert toolchain.host_library("avx2") is None and toolchain.why_not("host_avx2") == "no host_avx2"
    libraries._attempt.cache_clear()
    with pytest.raises(Refusal, match=r"not built for 'sm_80': choose from host_baseline, .*sm_90a, sm_100f"):
        obtain("sm_80", SAMPLES)


@needs_compiler
def test_another_abi_a_missing_function_and_a_struct_of_another_size_are_refused(home: Path, tmp_path: Path) -> None:
    (home / "op" / "version.h").write_text("#define V 2\n")
    with pytest.raises(Refusal, match="ABI version 2, where this Stoker speaks 1"):
        Library(obtain("host", home).library, "host")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(Refusal, match=r"text\.so: cannot be loaded \(.*STOKER_CACHE"):
        Library(tmp_path / "text.so", "host")
    library = Library(obtain("host", SAMPLES).library, "host")
    wider = type("ScaleParams", (ctypes.Structure,), {"_fields_": (*ScaleParams._fields_, ("eps", ctypes.c_double))})
    with pytest.raises(Refusal, match=r"ScaleParams has 32 bytes in C\+\+ and 40 in Python: make its fields the same"):
        library.function("sample_scale", wider)
    other = type("OtherParams", (ctypes.Structure,), {"_fields_": ScaleParams._fields_})
    with pytest.raises(Refusal, match="has no function sizeof_OtherParams"):
        library.function("sample_scale", other)
    with pytest.raises(Refusal, match="has no function sample_absent"):
        library.function("sample_absent", ScaleParams)


def test_a_wheel_carries_every_source_and_header(tmp_path: Path) -> None:
    names = [name for name in sources.hashes(sources.HOME, []) if "." in name]
    units = [unit.source for unit in [*sources.host_units(sources.HOME, "baseline"), *sources.cuda_units(sources.HOME)]]
    tree = tmp_path / "tree"
    shutil.copytree(HOME / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SAMPLES, tree / "kernels" / "sample")  # so that there is something of each kind
    for name in ("stoker", "dataio", "parallel", "pretrain", "launch"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").write_text("")
    shutil.copy(HOME / "stoker" / "version.py", tree / "stoker")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME / name, tree)
    program = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(next(tmp_path.glob("*.whl")))], capture_output=True, text=True
    ).stdout
    samples = ["sample/host/scale.cpp", "sample/cuda/scale.cu", "sample/native/sample.h"]
    missing = [name for name in [*names, *units, *samples] if f"kernels/{name} " not in listing]
    assert not missing, missing
