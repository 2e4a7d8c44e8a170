"""The run itself: model, objective, step, optimizer, checkpoint, evaluation, run directory and report.
Not here: how a run is launched, and how text became tokens.
Start with ``loop.py``: one screen that shows a step, in order."""
