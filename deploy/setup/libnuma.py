"""Deploy - nothing -> .venv/lib/libnuma.so.1: the system library that vLLM needs and a bare Linux may lack.

Present on most machines, absent from minimal images; without it vLLM's CPU build starts and then finds none of its kernels. Where it is
missing and apt is there, the distribution's own package (20 kB) is fetched and unpacked into .venv, which takes no root, and a .pth line
loads it at every start of that interpreter: the kernels look for it by name and find it loaded.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

ADVICE = (
    "set-up: libnuma.so.1 is missing and could not be fetched; vLLM cannot run on a CPU without it.\n"
    "  Install it and run make again:\n"
    "  Debian, Ubuntu: apt-get install libnuma1    Fedora, RHEL: dnf install numactl-libs"
)


def provide(venv: Path, site_packages: Path) -> None:
    """Make libnuma.so.1 loadable in `venv`, or end with the command that installs it."""
    if loads("libnuma.so.1"):
        return
    library = venv / "lib" / "libnuma.so.1"
    if not loads(str(library)):
        fetch(library)
    (site_packages / "selfplay_libnuma.pth").write_text(f"import ctypes; ctypes.CDLL({str(library)!r})\n")


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def fetch(library: Path) -> None:
    """Download the package as this machine's apt is set up, and take the library out of it."""
    with tempfile.TemporaryDirectory() as folder:
        for command in (["apt-get", "download", "libnuma1"], ["sh", "-c", "dpkg-deb -x libnuma1_*.deb ."]):
            try:
                done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            except OSError as error:
                raise SystemExit(ADVICE) from error
            if done.returncode:
                raise SystemExit(ADVICE)
        found = sorted(Path(folder).rglob("libnuma.so.1.*"))
        if not found:
            raise SystemExit(ADVICE)
        shutil.copyfile(found[0], library)
