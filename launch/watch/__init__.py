"""How a run is watched: its status, its logs, a page, figures for Prometheus, and a webhook.
Not here: anything that writes to a run directory, torch, or what would slow a run down.
Start with ``observe.py`` (what is read of a run), then ``page.py``."""
