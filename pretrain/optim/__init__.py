"""What a step changes: AdamW with parameter groups, schedules, gradient norm and clipping, the verdict.
Not here: gradients themselves; nothing moves before the verdict says ``apply``.
Start with ``adamw.py``."""
