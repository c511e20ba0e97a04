"""python -m benchmarks.error_paths [--keep DIRECTORY] [-- PYTEST ARGUMENTS]: how much of what raises or handles an error do the tests run?

Runs the test suite under coverage.py, with every process that it starts, and prints for data_contracts/ and tasks/ the share of error paths that were
run and the place of each that was not. An error path is a `raise`, or a statement in an `except` block. What a killed process ran is not known, so
the figure is at worst too low.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_contracts", "tasks")
SETTINGS = """
[run]
source = {rooms}
data_file = {directory}/coverage
parallel = true
patch = subprocess
sigterm = true
"""


def error_paths(source: str) -> list[int]:
    """The first line of every `raise`, and of every statement in an `except` block."""
    nodes = list(ast.walk(ast.parse(source)))
    handled = [inner for node in nodes if isinstance(node, ast.ExceptHandler) for inner in ast.walk(node)]
    raised = [node for node in nodes if isinstance(node, ast.Raise)]
    return sorted({statement.lineno for statement in raised + handled if isinstance(statement, ast.stmt)})


def report(executed: dict[str, set[int]]) -> str:
    """A line per error path that was not run, and the share of those that were, room by room."""
    lines, totals = [], []
    for room in ROOMS:
        count = run = 0
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            source = path.read_text(encoding="utf-8")
            numbers = error_paths(source)
            missed = [number for number in numbers if number not in executed.get(name, ())]
            lines += [f"{name}:{number}: {source.splitlines()[number - 1].strip()}" for number in missed]
            count, run = count + len(numbers), run + len(numbers) - len(missed)
        totals.append((room, run, count))
    totals.append(("together", sum(run for _, run, _ in totals), sum(count for _, _, count in totals)))
    return "\n".join(
        ["not run:", *lines, ""] + [f"{room}: {run} of {count} ({run / count:.1%})" for room, run, count in totals]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep coverage's files here, to add a second run to them")
    parser.add_argument("pytest", nargs="*", help="what to give pytest (default: -n 2 --dist loadfile)")
    options = parser.parse_args(arguments)
    directory = (options.keep or Path(tempfile.mkdtemp(prefix="error-paths-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        settings = directory / "coveragerc"
        settings.write_text(SETTINGS.format(rooms=",".join(ROOMS), directory=directory), encoding="utf-8")
        coverage = [sys.executable, "-m", "coverage"]
        words = options.pytest or ["-n", "2", "--dist", "loadfile"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        tests = subprocess.run(
            [*coverage, "run", f"--rcfile={settings}", "-m", "pytest", *words], cwd=ROOT, env=environment, check=False
        )
        for words in (["combine", "--append", "-q"], ["json", "-q", "-o", str(directory / "lines.json")]):
            subprocess.run([*coverage, *words, f"--rcfile={settings}"], cwd=ROOT, check=True)
        files = json.loads((directory / "lines.json").read_text(encoding="utf-8"))["files"]
        print(report({name: set(found["executed_lines"]) for name, found in files.items()}))
        return tests.returncode
    finally:
        if options.keep is None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
