"""A plan as pictures: SVG whose shapes carry classes only, and what a reader needs beside it.
Not here: colours and pages, which belong to whoever shows the pictures.
Start with ``shapes.py`` (what a picture is), then ``rack.py``."""
