"""Build the libraries and print how they came out."""

from __future__ import annotations

import argparse
import sys

from kernels.toolchain.libraries import build_all
from kernels.toolchain.report import table
from kernels.toolchain.sources import best_isa, known_isas
from kernels.toolchain.tools import ARCHITECTURES
from stoker.errors import Refusal


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 if refused, or if a library that --arch names cannot be had; with --check 1 if a kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m kernels.toolchain", description=__doc__)
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES), help="may be repeated; all by default")
    parser.add_argument(
        "--isa",
        action="append",
        choices=known_isas(),
        help="may be repeated, for other machines that share the cache; this processor's best by default",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="every --isa by default, and fail on local memory in a loop and on what ptxas warns of",
    )
    options = parser.parse_args(arguments)
    isas = options.isa or (known_isas() if options.check else [best_isa()])
    try:
        reports = build_all(options.arch or tuple(ARCHITECTURES), isas)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(table(reports))
    if options.arch and any(report.library is None for report in reports if report.target in options.arch):
        return 2
    return 1 if options.check and any(report.failures for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
