"""Licences as SPDX expressions: from any wording, from texts, headers and packages, and what a policy says of them.
Not here: which licences a corpus takes; that is the policy of ``dataio/filters/licence.py``.
Start with ``expressions.py``, then ``files.py``; ``texts.json`` is made by ``texts.table``.

In doubt an expression says more than holds, never less: of several statements all apply (AND) unless they are plainly
alternatives, and what cannot be told is None.
"""

from __future__ import annotations

from dataio.licences.expressions import PERMISSIVE, permissive
from dataio.licences.files import is_licence_file, is_package_metadata, of_files
from dataio.licences.headers import stated
from dataio.licences.texts import identify
from dataio.licences.wordings import normalise

__all__ = [
    "PERMISSIVE",
    "identify",
    "is_licence_file",
    "is_package_metadata",
    "normalise",
    "of_files",
    "permissive",
    "stated",
]
