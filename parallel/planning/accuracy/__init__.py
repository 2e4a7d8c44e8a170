"""Predictions beside published runs, also by constants that have not seen them.
Not here: the models that predict.
Start with ``evaluate.py``; ``held_out.py`` makes docs/planner-accuracy.md."""
