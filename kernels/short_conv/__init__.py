"""Short causal depthwise convolution with SiLU over packed sequences.
Only this operator lives here: it knows segments, not heads or layers.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
