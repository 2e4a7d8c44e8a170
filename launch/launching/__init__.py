"""A run on machines that a scheduler lends: what Slurm or Kubernetes is asked for, and what it starts on each node.
Not here: watching ranks, restarts, or a scheduler of our own (supervise, Slurm and Kubernetes do these).
Start with ``job.py``, then ``slurm.py`` and ``node.py``."""
