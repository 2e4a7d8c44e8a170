"""``make faults``: plays the fault matrix and writes docs/fault-matrix.md. Wants a machine that does nothing else.

    python -m tests.faults [--rows 1,2] [--runs 3] [--quick] [--no-tests] [--out docs/fault-matrix.md]

Exit code 1 where an oracle does not hold, a target is missed, or a test that a row names fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.matrix import ROWS, Case, Row, lacking
from tests.faults.page import Played, Tested, page
from tests.house.sources import HOME


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--rows", help="numbers, comma between; without it all, and the page is written")
    parser.add_argument(
        "--runs", type=int, default=3, help="of each case that has a target in seconds; others play once"
    )
    parser.add_argument("--quick", action="store_true", help="the cases of `make test` only")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests that rows name")
    parser.add_argument("--out", type=Path, help="where the page goes")
    options = parser.parse_args(arguments)
    chosen = {int(number) for number in options.rows.split(",")} if options.rows else {row.number for row in ROWS}
    rows = [row for row in ROWS if row.number in chosen]
    with tempfile.TemporaryDirectory(prefix="stoker-faults-") as folder:
        bench = Bench(Path(folder))
        played = [
            play(bench, row, case, options.runs if case.target else 1)
            for row in rows
            for case in row.cases
            if case.quick or not options.quick
        ]
    tested = {} if options.no_tests else {row.number: run_tests(row) for row in rows if row.tests}
    whole = not (options.rows or options.quick)
    out = options.out or (HOME / "docs/fault-matrix.md" if whole else None)
    text = page(" ".join(["python -m tests.faults", *arguments]), played, tested, rows)
    if out is None:
        print(text)
    else:
        out.write_text(text)
        print(out)
    return int(any(each.bad for each in played) or any(found.failed for found in tested.values()))


def play(bench: Bench, row: Row, case: Case, runs: int) -> Played:
    """A case, ``runs`` times."""
    found = Played(row, case, skipped=lacking(case))
    for _ in range(0 if found.skipped else runs):
        try:
            found.outcomes.append(case.play(bench))
        except Exception as error:  # the other rows are to be tried all the same
            traceback.print_exc()
            found.errors.append(f"{type(error).__name__}: {error}"[:1000])
    print(f"row {row.number}, {case.name}: {found.result}", flush=True)
    return found


def run_tests(row: Row) -> Tested:
    """The tests that a row names, long ones included."""
    found = [ran(path) for path in row.tests]
    skipped = [reason for each in found for reason in each.skipped]
    return Tested(row.tests, sum(each.passed for each in found), sum(each.failed for each in found), skipped)


@cache
def ran(path: str) -> Tested:
    """A file or folder of tests that rows name, once."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", path]
        done = subprocess.run(argv, cwd=HOME, capture_output=True, text=True)
        if not report.exists():
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
            return Tested([path], 0, 1, ())
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
    skipped = [node.get("message", "") for case in cases for node in case.findall("skipped")]
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    print(f"{path}: {len(bad)} failed of {len(cases)}", *bad, flush=True)
    return Tested([path], len(cases) - len(bad) - len(skipped), len(bad), skipped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
