"""Numeric guards: what notices numbers that are wrong, says which rank and tensor, and goes back before them.
No decision that differs between ranks, and no knowledge of sinks or of the loop; nothing here steps the optimizer.
Start with ``spikes.py`` (when), ``recompute.py`` (is it true) and ``rewind.py`` (what then)."""
