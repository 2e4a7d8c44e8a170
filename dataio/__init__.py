"""From text to tokens: documents, tokenizer, token stores, order, blend and the ``TokenStream`` a trainer reads.
Not here: torch, ranks or process groups; a reader knows only which ``Part`` of a global batch is its own.
Start with ``stream.py`` (the interface), then ``store.py`` (what lies on disk)."""
