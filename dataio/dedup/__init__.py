"""What a corpus holds twice: exact copies, near-duplicates, repeated passages, and what evaluation sets hold too.
Findings are attributes beside the documents; nothing here removes a document or rewrites a text.
Start with sketch.py: the estimate of Jaccard similarity that near-duplicates are found by."""
