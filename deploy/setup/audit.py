"""Deploy - deploy/locks/*.txt -> which of the pinned versions have known vulnerabilities, and which versions mend them.

pip-audit, pinned, in an environment of its own (.venv-audit): .venv is neither needed nor changed. Bounded in time: an index or a service that
does not answer costs two minutes at most. Standard library only. Exit codes: 0 none is known, 1 some are, 75 nobody could be asked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from setup_venv import LOCKS, ROOT, as_lines, bundled_pip, read_pins

VENV = ROOT / ".venv-audit"
TOOL = "pip-audit==2.10.1"
SECONDS = 120.0


def main() -> int:
    deadline = time.monotonic() + SECONDS
    try:
        answers = ask(provide(deadline), deadline)
    except (OSError, ValueError) as error:
        print(f"audit: not done: {error}")
        return 75
    except subprocess.TimeoutExpired:
        print(f"audit: not done: no answer within {SECONDS:.0f} s")
        return 75
    lines = [line for answer in answers for line in findings(answer)]
    unknown = sum("skip_reason" in answer for answer in answers)
    print(
        f"audit: {len(answers)} pinned versions, {len(lines)} known vulnerabilities"
        + (f"; nothing is known of {unknown}" if unknown else "")
    )
    print("".join(f"  {line}\n" for line in lines), end="", flush=True)
    return 1 if lines else 0


def provide(deadline: float) -> Path:
    """The interpreter that has the tool."""
    python, done = VENV / "bin" / "python", VENV / TOOL
    if not done.is_file():
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, symlinks=True, with_pip=False)
        install = ["install", "--quiet", "--retries", "1", "--timeout", "15", "--only-binary", ":all:", TOOL]
        _run(
            [str(python), "-m", "pip", *install],
            deadline,
            PYTHONPATH=str(bundled_pip()),
            PIP_USER="0",
            PIP_REQUIRE_VIRTUALENV="0",
        )
        done.touch()
    return python


def ask(python: Path, deadline: float) -> list[dict[str, Any]]:
    """What the index knows of each pinned version, once: {name, version, vulns} or {name, skip_reason}. Raises: OSError if it knows of none."""
    with tempfile.TemporaryDirectory(prefix="audit-") as work:
        options = [
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--desc",
            "off",
            "--progress-spinner",
            "off",
            "--timeout",
            "15",
        ]
        answers, path = [], Path(work) / "pins.txt"
        for pins in requests():
            path.write_text(as_lines(pins))
            command = [str(python), "-m", "pip_audit", *options, "--cache-dir", work, "--requirement", str(path)]
            answers += json.loads(_run(command, deadline, allowed=(0, 1)))["dependencies"]
    if all("skip_reason" in answer for answer in answers):
        raise OSError(f"the index tells vulnerabilities of none of {len(answers)} pinned versions")
    return answers


def requests() -> list[dict[str, str]]:
    """Every pinned version once; a second one of a package is a second request, pip-audit takes no two in one."""
    found: list[dict[str, str]] = []
    for lock in sorted(LOCKS.glob("*.txt")):
        for name, version in read_pins(lock).items():
            version = version.partition("+")[0]  # +cpu is a build; no service knows it
            if not any(pins.get(name) == version for pins in found):
                free = next((pins for pins in found if name not in pins), None)
                if free is None:
                    found.append(free := {})
                free[name] = version
    return found


def findings(answer: dict[str, Any]) -> list[str]:
    """A line per vulnerability."""
    return [
        f"{answer['name']} {answer['version']}: {' '.join([found['id'], *found['aliases']])}, "
        + (f"fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "no version mends it")
        for found in answer.get("vulns", [])
    ]


def _run(command: list[str], deadline: float, allowed: tuple[int, ...] = (0,), **environment: str) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | environment, check=False,
        timeout=max(1.0, deadline - time.monotonic()),
    )  # fmt: skip
    if done.returncode not in allowed or (1 in allowed and not done.stdout.strip()):
        raise OSError(
            (done.stderr.strip().splitlines() or [f"{command[2]} ended with {done.returncode}"])[-1].removeprefix(
                "ERROR:pip_audit._cli:"
            )[:300]
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
