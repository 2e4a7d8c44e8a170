"""The next token, or the next few, of many sequences under the delta rules (gated delta and KDA), state in place.
Only the recurrent step lives here: no convolution, no sampling, no gradient.
Start with ``reference.py``, the definition; ``op.py`` holds the function that models call."""
