"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per key channel, over packed sequences.
Only this operator lives here: no model code, no convolution, no norms.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
