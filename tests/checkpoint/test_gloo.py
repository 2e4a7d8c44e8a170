"""The store over real processes: the same promises as in ``test_elastic.py``, with gloo between the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint.store import CheckpointStore
from tests.checkpoint import jobs
from tests.checkpoint.state import plan
from tests.parity.pool import JobFailed, Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


ONE, TP2, TP3 = plan(1), plan(2, tp=2), plan(3, tp=3)
EXPERTS, ZERO = plan(4, tp=2, etp=2, ep=2), plan(3)
PIPELINE = plan(4, tp=2, pp=2)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(TP2, TP3), (TP3, EXPERTS), (EXPERTS, ZERO), (ZERO, PIPELINE), (PIPELINE, ONE)],
    ids=["tp2-tp3", "tp3-ep2.etp2", "ep2.etp2-zero", "zero-tp2.pp2", "tp2.pp2-one"],
)
def test_p6_round_trip_between_layouts(saved: object, loaded: object, pool: Pool, tmp_path: Path) -> None:
    source, target = saved.to_dict(), loaded.to_dict()  # type: ignore[attr-defined]
    pool.run(source["world_size"], jobs.save, str(tmp_path), 5, source)
    assert pool.run(target["world_size"], jobs.load, str(tmp_path), None, target) == [(5, [])] * target["world_size"]


def test_p8_a_chunk_damaged_for_one_rank_moves_all_ranks_to_the_older_step(pool: Pool, tmp_path: Path) -> None:
    for step in (5, 6):
        pool.run(4, jobs.save, str(tmp_path), step, PIPELINE.to_dict())
    store = CheckpointStore(tmp_path)
    at = store.manifest(6).tensors["final_norm.weight"].chunks[0]  # on the last stage only
    file = tmp_path / "step_00000006" / at.file
    raw = bytearray(file.read_bytes())
    raw[at.offset] ^= 1
    file.write_bytes(raw)
    found = pool.run(2, jobs.verify, str(tmp_path), 6)
    assert found[0] == found[1]
    assert [line.startswith(f"{at.file}, tensor final_norm.weight, chunk 0: CRC32C") for line in found[0]] == [True]
    assert pool.run(4, jobs.load, str(tmp_path), None, PIPELINE.to_dict()) == [(5, [])] * 4
    assert store.steps() == [5]
    assert (tmp_path / "step_00000006.quarantined").is_dir()


def test_a_refusal_on_one_rank_is_told_to_all(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(3, jobs.refuse, str(tmp_path), TP3.to_dict())
    assert told == ["rank 2: tensor mask: local shape (62,) where its layout has (63,)"] * 3
    assert not any(tmp_path.iterdir())


def test_p8_a_rank_killed_while_it_writes_leaves_the_previous_step(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, jobs.save, str(tmp_path), 5, TP2.to_dict())
    with pytest.raises(JobFailed):
        pool.run(2, jobs.save, str(tmp_path), 6, TP2.to_dict(), 1, 1)
    assert CheckpointStore(tmp_path).steps() == [5]
    assert pool.run(2, jobs.load, str(tmp_path), None, TP2.to_dict()) == [(5, [])] * 2
    pool.run(2, jobs.save, str(tmp_path), 6, TP2.to_dict(), 2)
    assert pool.run(2, jobs.load, str(tmp_path), None, TP2.to_dict()) == [(6, [])] * 2
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000005", "step_00000006"]
