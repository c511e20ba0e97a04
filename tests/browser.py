"""A page in a real browser: headless Chromium, which reaches nothing but the address that it is given."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1500,1600",
)


class Visit(NamedTuple):
    """What a browser made of a page."""

    dom: str
    """The document as HTML, after its scripts."""
    log: str
    """With CONSOLE in the lines that the page itself caused."""


def chromium() -> str:
    """Return the path of Chromium. Skips without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for path in map(shutil.which, names) if path is not None), None)
    if browser is None:
        pytest.skip("no chromium to open the page with")
    return browser


def visit(address: str, home: Path, wait: int = 3000) -> Visit:
    """Open an address and return its document. wait: ms of the page's own clock that its scripts get. Skips without Chromium."""
    command = [chromium(), *OPTIONS, f"--virtual-time-budget={wait}", f"--user-data-dir={home}", "--dump-dom", address]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=True, env=os.environ | {"HOME": str(home)}
    )
    return Visit(done.stdout, done.stderr)
