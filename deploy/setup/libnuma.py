"""Deploy - nothing -> .venv/lib/libnuma.so.1: the system library that vLLM needs and a bare Linux may lack.

Present on most machines, absent from minimal images; without it vLLM's CPU build starts and then finds none
of its kernels. Where it is missing, Debian's own build (20 kB, LGPL-2.1, needs nothing but glibc) is unpacked
into .venv, which takes no root, and a .pth line loads it at every start of that interpreter: the kernels look
for it by name and find it loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import platform
import tarfile
import urllib.request
from pathlib import Path

PACKAGES = (
    "",
    ""
    "pool/main/n/numactl/libnuma1_2.0.16-1_amd64.deb",
)
SHA256 = "639e1ab6bd66ead40db8a22c332d7199679fa22db261cac34444eb8eb4c17dda"
MEMBER = "./usr/lib/x86_64-linux-gnu/libnuma.so.1.0.0"
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
        if platform.machine() != "x86_64":
            raise SystemExit(ADVICE)
        library.write_bytes(unpack(download()))
    (site_packages / "selfplay_libnuma.pth").write_text(f"import ctypes; ctypes.CDLL({str(library)!r})\n")


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def download() -> bytes:
    for url in PACKAGES:
        try:
            package = urllib.request.urlopen(url, timeout=60).read()
        except OSError:
            continue
        if hashlib.sha256(package).hexdigest() == SHA256:
            return package
    raise SystemExit(ADVICE)


def unpack(package: bytes) -> bytes:
    """The library in a .deb, an `ar` archive: 8 bytes, then members padded to even length, each after
    a 60-byte header with the name in 0-15 and the size in 48-57."""
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].strip(b" /"), int(package[at + 48 : at + 58])
        if name == b"data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size])) as archive:
                return archive.extractfile(MEMBER).read()
        at += 60 + size + size % 2
    raise SystemExit(ADVICE)
