"""What a step holds on each pipeline rank, as an estimate and an upper bound.
Not here: time.
Start with ``prediction.py``."""
