"""What stands between a mixer's projections and its core: short convolution, SiLU, unit length of q and k, gates.
Not here: the projections themselves and the core; the operator knows segments and heads, not layers.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
