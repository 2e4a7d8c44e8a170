"""A source: deterministic units, documents as the files say, counts and lineage that account for every file."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dataio.ingest import streams
from dataio.ingest.fields import Fields
from dataio.ingest.options import Source
from dataio.ingest.source import InputFile, _runs, contains, ingest, units
from dataio.stages import _remove_torn
from stoker.errors import Refusal
from tests.dataio.ingest.support import lay, read


def test_text_takes_prose_and_code_takes_both(tmp_path: Path) -> None:
    files = {
        "a.md": "a",
        "b.rst": "b",
        "c.py": "c",
        "d.bin": "d",
        "e.html": "<p>e</p>",
        "f.txt.gz": gzip.compress(b"f"),
    }
    lay(tmp_path / "in", {**files, "README": "r"})
    assert set(read(tmp_path / "in", format="text").texts) == {"a.md", "b.rst", "e.html", "f.txt.gz", "README"}
    code = read(tmp_path / "in", format="code").texts
    assert set(code) == {"a.md", "b.rst", "c.py", "e.html", "f.txt.gz", "README"}
    assert code["e.html"] == "<p>e</p>" and code["f.txt.gz"] == "f", "a page in a code tree is source"
    assert read(tmp_path / "in", format="text").texts["e.html"] == "e\n"
    assert read(tmp_path / "in", format="text", html="source").texts["e.html"] == "<p>e</p>"
    assert set(read(tmp_path / "in", format="text", include=["*.bin", "c.*"]).texts) == {"d.bin", "c.py"}
    assert set(read(tmp_path / "in", exclude=["*.md", "*.rst", "e.*"]).texts) == {"c.py", "f.txt.gz", "README"}


def test_files_that_are_no_text_are_counted_by_kind(tmp_path: Path) -> None:
    files = {
        "utf8.txt": "\ufeffä\r\n",
        "utf16.txt": "ä\r\n".encode("utf-16"),
        "latin.txt": "ä".encode("latin-1"),
        "binary.txt": b"\x7fELF\0\0",
        "empty.txt": b"",
        "blank.txt": b" \n\t\n",
        "long.txt": b"x" * 101,
        "just.txt": b"x" * 100,
        "cut.txt.gz": gzip.compress(b"x" * 90)[:-5],
        "odd\udcff.txt": b"odd",
    }
    for name, content in files.items():
        lay(tmp_path / "in", {name: content})
    found = read(tmp_path / "in", max_document_bytes=100)
    assert found.texts == {"utf8.txt": "ä\n", "utf16.txt": "ä\n", "just.txt": "x" * 100, "odd\\xff.txt": "odd"}
    assert found.faults() == {
        "malformed.encoding": 1,
        "malformed.binary": 1,
        "malformed.truncated": 1,
        "skipped.empty": 2,
        "skipped.too_long": 1,
    }


def test_lineage_holds_the_hash_of_every_file_whether_it_was_read_to_its_end_or_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lay(tmp_path / "in", {"a.txt": b"x" * 10_000_000, "b.jsonl.gz": gzip.compress(b"{}\n" * 1000)[:-9] + b"junk" * 999})
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in/c.parquet")
    found = read(tmp_path / "in", max_document_bytes=1000)
    contents = {str(path): path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    assert found.lineage == {url: [len(data), xxhash.xxh3_128_hexdigest(data)] for url, data in contents.items()}
    assert found.counts["bytes_in"] == sum(map(len, contents.values()))
    assert found.counts["bytes_out"] == sum(len(row["text"].encode()) for row in found.rows)


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 400))
def test_runs_keep_order_and_are_full_but_not_above_their_size(sizes: list[int], unit_bytes: int) -> None:
    files = [InputFile(i, str(i), size, "", str(i), "file") for i, size in enumerate(sizes)]
    runs = list(_runs(files, unit_bytes))
    assert [file for run in runs for file in run] == files
    totals = [sum(file.size for file in run) for run in runs]
    assert all(total <= unit_bytes or len(run) == 1 for total, run in zip(totals, runs))
    assert all(total + following[0].size > unit_bytes for total, following in zip(totals, runs[1:]))


def test_documents_do_not_depend_on_how_files_are_cut_into_units(tmp_path: Path) -> None:
    lay(tmp_path / "in", {f"{i:03}/{i}.py": f"# {i}\n" * i for i in range(1, 60)})
    whole, small = (read(tmp_path / "in", out=tmp_path / f"out{size}", unit_bytes=size) for size in (1 << 20, 100))
    assert len(whole.units) == 1 < len(small.units) and whole.rows == small.rows and whole.counts == small.counts


def test_the_same_unit_gives_the_same_bytes(tmp_path: Path) -> None:
    lay(
        tmp_path / "in",
        {"a.py": "x\n", "b.jsonl": b'{"text": "a", "z": 1, "b": 2}\n\xff\n', "package.json": '{"license": "MIT"}'},
    )
    for out in ("one", "two"):
        read(tmp_path / "in", out=tmp_path / out, repository="root")
    one, two = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 3


def test_a_unit_s_inputs_change_with_its_files_and_with_the_licence_of_its_repository(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {"a.py": "x\n", "package.json": '{"license": "MIT"}'})
    source = Source(name="s", paths=(".",), format="code", exclude=("*.json",))

    def inputs() -> dict[str, str]:
        (unit,) = units(source, base)
        return unit.inputs()

    first = inputs()
    assert first == inputs() and str(base / "a.py") in first
    lay(base, {"package.json": '{"license": "ISC"}'})
    second = inputs()
    assert {key for key in first if first[key] != second[key]} == {"repositories"}
    os.utime(base / "a.py", ns=(1, 1))
    assert {key for key in first if inputs()[key] != second[key]} == {str(base / "a.py")}


def test_a_unit_s_inputs_change_with_the_numbers_of_its_files_which_are_consecutive(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {f"{i}.md": "x" for i in range(7)})
    found = units(Source(name="s", paths=(".",), unit_bytes=3), base)
    assert [[file.number for file in unit.files] for unit in found] == [[0, 1, 2], [3, 4, 5], [6]]
    last = found[2].inputs()
    (base / "0.md").unlink()
    lay(base, {"00.md": "x", "000.md": "x"})  # now before it, so that its documents have another file's number
    after = units(Source(name="s", paths=(".",), unit_bytes=7), base)[1]
    assert [file.path for file in after.files] == ["6.md"] and after.files[0].number == 7
    assert after.inputs()[str(base / "6.md")] == last[str(base / "6.md")] and after.inputs() != last


def test_a_unit_s_inputs_change_with_the_paths_that_its_documents_will_have(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {"sub/a.md": "x", "sub/odd\udcff.md": "y"})
    (whole,), (part,) = (units(Source(name="s", paths=(path,)), base) for path in (".", "sub"))
    assert [file.url for file in whole.files] == [file.url for file in part.files]
    assert whole.inputs().keys() == part.inputs().keys() and whole.inputs() != part.inputs()


def test_a_folder_that_a_source_may_read_is_contained_in_it_whether_it_is_there_or_not(tmp_path: Path) -> None:
    lay(tmp_path, {"in/x/a.md": "a", "in/y.md": "y", "other/b.md": "b"})
    os.symlink(tmp_path / "in", tmp_path / "link")

    def holds(*paths: str, folder: str) -> bool:
        return contains(Source(name="s", paths=paths), tmp_path, tmp_path / folder)

    assert all(
        holds(path, folder="in/out") for path in ("in", ".", "in/", "link", "in/*", "in/**/*.md", "i?/*/*.jsonl")
    )
    assert holds("in", folder="in") and holds("in", folder="link/out") and holds("other", "in", folder="in/x/out")
    assert holds(f"file://{tmp_path}/in", folder="in/out") and holds("li*", folder="in/out")
    assert not any(holds(path, folder="in/out") for path in ("in/x", "in/y.md", "in/*.md", "in/x*", "other", "s3://in"))
    assert not holds("in", folder="inside") and not holds("in/x", folder="in")


def test_a_copy_of_a_remote_file_has_a_name_that_the_next_run_removes_when_this_one_is_killed(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.zip", b"x")
    with streams.local("memory://bucket/a.zip", tmp_path) as copy:
        assert copy.read_bytes() == b"x"
        _remove_torn(tmp_path)
        assert not copy.exists()
        copy.touch()  # for the end, which removes it
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    assert not list(tmp_path.iterdir())


def test_paths_are_read_in_order_and_no_file_twice(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {"b/x.md": "x", "a/y.md": "y"})
    found = read(base, "b", "a")
    assert [row["text"] for row in found.rows] == ["x", "y"] and [row["file"] for row in found.rows] == [0, 1]
    assert [row["text"] for row in read(base, "b", ".").rows] == ["x", "y"]


def test_what_holds_nothing_is_refused(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"a.bin": "x"})
    with pytest.raises(Refusal, match="s: a\\.bin holds no file"):
        read(tmp_path / "in", "a.bin")
    with pytest.raises(Refusal, match="there is no such file"):
        read(tmp_path / "in", "b.md")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../x"},
        {"name": "a b"},
        {"paths": []},
        {"paths": ["s3://key:secret@bucket/x"]},
        {"paths": ["a", ""]},
        {"paths": [" "]},
        {"paths": "x"},
        {"paths": [1]},
        {"include": "*.md"},
        {"unit_bytes": "100"},
        {"unit_bytes": 1.0},
        {"max_malformed": "0.5"},
        {"max_malformed": float("nan")},
        {"max_malformed": True},
        {"fields": {"text": 1}},
        {"fields": {"metadata": "some"}},
        {"format": "csv"},
        {"max_malformed": 2},
        {"fields": {"txt": "x"}},
        {"repository": "folder"},
    ],
)
def test_a_wrong_option_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Source.model_validate({"name": "s", "paths": ["x"], **wrong})


def test_options_as_yaml_has_them_are_equal_hash_and_pickle() -> None:
    values = {"name": "s", "paths": ["a", "b"], "include": ["*.x"], "fields": {"metadata": ["k"]}, "max_malformed": 1}
    source = Source.model_validate(values)
    assert source == Source(
        name="s", paths=("a", "b"), include=("*.x",), fields=Fields(metadata=("k",)), max_malformed=1.0
    )
    assert source.fields.names()  # what it has found out about itself changes nothing
    sent = pickle.loads(pickle.dumps(source))
    assert sent == source and hash(sent) == hash(source) == hash(Source.model_validate(source.model_dump(mode="json")))


def test_a_file_that_changed_since_it_was_listed_or_is_gone_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {"a.md": "a"})
    source = Source(name="s", paths=(".",))
    (unit,) = units(source, base)
    out = [tmp_path / "out" / name for name in "abc"]
    lay(base, {"a.md": "longer"})
    with pytest.raises(Refusal, match=r"a\.md: has 6 bytes and had 1"):
        ingest(source, unit, out[0], out[1], out[2])
    (base / "a.md").unlink()
    with pytest.raises(Refusal, match=r"a\.md: cannot be read"):
        ingest(source, unit, out[0], out[1], out[2])
    assert not list((tmp_path / "out").iterdir())


def test_a_store_is_read_as_a_folder_is(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.dataio.ingest.test_archive import MEMBERS, zipped

    base = lay(
        tmp_path / "in", {"a.md": "a", "b.jsonl.gz": gzip.compress(b'{"text": "b"}\n'), "c.zip": zipped(*MEMBERS)}
    )
    lay(base, {"code/package.json": '{"license": "MIT"}', "code/x.py": "x\n"})
    pq.write_table(pa.table({"text": ["p"]}), base / "d.parquet")
    fsspec.filesystem("memory").put(f"{base}/", "/bucket/in/", recursive=True)
    local = read(base, repository="nearest")
    remote = read(tmp_path / "store", "memory://bucket/in", repository="nearest")
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    assert local.rows == remote.rows and local.counts == remote.counts
    prefix = "memory://bucket/in"
    assert {url.removeprefix(str(base)) for url in local.lineage} == {
        url.removeprefix(prefix) for url in remote.lineage
    }
    assert sorted(local.lineage.values()) == sorted(remote.lineage.values())
    assert not [path for path in tmp_path.rglob(".fetched*")], "copies are removed"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"])
def test_a_failing_disk_or_network_is_refused_and_not_taken_for_damage(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.dataio.ingest.test_jsonl import COMPRESSED

    data = b"".join(b'{"text": "%s"}\n' % os.urandom(50).hex().encode() for _ in range(10_000))
    base = lay(tmp_path / "in", {name: COMPRESSED.get(name.split(".")[2] if name != "a.jsonl" else "plain")(data)})  # type: ignore[misc]

    class Failing(streams.io.FileIO):  # type: ignore[name-defined]
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 200_000:
                raise OSError("connection lost")
            return super().read(size)

    monkeypatch.setattr(streams.io, "FileIO", Failing)
    with pytest.raises(Refusal, match=r"cannot be read further \(connection lost\)"):
        read(base)


MEMORY = """
import sys
import tarfile
from pathlib import Path
from dataio.ingest.options import Source
from dataio.ingest.source import ingest, units

base, out = Path(sys.argv[1]), Path(sys.argv[2])

def resident(name):  # proc(5); getrusage would count what the parent had before exec
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024

for name in sys.argv[3:]:
    source = Source(name="s", paths=(name,), max_document_bytes=1 << 20)
    (unit,) = units(source, base)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    counts = ingest(source, unit, out / "d", out / "q", out / "i")
    print(name, round(resident("VmHWM") - before), *(key for key in counts if "." in key))
"""


def test_memory_does_not_depend_on_what_a_file_holds(tmp_path: Path) -> None:
    name = tarfile.TarInfo("x")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    hostile = {
        "line.jsonl": (b"", "malformed.long_line"),  # of 1 GiB, see below
        "bomb.jsonl.gz": (gzip.compress(b'{"text": "' + b"a" * (100 << 20)), "malformed.bomb"),
        "deep.jsonl": (b'{"text": "a", "x": ' + b"[" * 60_000, "malformed.nested"),
        "wide.jsonl": (b'{"text": "a", "x": [' + b"{}," * (1 << 20) + b"{}]}", "malformed.structure"),
        "keys.jsonl": (b"{%s}" % b",".join(b'"%x": {"a": 1}' % i for i in range(200_000)), "malformed.structure"),
        "lines.jsonl": (b"\xff\n" * (1 << 18), "malformed.encoding"),
        "big.txt": (b"a" * (64 << 20), "skipped.too_long"),
        "name.tar": (name.tobuf() + bytes(64 << 20), "malformed.archive"),
        "page.html": (b"<b><i><div>" * 90_000, "malformed.nested"),
    }
    base = lay(
        tmp_path / "in", {"small.jsonl": b'{"text": "a"}', **{name: data for name, (data, _) in hostile.items()}}
    )
    os.truncate(base / "line.jsonl", 1 << 30)
    command = [sys.executable, "-c", MEMORY, str(base), str(tmp_path / "out"), "small.jsonl", *hostile]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    found = {name: (int(mib), kinds) for name, mib, *kinds in map(str.split, ran.stdout.splitlines()[1:])}
    print(found)
    assert {name: kinds for name, (_, kinds) in found.items()} == {name: [kind] for name, (_, kind) in hostile.items()}
    assert all(mib < 48 for mib, _ in found.values()), found


def test_the_quarantine_of_a_unit_without_faults_is_an_empty_file(tmp_path: Path) -> None:
    base = lay(tmp_path / "in", {"a.md": "a"})
    read(base, out=tmp_path / "out")
    assert (tmp_path / "out/quarantine/00000").read_bytes() == b""
    assert json.loads((tmp_path / "out/inputs/00000").read_text()) == {
        str(base / "a.md"): [1, xxhash.xxh3_128_hexdigest(b"a")]
    }
