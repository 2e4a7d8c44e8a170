"""Raw corpora as they come, to document files: listing, readers of each format, repositories, quarantine.
Not here: judging a text (filters), changing one beyond what reading it means, or writing anything but a unit's files.
Start with ``source.py`` (what a source is, how it is cut into units, how one is read), then ``jsonl.py``."""
