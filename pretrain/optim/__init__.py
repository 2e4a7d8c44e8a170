"""What updates weights: AdamW with parameter groups and masters, and the norm of the global gradient.
Not here: gradients themselves; nothing moves before the verdict says ``apply``.
Start with ``adamw.py``."""
