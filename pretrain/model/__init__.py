"""A ``ModelSpec`` as Megatron-core modules: embedding, mixers, feed-forwards, router, head.
Not here: loss, optimizer, or a question about which back end or axis is active.
Start with ``model.py``, beside ``pretrain/spec.py`` (the mathematics)."""
