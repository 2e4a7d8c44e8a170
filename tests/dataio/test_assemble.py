"""A store assembled by many tasks is the store that one writer makes of the same documents, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dataio import assemble
from dataio.assemble import Form
from dataio.dedup.arrays import save
from dataio.documents import Document, ParquetFile, read_groups, write_documents
from dataio.shards import Profile
from dataio.store import Store, StoreWriter
from stoker.errors import Refusal
from tests.dataio.synthetic import TOKENIZER

SELECT = pa.schema(
    [("reason", pa.string()), ("weight", pa.float32()), ("language", pa.string()), ("flags", pa.uint32())]
)
LANGUAGES, LICENCES = ["rust", None, "c", "python"], ["MIT", "Apache-2.0", None]


@dataclass
class Units:
    """A source of a few thousand documents in seven units: one without documents, one of which all are dropped."""

    folder: Path

    def __post_init__(self) -> None:
        rng = np.random.default_rng(8)
        self.order: list[tuple[int, int]] = []
        self.tokens: dict[tuple[int, int], np.ndarray] = {}
        self.select: dict[tuple[int, int], dict[str, object]] = {}
        self.written: dict[tuple[int, int], Document] = {}
        for unit, rows in enumerate((1000, 1, 0, 63, 64, 700, 65)):
            self._write(unit, rows, rng)
        rng.shuffle(self.order)
        self.save_order(self.order)

    def _write(self, unit: int, rows: int, rng: np.random.Generator) -> None:
        documents = [
            Document(f"{unit} {row}", "s", "p", file=unit, row=2 * row, licence=LICENCES[row % 3])
            for row in range(rows)
        ]
        write_documents(self.documents[unit], documents)
        kept = (rng.random(rows) < 0.8) & (unit != 4)
        lengths = np.where(kept, rng.integers(1, 200, rows), 0)
        for row in np.flatnonzero(kept):
            at = (unit, int(row))
            self.tokens[at] = np.append(rng.integers(0, 256, lengths[row] - 1), 256).astype(np.uint16)
            self.order.append(at)
            self.written[at] = documents[row]
        values = [
            {
                "reason": None if keep else "too_short",
                "weight": float(rng.random(dtype=np.float32)),
                "language": LANGUAGES[int(rng.integers(4))],
                "flags": int(rng.integers(2**32)),
            }
            for keep in kept
        ]
        self.select |= {(unit, row): value for row, value in enumerate(values)}
        with ParquetFile(self.selected[unit], SELECT) as file:
            for group in read_groups(self.documents[unit], ["row"]):
                file.write(pa.Table.from_pylist(values[: group.num_rows], SELECT))
        tokens = [self.tokens[unit, row] for row in range(rows) if (unit, row) in self.tokens]
        save(self.encoded[unit] / "tokens.npy", np.concatenate([np.empty(0, np.uint16), *tokens]))
        save(self.encoded[unit] / "lengths.npy", lengths.astype(np.int64))
        save(self.encoded[unit] / "bytes.npy", 3 * lengths.astype(np.int64))

    @property
    def documents(self) -> list[Path]:
        return [self.folder / f"documents/{unit:05d}.parquet" for unit in range(7)]

    @property
    def selected(self) -> list[Path]:
        return [self.folder / f"select/{unit:05d}.parquet" for unit in range(7)]

    @property
    def encoded(self) -> list[Path]:
        return [self.folder / f"tokens/{unit:05d}" for unit in range(7)]

    def save_order(self, order: object) -> None:
        save(self.folder / "order.npy", np.array(order, np.int64))

    def plan(self) -> None:
        assemble.plan_shards(self.folder / "order.npy", self.encoded, self.folder / "plan")

    def write(self, form: Form, number: int) -> dict[str, int]:
        return assemble.write_shard(self.folder / "plan", self.encoded, form, number, self.folder / "shards")

    def commit(self, form: Form, path: Path) -> dict[str, int]:
        folders = (self.folder / "plan", self.folder / "shards", self.encoded, self.documents, self.selected)
        return assemble.commit(*folders, form, "s", path, recipe="ab", inputs={"a": "1"}, input_files=["a", "b"])

    def build(self, form: Form, path: Path) -> Store:
        self.plan()
        for number in range(assemble.num_shards(self.folder / "plan", form)):
            self.write(form, number)
        self.commit(form, path)
        return Store.open(path)

    def write_alone(self, path: Path, form: Form) -> Store:
        """The same documents through a StoreWriter."""
        with StoreWriter(path, "s", TOKENIZER, form.chunk_tokens, form.shard_chunks, form.profile) as writer:
            for at in self.order:
                ids = np.frombuffer(self.written[at].id, ">u8").reshape(1, 2)
                writer.append(
                    self.tokens[at],
                    np.array([len(self.tokens[at])]),
                    np.array([3 * len(self.tokens[at])]),
                    ids,
                    source_row=np.array([[at[0], 2 * at[1]]]),
                    weight=np.array([self.select[at]["weight"]]),
                    languages=[self.select[at]["language"]],  # type: ignore[list-item]
                    flags=np.array([self.select[at]["flags"]]),
                )
            return writer.commit(input_files=["a", "b"])


def form(profile: Profile = "hot") -> Form:
    return Form(TOKENIZER, profile, chunk_tokens=64, shard_chunks=1024)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Units:
    """Planned, with its shards written; not to be changed."""
    units = Units(tmp_path_factory.mktemp("units"))
    units.build(form(), units.folder / "store")
    return units


@pytest.fixture
def units(tmp_path: Path) -> Units:
    return Units(tmp_path)


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_it_is_what_one_writer_makes_of_the_same_documents_to_the_byte(
    units: Units, tmp_path: Path, profile: Profile
) -> None:
    store, alone = units.build(form(profile), tmp_path / "s"), units.write_alone(tmp_path / "alone", form(profile))
    assert store.arrays["tokens"].grid.num_shards == 3
    assert store.verify() == [] and store.dataset_id == alone.dataset_id
    assert store.files == alone.files
    for name in [*store.files, "files.json"]:
        assert (store.path / name).read_bytes() == (alone.path / name).read_bytes(), name
    licences = [units.written[at].licence or "NOASSERTION" for at in units.order]
    assert store.manifest["licences"] == {
        licence: {
            "documents": licences.count(licence),
            "bytes": sum(3 * len(units.tokens[at]) for at, of in zip(units.order, licences) if of == licence),
        }
        for licence in ("Apache-2.0", "MIT", "NOASSERTION")
    }
    assert (store.manifest["recipe"], store.manifest["inputs"]) == ("ab", {"a": "1"})
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "plan").glob(".*"))


def test_shards_written_again_and_in_any_order_are_the_same(made: Units, tmp_path: Path) -> None:
    numbers = range(assemble.num_shards(made.folder / "plan", form()))
    for number in reversed(numbers):
        assemble.write_shard(made.folder / "plan", made.encoded, form(), number, tmp_path)
        for name in assemble.shard_outputs("shards", number):
            assert (tmp_path / Path(name).name).read_bytes() == (made.folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        Path(name).name for number in numbers for name in assemble.shard_outputs("", number)
    )


def test_a_store_that_is_there_is_replaced_when_the_new_one_is_whole_and_nothing_else_is(units: Units) -> None:
    path = units.folder / "store"
    first = units.build(form(), path)
    units.save_order(units.order[::-1])
    second = units.build(form(), path)
    assert first.dataset_id != second.dataset_id == Store.open(path).dataset_id and second.verify() == []
    foreign = units.folder / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(Refusal, match="not a token store"):
        units.commit(form(), foreign)
    assert (foreign / "thesis.txt").is_file() and not list(units.folder.glob(".*"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda order: order[:-1], "documents with tokens"),
        (lambda order: [*order, order[0]], "twice"),
        (lambda order: [*order[:-1], order[0]], "twice"),
        (lambda order: [*order[:-1], (4, 0)], "without tokens"),
        (lambda order: [*order[:-1], (7, 0)], "in no unit"),
        (lambda order: [*order[:-1], (3, 63)], "in no unit"),
        (lambda order: [*order[:-1], (-1, 0)], "in no unit"),
        (lambda order: [0, 1], r"not an array of \(unit, row\)"),
    ],
)
def test_an_order_that_is_not_one_of_the_kept_documents_is_refused(units: Units, change, message: str) -> None:  # type: ignore[no-untyped-def]
    units.save_order(change(units.order))
    with pytest.raises(Refusal, match=message):
        units.plan()


def test_what_is_not_tokens_of_the_tokenizer_is_refused_by_the_unit(units: Units) -> None:
    units.plan()
    tokens = np.load(units.encoded[5] / "tokens.npy")
    last = int(np.load(units.encoded[5] / "lengths.npy").cumsum()[-1]) - 1
    for wrong, message in (
        (np.where(np.arange(len(tokens)) == last, 1, tokens).astype(np.uint16), "00005/tokens.npy.*end-of-text"),
        (np.where(tokens == 3, 257, tokens).astype(np.uint16), "outside the vocabulary"),
        (tokens.astype(np.uint32), "00005/tokens.npy: not uint16"),
        (tokens[:-1], "00005/tokens.npy.*shorter"),
    ):
        save(units.encoded[5] / "tokens.npy", wrong)
        with pytest.raises(Refusal, match=message):
            for number in range(3):
                units.write(form(), number)
    (units.encoded[5] / "tokens.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(Refusal, match=r"00005/tokens\.npy: cannot be read"):
        units.write(form(), 0)


@pytest.mark.parametrize("damage", ["shards/1", "shards/1.json", "bytes", "select"])
def test_a_commit_of_parts_that_do_not_fit_is_refused_and_leaves_nothing(units: Units, damage: str) -> None:
    units.build(form(), units.folder / "store")
    if damage == "bytes":
        save(units.encoded[6] / "bytes.npy", np.zeros(66, np.int64))
    elif damage == "select":
        rows = [{"reason": "too_long", "weight": 1.0, "language": None, "flags": 0}] * 63
        with ParquetFile(units.selected[3], SELECT) as file:
            file.write(pa.Table.from_pylist(rows, SELECT))
    else:
        content = (units.folder / damage).read_bytes()
        (units.folder / damage).unlink()
        (units.folder / damage).write_bytes(content[:-1])
    with pytest.raises(Refusal, match={"bytes": "00006", "select": "00003"}.get(damage, damage)):
        units.commit(form(), units.folder / "again")
    assert not (units.folder / "again").exists() and not list(units.folder.glob(".*"))
    assert Store.open(units.folder / "store").verify() == []


def test_a_source_of_which_nothing_is_left_is_refused_when_it_is_cut(units: Units) -> None:
    for folder in units.encoded:
        rows = len(np.load(folder / "lengths.npy"))
        save(folder / "lengths.npy", np.zeros(rows, np.int64))
    units.save_order(np.empty((0, 2)))
    units.plan()
    with pytest.raises(Refusal, match="0 tokens are left"):
        assemble.num_shards(units.folder / "plan", form())


def test_a_shard_that_cannot_be_hashed_alone_is_refused() -> None:
    with pytest.raises(Refusal, match="multiple of 65536"):
        Form(TOKENIZER, chunk_tokens=64, shard_chunks=4)
