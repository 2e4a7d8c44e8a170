"""Starts the ranks of a node, watches them, and starts them again after a fault: one agent a node.
It imports no torch (``worker`` does, in the ranks' own processes), and trains nothing.
Start at ``agent.py``; what is decided after a fault is in ``policy.py``, what was found in ``causes.py``."""
