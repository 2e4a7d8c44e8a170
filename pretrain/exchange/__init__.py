"""Checkpoints of other libraries: Hugging Face transformers' qwen3_next, read and written without transformers.
Not here: Stoker's own checkpoints (``pretrain/checkpoint``), tokenizers, and any file that runs code when loaded.
Start with ``hf.py``; ``hf_config.py`` says which models both sides can state, ``folder.py`` is the files on disk."""
