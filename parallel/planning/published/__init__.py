"""Training runs that others published, read as the planner's own types.
Not here: predictions; no module reads what a run measured but to compare.
Start with ``runs.py``; the table is ``published_training_runs.csv``."""
