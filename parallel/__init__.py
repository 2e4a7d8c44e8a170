"""How a run is cut over ranks: ``planning`` decides without torch, ``engine`` runs what was decided.
Not here: what a model is (planning sees only a ``Workload``) and how tokens are read.
Start with ``planning/plan.py``."""
