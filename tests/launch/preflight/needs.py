"""What a small run asks of a host, to be made larger by a test."""

from __future__ import annotations

from launch.preflight.need import Need

GB = 10**9


def need(**given: float) -> Need:
    """Two ranks on one host, with state and checkpoints of a few megabytes."""
    asked = {
        "ranks": 2,
        "world": 2,
        "checkpoint_bytes": 10**7,
        "checkpoints": 3,
        "state_bytes": 1e7,
        "peak_bytes": 2e7,
        "grace_s": 60.0,
    }
    return Need(**asked | given)  # type: ignore[arg-type]
