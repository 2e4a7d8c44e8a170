"""A node whose device failed is replaced at once, and what fails on two devices alike is the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.supervise import causes
from tests.launch.supervise.nodes.test_leader import Scene

ILLEGAL = "device, rank 2, cudaErrorIllegalAddress, step 7"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path / "run")
    scene.ready(0, 1, 2)
    scene.turn()
    assert scene.attempt() == 1 and scene.leader._places == {0: 0, 1: 1}
    return scene


def fails(scene: Scene, attempt: int, fingerprint: str | None) -> None:
    node = scene.leader._places[1]
    told = causes.fault("device", "rank 2", rank=2, step=7, host=f"n{node}", fingerprint=fingerprint)
    scene.found(node, told, attempt)
    scene.found(0, None, attempt)
    scene.turn()
    scene.ready(0, 1, 2)
    scene.turn()


def test_the_node_of_a_device_that_failed_is_replaced_at_once_and_hardware_never_ends_the_launch(scene: Scene) -> None:
    fails(scene, 1, None)
    assert scene.attempt() == 2 and scene.leader._places == {0: 0, 1: 2}
    fails(scene, 2, None)
    assert scene.attempt() == 3 and scene.code() is None


def test_an_error_that_may_be_the_program_s_is_tried_on_another_device_and_then_believed(scene: Scene) -> None:
    fails(scene, 1, ILLEGAL)
    assert scene.attempt() == 2 and scene.leader._places == {0: 0, 1: 2}, "once more, and elsewhere"
    fails(scene, 2, ILLEGAL)
    assert scene.code() == 1 and scene.leader.final is not None
    assert "the same failure twice" in scene.leader.final.text


def test_others_that_lost_the_rank_of_the_device_do_not_hide_it(scene: Scene) -> None:
    scene.found(0, causes.fault("exception", "ncclInternalError", rank=0, host="n0"), 1)
    scene.found(1, causes.fault("device", "rank 2: ECC", rank=2, host="n1"), 1)
    scene.turn()
    scene.ready(0, 1, 2)
    scene.turn()
    assert scene.leader._faults == {1: 2} and scene.leader._places == {0: 0, 1: 2}
