"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464) over packed sequences.
Only this operator lives here: no model code, no convolution, no norms.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
