"""What a document is like and whether it stays: one module for each kind of evidence, values first, judgement after.
Measured values are attributes beside the documents; nothing here removes a document or rewrites a text.
Start with rules.py: how values are written and how a threshold becomes a reason."""
