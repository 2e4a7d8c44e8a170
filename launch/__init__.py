"""How a run is started, watched and restarted, and the ``stoker`` command.
Not here: anything another room needs; launch imports all and nobody imports launch.
Start with ``cli.py``."""
