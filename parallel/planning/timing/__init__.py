"""How long a step takes: ideal work, the constants between it and reality, the critical path.
Not here: which layout to take (``search``).
Start with ``step_time.py``."""
