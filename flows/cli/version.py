"""Flows - which program this is: its version and, in a checkout, its commit."""

from __future__ import annotations

import subprocess
import tomllib
from importlib import metadata

from data_contracts.installation import ROOT

PROJECT = ROOT / "pyproject.toml"
"""There in a checkout, which need not be installed."""
DISTRIBUTION = "selfplay-pipeline"


def version() -> str:
    """Return the name and version of this program, with the commit of the checkout that it runs from."""
    if PROJECT.is_file():
        number = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
    else:
        number = metadata.version(DISTRIBUTION)
    text = f"{DISTRIBUTION} {number}"
    if commit := _commit():
        text += f", commit {commit}"
    return text


def _commit() -> str:
    """The commit of this checkout, marked if files were changed since; "" where there is none."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, changed since", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
