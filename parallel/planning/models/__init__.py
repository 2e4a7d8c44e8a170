"""Models from plain numbers: operations, mixers, and what published names mean.
Not here: a model of ours (`pretrain/workload.py` maps those), or what anything costs in seconds.
Start with ``operations.py``."""
