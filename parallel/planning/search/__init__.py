"""Which layout to run, and why the others are worse.
Not here: how long or how large a layout is (``timing``, ``memory``).
Start with ``planner.py``."""
