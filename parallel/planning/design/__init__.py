"""Hardware chooses the model: loss, training throughput and serving cost of shapes of models.
Not here: the layout of a given model (``search``).
Start with ``search.py``."""
