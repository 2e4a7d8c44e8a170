"""A ``ModelSpec`` as torch modules under a plan: embedding, mixers, feed-forwards, router, head.
Not here: the objective, optimizer, or a question about which back end or axis is active.
Start with ``chunk.py``, beside ``pretrain/spec.py`` (the mathematics)."""
