"""Benchmark - error paths: how much of what raises or handles an error do the tests run?

    python -m benchmarks.error_paths [--keep DIRECTORY] [-- PYTEST ARGUMENTS]
    python -m benchmarks.error_paths --smoke

Runs the test suite under coverage.py, with every process that it starts. Prints the error paths of data_contracts/ and
tasks/ that were not run, and the share that was. An error path is a `raise`, or a statement in an `except` block.
Coverage of a killed process is lost, so the share is at worst too low. `--smoke` runs one small test file.
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

from benchmarks._smoke import add_smoke

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_contracts", "tasks")
WHOLE_SUITE = ["-n", "2", "--dist", "loadfile"]
SMOKE = ["-q", "-p", "no:cacheprovider", "tests/data_contracts/test_identity.py"]
SETTINGS = """
[run]
source = {rooms}
data_file = {directory}/coverage
parallel = true
patch = subprocess
sigterm = true
"""


def error_paths(source: str) -> list[int]:
    """Line numbers of every `raise`, and of every statement in an `except` block."""
    nodes = list(ast.walk(ast.parse(source)))
    handled = [inner for node in nodes if isinstance(node, ast.ExceptHandler) for inner in ast.walk(node)]
    raised = [node for node in nodes if isinstance(node, ast.Raise)]
    return sorted({statement.lineno for statement in raised + handled if isinstance(statement, ast.stmt)})


def report(executed: dict[str, set[int]]) -> str:
    """A line per error path that was not run, then the share of those that were, per package.

    executed: the lines that were run, by file name relative to the checkout.
    """
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
    shares = [f"{room}: {run} of {count} ({run / count:.1%})" for room, run, count in totals]
    return "\n".join(["not run:", *lines, "", *shares])


def measure(directory: Path, pytest_arguments: list[str]) -> tuple[int, dict[str, set[int]]]:
    """pytest's exit code, and the lines that it ran by file name; coverage's files go to `directory`."""
    settings = directory / "coveragerc"
    settings.write_text(SETTINGS.format(rooms=",".join(ROOMS), directory=directory), encoding="utf-8")
    coverage = [sys.executable, "-m", "coverage"]
    command = [*coverage, "run", f"--rcfile={settings}", "-m", "pytest", *pytest_arguments]
    tests = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    result = directory / "lines.json"
    for words in (["combine", "--append", "-q"], ["json", "-q", "-o", str(result)]):
        subprocess.run([*coverage, *words, f"--rcfile={settings}"], cwd=ROOT, check=True)
    files = json.loads(result.read_text(encoding="utf-8"))["files"]
    return tests.returncode, {name: set(file["executed_lines"]) for name, file in files.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.error_paths")
    parser.add_argument("--keep", type=Path, help="keep coverage's files here, to add a second run to them")
    parser.add_argument("pytest", nargs="*", help=f"arguments for pytest (default: {' '.join(WHOLE_SUITE)})")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    pytest_arguments = options.pytest or WHOLE_SUITE
    if options.smoke:
        pytest_arguments = SMOKE
    directory = (options.keep or Path(tempfile.mkdtemp(prefix="error-paths-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        code, executed = measure(directory, pytest_arguments)
        print(report(executed))
        return code
    finally:
        if options.keep is None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
