"""Operators of the backbone, a folder each: ``reference.py`` defines, ``chunked.py`` and ``cuda/`` run, ``op.py`` calls.
Not here: ranks, layers or parameters; an operator sees packed tensors and ``cu_seqlens`` only.
Start with ``gated_delta/reference.py``, then its ``op.py``."""
