"""What is done after a fault depends on causes and steps alone, and no run is started again for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launch.supervise.causes import PREEMPTED, Cause, fault, killed, most_telling
from launch.supervise.policy import WITHOUT_PROGRESS, Decision, Policy
from pretrain.attempt import KINDS, ExitClass
from pretrain.diagnosis import device_error, device_fingerprint

KILLED = killed(1, 9, 7, "a", no_memory=False)
SAME = fault("exception", "cosmic ray", rank=0, step=5, fingerprint="ray, 5")
OTHER = fault("exception", "cosmic ray", rank=0, step=6, fingerprint="ray, 6")
NO_MEMORY = fault("oom", "no memory", rank=0)


def decided(*attempts: tuple[Cause, int | None], restarts: int = 100) -> list[bool]:
    policy = Policy(restarts)
    return [policy.decide(cause, step).again for cause, step in attempts]


def test_what_is_no_fault_ends_a_launch_with_the_code_of_its_class() -> None:
    for exit_class, kind in zip(list(ExitClass)[:4], ("done", "refused", "verdict", "preempted")):
        decision = Policy(100).decide(Cause(exit_class, kind, ""), 3)
        assert not decision.again and decision.code == exit_class.code


def test_the_same_failure_twice_in_a_row_stops_and_another_in_between_does_not() -> None:
    assert decided((SAME, 5), (SAME, 9)) == [True, False]
    assert decided((SAME, 5), (OTHER, 6), (SAME, 7)) == [True, True, True]


def test_a_rank_that_is_killed_from_outside_twice_at_one_step_is_not_the_same_failure() -> None:
    assert decided((KILLED, 7), (KILLED, 8)) == [True, True]
    crashed = killed(1, 11, 7, "a", no_memory=False)
    assert decided((crashed, 7), (crashed, 8)) == [True, False]


def test_hardware_that_fails_twice_at_a_step_is_not_the_same_failure_and_an_illegal_address_is() -> None:
    def device(code: int) -> Cause:
        found = device_error("", code)
        assert found is not None
        return fault("device", found.name, rank=1, step=7, fingerprint=device_fingerprint(found, 1, 7))

    assert decided((device(214), 7), (device(214), 8)) == [True, True]
    assert decided((device(700), 7), (device(700), 8)) == [True, False]
    assert decided((device(700), 7), (device(719), 8), (device(700), 9)) == [True, True, True]


def test_a_device_is_to_blame_before_what_followed_from_it_on_other_ranks() -> None:
    device = fault("device", "ECC", rank=5)
    aborted = killed(1, 6, 7, "a", False, "ProcessGroupNCCL.cpp:1515] Watchdog caught collective operation timeout: x")
    assert (aborted.kind, aborted.rank, aborted.fingerprint) == ("store", None, None)
    others = [aborted, killed(2, 6, 7, "b", no_memory=False), SAME, fault("hang", "", rank=3, beats=1)]
    for order in ([*others, device], [device, *others]):
        assert most_telling(order) is device
    assert killed(1, 6, 7, "a", False, "free(): invalid pointer, Broken pipe").kind == "signal"


def test_out_of_memory_is_tried_once_more_and_counts_anew_after_another_fault() -> None:
    assert decided((NO_MEMORY, 5), (NO_MEMORY, 9)) == [True, False]
    assert decided((NO_MEMORY, 5), (KILLED, 6), (NO_MEMORY, 9)) == [True, True, True]
    assert killed(1, 9, 7, "a", no_memory=True).kind == "oom" and killed(1, 11, 7, "a", no_memory=True).kind == "signal"


def test_attempts_that_begin_no_new_step_end_after_five_and_a_new_step_counts_anew() -> None:
    assert decided(*[(KILLED, 5)] * 7) == [True] * WITHOUT_PROGRESS + [False, False]
    assert decided(*[(KILLED, None)] * 6) == [True] * (WITHOUT_PROGRESS - 1) + [False, False]
    assert all(decided(*[(KILLED, step // 4) for step in range(40)]))


@given(
    st.lists(st.tuples(st.sampled_from([KILLED, SAME, OTHER, NO_MEMORY]), st.none() | st.integers(0, 4)), min_size=40),
    st.integers(0, 30),
)
def test_no_sequence_of_faults_is_restarted_beyond_its_number(
    faults: list[tuple[Cause, int | None]], most: int
) -> None:
    policy, restarts = Policy(most), 0
    for cause, step in faults:
        if not policy.decide(cause, step).again:
            break
        restarts += 1
    else:
        raise AssertionError("five steps and forty faults: it must end")
    assert restarts <= most


@given(st.integers(0, 5))
def test_a_policy_that_is_handed_over_decides_as_it_would_have(cut: int) -> None:
    faults = [(KILLED, 3), (SAME, 4), (NO_MEMORY, 4), (OTHER, 6), (OTHER, 6)]
    policy, decisions = Policy(9), []
    for number, (cause, step) in enumerate(faults):
        if number == cut:
            policy = Policy.from_dict(policy.to_dict())
        decisions.append(policy.decide(cause, step).again)
    assert decisions == decided(*faults, restarts=9)


def test_a_decision_survives_the_wire() -> None:
    decision = Policy(3).decide(fault("hang", "rank 1", rank=1, stacks=("a", "b"), beats=4, waiting=True), 2)
    assert Decision.from_dict(decision.to_dict()) == decision


def test_of_several_findings_the_one_that_blames_a_rank_counts_and_of_hangs_the_one_furthest_behind() -> None:
    lost = fault("unknown", "another rank is gone")
    assert most_telling([lost, KILLED]) is KILLED and most_telling([KILLED, lost]) is KILLED
    behind, waits = fault("hang", "a", rank=3, beats=8), fault("hang", "b", rank=0, beats=9)
    assert most_telling([waits, behind]) is behind
    alike = fault("hang", "c", rank=1, beats=8, waiting=True)
    assert most_telling([alike, behind]) is behind
    assert most_telling([lost, PREEMPTED]) is PREEMPTED
    assert {most_telling([fault(kind, "", rank=0)]).kind for kind in KINDS} == set(KINDS)
