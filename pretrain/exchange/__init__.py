"""Checkpoints of other libraries: transformers' qwen3_next and kimi_linear, read and written without transformers.
Not here: Stoker's own checkpoints (``pretrain/checkpoint``), tokenizers, and any file that runs code when loaded.
Start with ``hf.py``; a family's module says what is which on either side, ``folder.py`` is the files on disk."""
