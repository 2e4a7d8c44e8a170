"""How each rank is doing: its last heartbeat, what the guards said of it, and who is to blame for the last end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.watch.record import AttemptStatus, Health, RankStatus, State
from parallel.planning.plan import ParallelPlan

#: Phases that repeat every step; the others may take long.
QUICK = ("read", "compute", "record")
#: Seconds without a beat from which a rank is quiet: in a quick phase at least so long, in the others so long.
QUIET_S, QUIET_SLOW_PHASE_S = 3.0, 120.0
#: Steps that a quick phase may take before the rank is quiet.
QUIET_STEPS = 3.0


def slow_ranks(
    guards: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], attempt: int | None
) -> list[int]:
    """Ranks that the newest attempt named as slow, and has not taken back."""
    slow: set[int] = set()
    for entry, kind in [*((e, e.get("kind")) for e in guards), *((e, e.get("event")) for e in events)]:
        rank = entry.get("rank")
        if not isinstance(rank, int) or entry.get("attempt", attempt) != attempt:
            continue
        if kind == "slow":
            slow.add(rank)
        elif kind == "slow_over":
            slow.discard(rank)
    return sorted(slow)


def rank_statuses(
    beats: Mapping[str, Any] | None,
    plan: ParallelPlan | None,
    slow: Sequence[int],
    ended: AttemptStatus | None,
    step_time_s: float | None,
    state: State,
) -> list[RankStatus]:
    """In order of rank. Without heartbeats there are as many as the plan has, and little is known of them. ``ended``:
    the newest attempt, if it ended badly."""
    guilty = ended.rank if ended is not None else None
    entries = beats.get("ranks") if beats is not None else None
    if not isinstance(entries, list):
        entries = [{"rank": rank} for rank in range(plan.world_size)] if plan is not None else []
    limit = max(QUIET_S, QUIET_STEPS * (step_time_s or 0.0))
    is_slow = set(slow)
    found = [_status(entry, guilty, is_slow, limit, state) for entry in entries if isinstance(entry, dict)]
    return sorted(found, key=lambda status: status.rank)


def _status(entry: Mapping[str, Any], guilty: int | None, slow: set[int], limit: float, state: State) -> RankStatus:
    rank, age = int(entry["rank"]), entry.get("age_s")
    phase = entry.get("phase")
    if rank == guilty:
        health = Health.GUILTY
    elif not state.is_under_way:
        health = Health.UNKNOWN
    elif entry.get("alive") is False:
        health = Health.GONE
    elif rank in slow:
        health = Health.SLOW
    elif age is None:
        health = Health.UNKNOWN
    elif age > (limit if phase in QUICK else QUIET_SLOW_PHASE_S):
        health = Health.QUIET
    else:
        health = Health.WELL
    return RankStatus(
        rank, entry.get("node"), phase, entry.get("step"), age, entry.get("busy_s"), entry.get("rss_bytes"), health
    )
