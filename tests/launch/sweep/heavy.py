"""``trainers.no_op`` in a process that has imported all that training needs, as a real run's has."""

from __future__ import annotations

from importlib import import_module

from launch.sweep.server import LATE
from tests.launch.sweep.trainers import no_op

for module in LATE["pretrain.run"]:
    import_module(module)

__all__ = ["no_op"]
