"""What may stand before a document of code: a template such as ``"# {repository}/{path}\\n"``."""

from __future__ import annotations

import string

from stoker.errors import Refusal

#: What a header may name.
FIELDS = ("repository", "path", "language")


def check_header(header: str) -> None:
    """Refuse a template that names anything but `FIELDS`, or says how it is to be formatted."""
    try:
        parsed = [part for part in string.Formatter().parse(header) if part[1] is not None]
    except ValueError as error:
        raise Refusal(f"order.header: {header!r} is no template ({error}); write {{{{ for a brace") from None
    for _, name, spec, conversion in parsed:
        if name not in FIELDS or spec or conversion:
            written = f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
            raise Refusal(
                f"order.header: {header!r} has {{{written}}}; it may name {', '.join(FIELDS)} in braces, nothing else "
                "(write {{ for a brace)"
            )
