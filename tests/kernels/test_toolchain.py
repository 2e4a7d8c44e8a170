"""The compiled libraries: built once for each content, whole or not there, refused when they are not right."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels import toolchain
from kernels.toolchain import cache, libraries, sources
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


def make(key: str, content: bytes = b"a library") -> cache.Entry:
    """An entry whose library is that content, found or made."""

    def build(place: Path) -> dict[str, Any]:
        (place / "library").write_bytes(content)
        return {"library": "library", "sha256": hashlib.sha256(content).hexdigest()}

    return cache.obtain(key, "host", build)


def forget_use() -> None:
    """As if the processes that used the entries so far had ended."""
    while cache._in_use:
        cache._in_use.popitem()[1].close()


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if not path.name.startswith(".")}


def test_of_each_target_the_last_used_entries_are_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    cache.obtain("sm_90a-0", "sm_90a", lambda place: make("host-0").record | {"library": "../host-0/library"})
    for age, key in enumerate(("host-1", "host-2", "host-3", "host-4")):
        make(key)
        forget_use()
        os.utime(own_cache / key / cache.RECORD, (time.time() - 1e6 + age,) * 2)
    assert kept(own_cache) == {"sm_90a-0", "host-0", "host-3", "host-4"}, "host-0 has the latest time"
    make("host-3")
    forget_use()
    make("host-5")
    assert kept(own_cache) == {"sm_90a-0", "host-0", "host-3", "host-5"}, "host-3 was used after host-4"
    assert not list(own_cache.glob(".*.tmp"))


def test_what_a_living_process_uses_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process, and by another one that shares its lock with nobody, until it is killed."""
    monkeypatch.setattr(cache, "KEPT", 1)
    for key in ("host-here", "host-there"):
        make(key)
    program = "import sys, time; from kernels.toolchain import cache; cache.find(sys.argv[1]); print(flush=True);"
    command = [sys.executable, "-c", program + "time.sleep(60)", "host-there"]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        forget_use()
        assert cache.find("host-here")
        make("host-next")
        assert kept(own_cache) == {"host-here", "host-there", "host-next"}
        process.kill()
    make("host-last")
    assert kept(own_cache) == {"host-here", "host-next", "host-last"}


def test_an_entry_replaced_while_its_lock_was_waited_for_is_not_taken(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the lock would be on a record that is gone, and what lies in its place could vanish while in use."""
    place, lock = make("host-1").library.parent, cache.fcntl.flock
    forget_use()

    def late(*arguments: Any) -> None:
        shutil.copytree(place, own_cache / "anew")
        shutil.rmtree(place)
        (own_cache / "anew").rename(place)
        lock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache.fcntl, "flock", late)
        assert cache.find("host-1") is None and not cache._in_use
    assert cache.find("host-1")


def test_where_nobody_can_lock_nothing_is_removed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache, "KEPT", 1)
    monkeypatch.setattr(cache.fcntl, "flock", unsupported)
    for key in ("host-1", "host-2"):
        make(key)
        forget_use()
    assert kept(own_cache) == {"host-1", "host-2"}


#: For a second and a half: either makes one entry after the other, each of which removes what it can, or takes one
#: entry again and again, each time as a process that has just begun, and reads its library, as loading it would.
RACE = """
import sys, time
from tests.kernels.test_toolchain import cache, forget_use, make
cache.KEPT, remover, made = 1, sys.argv[1] == "remover", 0
end = time.monotonic() + 1.5
while time.monotonic() < end:
    entry = make(f"host-{made}" if remover else "host-wanted", b"wanted" * 1000)
    assert entry.library.read_bytes() == b"wanted" * 1000
    made += entry.made
    forget_use()
    time.sleep(0.0 if remover else 0.001)
print(made)
"""


def test_whoever_has_found_an_entry_can_load_it_though_another_removes_what_it_can(own_cache: Path) -> None:
    racing = [
        subprocess.Popen([sys.executable, "-c", RACE, role], cwd=HOME, stdout=subprocess.PIPE, text=True)
        for role in ("user", "user", "remover")
    ]
    made = [process.communicate(timeout=60)[0] for process in racing]
    assert [process.returncode for process in racing] == [0] * 3
    remade = sum(map(int, made[:2]))
    print(f"removed {remade} times")
    assert remade >= 5, "too seldom to prove anything"
    assert not list(own_cache.glob(".*.tmp"))


@needs_compiler
@pytest.mark.parametrize("damage", ["a flipped bit", "a torn record", "no library", "a newer format"])
def test_a_damaged_entry_is_told_and_built_again(home: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    built = obtain("host", home)
    record = built.library.with_name(cache.RECORD)
    if damage == "a flipped bit":
        content = bytearray(built.library.read_bytes())
        content[len(content) // 2] ^= 1
        built.library.write_bytes(content)
    elif damage == "a torn record":
        record.write_text(record.read_text()[:50])
    elif damage == "no library":
        built.library.unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": {"name": cache.FORMAT, "version": 2}}))
    again = obtain("host", home)
    assert again.made and again.library == built.library
    assert "damaged build" in caplog.text and built.library.parent.name in caplog.text
    assert not obtain("host", home).made


@needs_compiler
def test_a_cache_that_cannot_be_written_is_refused_unless_the_library_is_in_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain("host", home)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_writing", None)
        assert not obtain("host", home).made

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "file"))
    with pytest.raises(Refusal, match=r"cannot be kept in .*/file/native \(Not a directory\): set STOKER_CACHE"):
        obtain("host", home)
    with _read_only(tmp_path / "locked") as locked:
        monkeypatch.setenv("STOKER_CACHE", str(locked))
        with pytest.raises(Refusal, match=r"cannot be kept in .*/locked/native \(Permission denied\): set STOKER"):
            cache.obtain("key", "host", lambda place: {})


@contextmanager
def _read_only(folder: Path) -> Iterator[Path]:
    """A folder in which this process may not write, though it be root's."""
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(was)
        folder.chmod(stat.S_IRWXU)


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
