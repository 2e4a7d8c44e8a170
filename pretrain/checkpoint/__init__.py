"""A checkpoint that is complete and verified, or not there: save by every rank, load under any layout.
Not here: pickle, or knowledge of models; a tensor is a global name, a ``Layout`` and bytes.
Start with ``store.py``, then ``manifest.py`` (the format on disk)."""
