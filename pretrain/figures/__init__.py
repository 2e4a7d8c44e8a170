"""The fragments of a run's report, which ``pretrain/report.py`` assembles: curves, pictures and tables as markup trees.
Not here: torch, scripts or anything that a browser would fetch.
Start with ``record.py`` (what is read of a run), then ``curves.py``."""
