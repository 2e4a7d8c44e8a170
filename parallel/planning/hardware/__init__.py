"""Machines: the presets with their sources, links and collectives, and the machine one is on.
Not here: what software makes of them (``timing/calibration.py``).
Start with a preset, such as ``gb200-nvl72.yaml``; its types are in ``topology.py``, a level up."""
