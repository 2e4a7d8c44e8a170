"""What stands between a mixer's core and its output projection: RMSNorm per head, times an activated gate.
Not here: norms of the residual stream, and the projections around it.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
