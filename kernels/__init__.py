"""Operators of the backbone, one folder each: ``reference.py`` defines, ``chunked.py`` or ``cuda/`` runs it.
Not here: ranks, layers or parameters; an operator sees packed tensors and ``cu_seqlens`` only.
Start with ``gated_delta/reference.py``, then its ``op.py``."""
