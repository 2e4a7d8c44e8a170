"""Looking at prepared data: documents with their tokens, why they were kept, and where each came from.
Not here: anything that changes a file. Whatever a text holds, a terminal or a browser must only ever show it.
Start with ``viewer.py`` (what is known of a document), then ``terminal.py`` and ``page.py`` (how it is shown)."""
