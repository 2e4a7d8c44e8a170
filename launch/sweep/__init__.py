"""Many runs from one file: a grid or a list of overrides becomes numbered run directories, run by a pool, Slurm or Ray.
What one run does does not live here (``pretrain``), nor how it is started on several nodes (``launch.launching``).
Start at ``definition.py`` (the file), then ``ledger.py`` (the folder) and ``scheduler.py`` (what runs when)."""
