"""Print the table; ``--quick`` and ``--device`` choose how much of it."""

from __future__ import annotations

import argparse

from kernels.bench import run, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="on a GPU: the targets first, within four minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    arguments = parser.parse_args()
    print(table(run(quick=arguments.quick, device=arguments.device)))


if __name__ == "__main__":
    main()
