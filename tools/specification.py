"""Checks SPECIFICATION.md: every promise names a test that exists, and (with --results) that ran and passed.

A holder is written in backticks in the last column of a table row:
`tests/...::test_name` (pytest), `rust:crate::test_name` (cargo), `make target` or `.ci/run: step` (CI's own).
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOLDER = re.compile(r"`([^`]+)`")


def rows(text: str) -> list[tuple[str, list[str]]]:
    """(promise, holders) of every table row that is not a header or a rule."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) >= 2 and set(cells[0]) - set("-: ") and cells[-1] != "Held by":
            found.append((cells[-2], HOLDER.findall(cells[-1])))
    return found


def exists(holder: str) -> bool:
    """Whether the test, crate test, make target or CI step that `holder` names is in the tree."""
    if holder.startswith("tests/"):
        path, _, name = holder.partition("::")
        name = name.split("[")[0].rpartition("::")[2]
        file = ROOT / path
        return file.is_file() and (
            not name or re.search(rf"def {re.escape(name)}\(", file.read_text()) is not None
        )
    if holder.startswith("rust:"):
        crate, _, name = holder.removeprefix("rust:").partition("::")
        sources = (ROOT / "native" / crate).rglob("*.rs")
        return any(re.search(rf"fn {re.escape(name)}\(", source.read_text()) for source in sources)
    if holder.startswith("make "):
        return (
            re.search(rf"^{re.escape(holder.removeprefix('make '))}:", (ROOT / "Makefile").read_text(), re.M)
            is not None
        )
    if holder.startswith(".ci/run: "):
        return holder.removeprefix(".ci/run: ") in (ROOT / ".ci/run").read_text()
    return False


def passed(results: Iterable[Path]) -> set[str]:
    """`tests/...::name` of every test in pytest's JUnit files that ran and passed in all its variants."""
    good: set[str] = set()
    bad: set[str] = set()
    for case in (case for file in results for case in ElementTree.parse(file).getroot().iter("testcase")):
        module = case.get("classname", "").split(".")
        while module and not (ROOT / Path(*module).with_suffix(".py")).is_file():
            module.pop()
        if not module:
            continue
        name = f"{Path(*module).with_suffix('.py')}::{case.get('name', '').split('[')[0]}"
        failed = any(child.tag in {"failure", "error"} for child in case)
        skipped = any(child.tag == "skipped" for child in case)
        if failed:
            bad.add(name)
        elif not skipped:
            good.add(name)
    return good - bad


def main() -> int:
    """Prints what is wrong; 0 when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--names", action="store_true", help="check that every holder exists (the default)")
    parser.add_argument(
        "--results", type=Path, nargs="+", help="pytest's JUnit files: every pytest holder must have passed"
    )
    options = parser.parse_args()
    promises = rows((ROOT / "SPECIFICATION.md").read_text())
    problems = []
    if not promises:
        problems.append("SPECIFICATION.md holds no promise: it needs tables of `promise | held by`")
    for promise, holders in promises:
        if not holders:
            problems.append(f"nothing holds: {promise}")
        for holder in holders:
            if not exists(holder):
                problems.append(f"{holder} does not exist, but holds: {promise}")
    if options.results:
        good = passed(options.results)
        files = {name.partition("::")[0] for name in good}
        for promise, holders in promises:
            for holder in holders:
                name = "::".join((holder.partition("::")[0], holder.split("[")[0].rpartition("::")[2]))
                ran = name in good if "::" in holder else holder in files
                if holder.startswith("tests/") and not ran:
                    problems.append(f"{holder} did not run and pass, but holds: {promise}")
    for problem in problems:
        print(f"SPECIFICATION.md: {problem}", file=sys.stderr)
    print(f"SPECIFICATION.md: {len(promises)} promises, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
