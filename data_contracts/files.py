"""Contracts - files: replaced in one step, measured in bytes, and recognised as litter when their writer died.

A file is first written under a temporary name that holds its writer's host and process id, then renamed. So no reader
ever sees half a file, and `is_abandoned` recognises what a dead writer left behind, in any directory.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, overload

from data_contracts.errors import ArtifactError, ConfigError

TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-(?:(?P<host>.+)-)?(?P<pid>\d+)")
ABANDONED_ELSEWHERE_SECONDS = 86400.0
"""Age from which the temporary file of another host counts as abandoned: its processes cannot be seen from here."""
ABANDONED_WORK_SECONDS = 3600.0
"""Age from which the temporary directory of a dead process counts as abandoned: another machine may work in it."""

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ESTALE}
)
DISK_ADVICE = {
    errno.EROFS: "Mount it writable, or set SELFPLAY_STORE (or --store) to a directory you can write",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n 65536`)",
    errno.EIO: "Look at the disk (`dmesg`)",
}
FREE_SPACE_ADVICE = "Free some space (`selfplay gc --keep-runs 3 --dry-run` shows what can go)"

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def temporary_beside(path: Path) -> Path:
    """Return the name under which this process writes what becomes `path` by a rename; no other process uses it."""
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


def replaced_by(temporary: Path) -> str:
    """Return the name of the file that this temporary one was to replace; "" if `temporary_beside` did not name it."""
    match = TEMPORARY.fullmatch(temporary.name)
    return match["name"] if match else ""


@contextmanager
def open_atomic(path: Path) -> Generator[IO[bytes]]:
    """Open a file that replaces `path` in one step, on disk, when the block ends without an exception.

    A reader, or a crash, finds the old file or the new one. What a killed writer leaves is named by `temporary_beside`.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` in one step; what killed writers of it left beside it is deleted."""
    with open_atomic(path) as file:
        file.write(text.encode())
    remove_abandoned_beside(path)


def remove_abandoned_beside(path: Path) -> None:
    """Delete the temporary files that writers of `path` left when they were killed."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        if not is_directory(temporary) and is_abandoned(temporary):
            temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process on this machine (R, S, T ...), "" if there is none.

    A zombie counts as none: in many containers nobody ever reaps a killed process.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    if state in "ZX":
        return ""
    return state


def is_abandoned(path: Path) -> bool:
    """Return whether `path` is the temporary file or directory of a writer that died.

    A file of another host is judged by its age. A temporary directory is a piece of work that was requested of another
    machine: it is abandoned an hour after it was last changed if the process that requested it is dead; the directory
    of another host never is.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] not in (None, os.uname().nodename):
        return not is_directory(path) and _age(path) > ABANDONED_ELSEWHERE_SECONDS
    if process_state(int(match["pid"])):
        return False
    return not is_directory(path) or _age(path) > ABANDONED_WORK_SECONDS


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _age(path: Path) -> float:
    """Return the seconds since `path` was last changed; 0 if it is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0


@contextmanager
def disk_errors_explained(root: Path) -> Generator[None]:
    """Turn an error of the disk under the store `root` into one sentence with advice.

    Raises: ArtifactError in place of an OSError that the disk caused; every other OSError passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        advice = DISK_ADVICE.get(error.errno or 0, FREE_SPACE_ADVICE)
        raise ArtifactError(
            f"the store {root} cannot be written: {error.strerror} ({error.filename or 'while writing'}). "
            f"{advice}, then run again: finished shards are kept"
        ) from error


@overload
def bytes_from_environment(name: str, default: int) -> int: ...
@overload
def bytes_from_environment(name: str, default: None) -> int | None: ...
def bytes_from_environment(name: str, default: int | None) -> int | None:
    """Return the number of bytes that the environment variable `name` says (500000000, 500M, 2T), else `default`.

    Raises: ConfigError for a text that is no number of bytes.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{name} is {text!r}: it must be a number of bytes, e.g. 500G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def bytes_below(path: Path) -> int:
    """Return the bytes that a directory takes on disk. Files that vanish during the count are left out."""
    total = 0
    with suppress(OSError):
        for entry in os.scandir(path):
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += bytes_below(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def follow_umask(directory: Path) -> None:
    """Give the files of a directory the mode of new files; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` another name of the same bytes, or a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
