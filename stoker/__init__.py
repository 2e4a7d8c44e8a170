"""The foundation every room stands on: refusals, atomic files, canonical JSON, hashing, masking, progress, guard.
Not here: torch, or anything that knows what a model, a rank or a token is; a closed list under 600 lines in all.
Start with ``errors.py`` and ``files.py``."""
