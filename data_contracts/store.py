"""Contracts - the content-addressed store: where artifacts live, how they are found, signed, explained and verified.

    <root>/artifacts/<kind>/<key>/            part-00000.parquet ... record.json (last)
    <root>/runs/<run>/iter_02/<stage>      -> the artifact, for people; deletable
    <root>/locks/<kind>-<key>                 held (flock, or a lease: lease.py) while somebody builds it
    <root>/set_aside/<date>-<kind>-<key>/     what was moved out of the way, with the reason in set_aside.json; moved back, it counts again

A directory without `record.json` is unfinished work: its whole shards are kept and the next build goes on from them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from data_contracts import lease
from data_contracts.artifact import NOT_DATA, RECORD, ArtifactRecord, ArtifactRef, FileDigest
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.identity import digest_file

QUICK_BYTES = 64 << 20
"""Files up to this size are read whole when an artifact is looked up (some 50 ms each, at most); larger ones are weighed, and read by `verify`."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ESTALE)
MAX_BYTES, MIN_FREE_BYTES = "SELFPLAY_STORE_MAX_BYTES", "SELFPLAY_STORE_MIN_FREE_BYTES"
DEFAULT_MIN_FREE = 256 << 20
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SET_ASIDE, REASON, BY_GC = "set_aside", "set_aside.json", "gc"
RUN_SETTINGS = "run.json"
"""In a run's directory: its resolved settings."""
TEMPORARY = re.compile(r"\..+\.tmp-(?:(?P<host>.+)-)?(?P<pid>\d+)")
SHARD = re.compile(r"[a-z_]+-(\d{5})\.parquet")
FORGOTTEN_SECONDS = 86400
"""A temporary file of another host is left alone for so long."""
WITHOUT_ASKER_SECONDS = 3600


def temporary_beside(path: Path) -> Path:
    """Where to write what shall become `path` by a rename; no other process of any node uses the name."""
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


@contextmanager
def writing(path: Path, mode: str = "wb") -> Iterator[Any]:
    """A file that takes the place of `path` in one step, on disk, when the block ends: a reader, or a crash, sees the old one or the new one.

    What a killed writer leaves is named after its host and process; `sweep` knows it by that.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with writing(path, "w") as file:
        file.write(text)


def process_state(pid: int) -> str:
    """The kernel's letter for a process of this machine (R, S, T ...); "" for one that is gone, or dead and not yet (in many containers never) reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if state in "ZX" else state


def is_abandoned(path: Path, elsewhere: bool = True) -> bool:
    """Whether it is the temporary file of a writer that is no more. `elsewhere`: also of another host, by its age."""
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] in (None, os.uname().nodename):
        return not process_state(int(match["pid"]))
    with suppress(OSError):
        return elsewhere and time.time() - path.lstat().st_mtime > FORGOTTEN_SECONDS
    return False


@contextmanager
def disk_errors_explained(root: Path) -> Iterator[None]:
    """What the disk refuses becomes one sentence. Raises: ArtifactError instead of OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        advice = {
            errno.EROFS: "Mount it writable, or set SELFPLAY_STORE (or --store) to a directory you can write",
            errno.EMFILE: "Raise the limit (`ulimit -n 65536`)",
            errno.EIO: "Look at the disk (`dmesg`)",
        }.get(error.errno, "Free some space (`python -m data_contracts.gc --keep-runs 3 --dry-run` shows what can go)")
        raise ArtifactError(
            f"the store {root} cannot be written: {error.strerror} ({error.filename or 'while writing'}). {advice}, then run again: what is whole is kept"
        ) from error


def bytes_setting(name: str, default: int | None) -> int | None:
    """An amount of bytes from the environment: 500000000, 500M, 2T. Raises: ConfigError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{name} is {text!r}: it must be an amount of bytes, e.g. 500G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def bytes_below(path: Path) -> int:
    """What a directory takes on disk; files that vanish meanwhile count nothing."""
    total = 0
    with suppress(OSError):
        for entry in os.scandir(path):
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += bytes_below(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_digest(files: list[FileDigest]) -> str:
    lines = "".join(f"{file.name}\0{file.sha256}\n" for file in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def data_files(directory: Path) -> list[Path]:
    """The files that make up the artifact, sorted: no records, logs, hidden or temporary files, no `resume/` work."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and path.name not in NOT_DATA
        and not any(part.startswith(".") or part == "resume" for part in path.relative_to(directory).parts)
    )


def inside(name: str) -> str:
    """A kind, key, run or step as one part of a path. Raises: ConfigError for what would lead elsewhere."""
    if not NAME_PART.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} cannot name something in the store: letters, digits, dots, dashes and underscores, no path"
        )
    return name


def size_in_words(count: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"


@contextmanager
def _flock(path: Path, waiting: Callable[[str], None], poll: float) -> Iterator[Any]:
    told = False
    while True:
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    file.seek(0)
                    waiting(file.read().strip())
                    told = True
                time.sleep(poll)
                continue
            # `gc` may have removed the file between our opening and our locking it: then somebody else may hold a new one.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield file
                return


class _Busy(Exception):
    """Somebody else holds the lock; says who."""


class Store:
    """A directory of artifacts. Opening one writes nothing."""

    def __init__(self, root: Path | str | None = None):
        # Resolved here and nowhere else: links of runs are relative, and `..` behind a link leads elsewhere than it reads.
        self.root = Path(root or os.environ.get("SELFPLAY_STORE") or "store").resolve()

    def check_writable(self) -> None:
        """Raises: ConfigError if nothing could be written below the root. Leaves nothing behind."""
        nearest = self.root
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise ConfigError(
                f"the store {self.root} cannot be made: {nearest} is a file. Set SELFPLAY_STORE (or --store) to a directory"
            )
        # Ask by doing: os.access tells root that a read-only file system is writable.
        probe = temporary_beside(nearest / "selfplay-probe")
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise ConfigError(
                f"the store {self.root} is not writable ({error.strerror}: {nearest}). Set SELFPLAY_STORE (or --store) to a directory you can write"
            ) from None

    def check_room(self) -> None:
        """Raises: ArtifactError if the store is over its budget, or its disk nearly full: better now than inside a checkpoint."""
        budget, least = bytes_setting(MAX_BYTES, None), bytes_setting(MIN_FREE_BYTES, DEFAULT_MIN_FREE)
        advice = "`python -m data_contracts.gc --keep-runs 3 --dry-run` shows what can go"
        if budget is not None and (used := bytes_below(self.root)) >= budget:
            raise ArtifactError(
                f"the store {self.root} takes {size_in_words(used)}, its budget {MAX_BYTES} is {size_in_words(budget)}. {advice}"
            )
        nearest = self.root
        while not nearest.exists():
            nearest = nearest.parent
        free = shutil.disk_usage(nearest).free
        if free < least:
            raise ArtifactError(
                f"the disk of the store {self.root} has {size_in_words(free)} left, less than {size_in_words(least)} ({MIN_FREE_BYTES}). {advice}"
            )

    def sweep(self) -> int:
        """Remove what those left that are no more, outside of artifacts (a build tidies its own): temporary files, requests. How many there were."""
        found = 0
        for place in ("locks", "digests", "judgements", "logps", "runs"):
            for directory, _, names in os.walk(self.root / place):
                for name in names:
                    path = Path(directory, name)
                    if ".tmp-" in name and is_abandoned(path):
                        path.unlink(missing_ok=True)
                        found += 1
        # Work that was asked of another machine (tasks/execution/remote.py) is left alone for a while after its asker's end: it may still be done.
        for path in (self.root / "work").glob("*"):
            if is_abandoned(path, elsewhere=False) and time.time() - path.lstat().st_mtime > WITHOUT_ASKER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
                found += 1
        return found

    def directory(self, kind: str, key: str) -> Path:
        """Raises: ConfigError for a name that would leave the store."""
        return self.root / "artifacts" / inside(kind) / inside(key)

    def load(self, kind: str, key: str) -> ArtifactRecord | None:
        """The record, if the artifact was signed. Says nothing of the files; see `problems`."""
        try:
            record = ArtifactRecord.model_validate_json((self.directory(kind, key) / RECORD).read_bytes())
            if (record.kind, record.key) != (kind, key):
                raise ValueError(f"it is that of {record.kind} {record.key}")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"{kind} {key}: record.json is damaged ({str(error).splitlines()[0]}). Delete {self.directory(kind, key)} and run again"
            ) from None
        return record

    def problems(self, record: ArtifactRecord, deep: bool = False) -> list[str]:
        """What is wrong with a signed artifact's files: missing, of another size, or of other content (large files only if `deep`)."""
        return list(self.damaged(record, deep).values())

    def damaged(self, record: ArtifactRecord, deep: bool = False) -> dict[str, str]:
        """File -> what is wrong with it."""
        directory = self.directory(record.kind, record.key)
        found = {}
        for file in record.files:
            path = directory / file.name
            if not path.is_file():
                found[file.name] = f"{file.name} is missing"
            elif path.stat().st_size != file.size:
                found[file.name] = f"{file.name} has {path.stat().st_size} bytes, not {file.size}"
            elif (deep or file.size <= QUICK_BYTES) and digest_file(path) != file.sha256:
                found[file.name] = f"{file.name} has other content than was signed"
        return found

    def set_back(self, kind: str, key: str) -> None:
        """Make unfinished work of a damaged artifact: whole shards stay, damaged ones go with all that was written beside them, and so does
        everything that is no shard. The next build makes what is missing. Under the artifact's lock."""
        directory = self.directory(kind, key)
        try:
            record = self.load(kind, key)
        except ArtifactError:
            record = None
        gone = {
            match[1] for name in (self.damaged(record, deep=True) if record else ()) if (match := SHARD.fullmatch(name))
        }
        (directory / RECORD).unlink(missing_ok=True)
        for path in data_files(directory):
            match = SHARD.fullmatch(path.name)
            if match is None or match[1] in gone:
                path.unlink()

    def find(self, kind: str, key: str) -> ArtifactRef | None:
        """The finished, intact artifact, or None."""
        try:
            record = self.load(kind, key)
        except ArtifactError:
            return None
        if record is None or self.problems(record):
            return None
        return record.ref(str(self.directory(kind, key)))

    def sign(self, record: ArtifactRecord) -> ArtifactRecord:
        """Hash the data files, make the digests part of the record and write it: the last act of a build."""
        directory = self.directory(record.kind, record.key)
        files = [
            FileDigest(name=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest_file(path))
            for path in data_files(directory)
        ]
        if not files:
            raise ArtifactError(
                f"{record.kind} {record.key}: the stage {record.stage} ended without writing any file in {directory}"
            )
        signed = record.model_copy(update={"files": files, "content": content_digest(files)})
        lease.check(self.root, f"{record.kind}-{record.key}")
        write_atomic(directory / RECORD, signed.model_dump_json(indent=1))
        return signed

    def directories(self) -> list[tuple[str, str]]:
        """(kind, key) of every artifact's directory, finished or not."""
        paths = (self.root / "artifacts").glob("*/*")
        names = sorted((path.parent.name, path.name) for path in paths if path.is_dir())
        return [(kind, key) for kind, key in names if NAME_PART.fullmatch(kind) and NAME_PART.fullmatch(key)]

    def set_aside(self, path: Path, why: str, by: str) -> Path:
        """Move a directory of the store to `set_aside/`, with the reason beside its files; returns where it lies now. Under the artifact's lock."""
        parts = path.relative_to(self.root).parts
        name = "-".join([time.strftime("%Y-%m-%d"), *(part for part in parts if part != "artifacts")])
        target, number = self.root / SET_ASIDE / name, 1
        while target.exists():
            number += 1
            target = self.root / SET_ASIDE / f"{name}.{number}"
        target.parent.mkdir(exist_ok=True)
        reason = {
            "why": why,
            "by": by,
            "was": "/".join(parts),
            "size": bytes_below(path),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_atomic(path / REASON, json.dumps(reason, indent=1))
        shutil.move(path, target)  # a rename, unless artifacts/ is a link to another disk
        return target

    def list_set_aside(self) -> list[tuple[Path, dict[str, Any]]]:
        """What was set aside, each with its reason: why, by, was (its place in the store), size, since."""
        entries = []
        for path in sorted((self.root / SET_ASIDE).glob("*")):
            reason: dict[str, Any] = {"why": "no readable reason", "by": "?", "was": "?", "size": 0, "since": "?"}
            with suppress(OSError, ValueError, TypeError):
                reason |= json.loads((path / REASON).read_text(encoding="utf-8"))
            entries.append((path, reason))
        return entries

    def discard(self, kind: str, key: str) -> None:
        """Remove an artifact; the record first, so that a crash in between leaves unfinished work, never a signed ruin."""
        directory = self.directory(kind, key)
        (directory / RECORD).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def lock(
        self, kind: str, key: str, waiting: Callable[[str], None] = lambda owner: None, poll: float = 0.5
    ) -> Iterator[int]:
        """Hold the right to build one artifact; yields the descriptor, for children to inherit.

        flock belongs to the open file: the kernel drops it when the last process that has it is gone, however it died. A stage tree that
        inherits it keeps others out for as long as any of its processes lives. `waiting(owner)` is called once per wait.
        """
        name, host, shared = f"{inside(kind)}-{inside(key)}", os.uname().nodename, lease.is_wanted()
        # Under leases flock is for the processes of one host only, and has a file per host: whatever the filesystem makes of it is right.
        path = self.root / "locks" / (f"{name}@{host}" if shared else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = {"pid": os.getpid(), "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with _flock(path, waiting, poll) as file:
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
            if not shared:
                yield file.fileno()
                return
            held = lease.Lease(path.parent, name, owner)
            held.acquire(waiting, poll)
            try:
                yield file.fileno()
            finally:
                held.release()

    @contextmanager
    def try_lock(self, kind: str, key: str) -> Iterator[dict[str, Any] | None]:
        """Hold the lock if nobody else does. Yields: None, and it is ours; else its holder {pid, host, since}, {} if the lock does not say."""

        def refuse(owner: str) -> None:
            raise _Busy(owner)

        with ExitStack() as stack:
            holder = None
            try:
                stack.enter_context(self.lock(kind, key, refuse))
            except _Busy as busy:
                with suppress(ValueError):
                    holder = json.loads(str(busy))
                holder = holder if isinstance(holder, dict) else {}
            yield holder

    def locks(self) -> list[tuple[str, str]]:
        """(kind, key) of everything that is locked, or once was."""
        names = {path.name.partition("@")[0].partition(".lease")[0] for path in (self.root / "locks").glob("[!.]*")}
        found = [(kind, key) for kind, _, key in (name.rpartition("-") for name in sorted(names))]
        return [(kind, key) for kind, key in found if kind not in ("", "mlflow")]

    def run_directory(self, run: str) -> Path:
        """What a run leaves for people. Raises: ConfigError for a name that would leave the store."""
        return self.root / "runs" / inside(run)

    def runs_with(self, name: str) -> list[str]:
        """The runs that have such a file."""
        return sorted(path.parent.name for path in (self.root / "runs").glob(f"*/{name}"))

    def show_in_run(self, run: str, step: str, name: str, ref: ArtifactRef) -> None:
        """Point `runs/<run>/<step>/<name>` at the artifact."""
        link = self.run_directory(run) / inside(step) / inside(name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if ref.key == "external":
            target = os.path.abspath(ref.path)
        else:
            target = os.path.relpath(self.root / "artifacts" / ref.kind / ref.key, link.parent)
        temporary = temporary_beside(link)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)

    def records(self, kind: str | None = None, start: str = "") -> Iterator[ArtifactRecord]:
        """Every signed artifact (whose key begins with `start`), oldest first. One with a damaged record is left out; `verify` names it."""
        pattern = f"{escape(kind) if kind else '*'}/{escape(start)}*/{RECORD}"
        for path in sorted((self.root / "artifacts").glob(pattern), key=lambda path: path.stat().st_mtime):
            try:
                record = self.load(path.parent.parent.name, path.parent.name)
            except ArtifactError:
                continue
            if record is not None:
                yield record

    def resolve(self, text: str) -> ArtifactRecord:
        """The one artifact that `text` names: a key, the start of one, or kind/key. Raises: ConfigError if none or several."""
        kind, _, start = text.rpartition("/")
        # More than one slash is a path, of something that is not there.
        hits = [] if "/" in kind else list(self.records(kind or None, start))
        if len(hits) == 1:
            return hits[0]
        if not hits:
            raise ConfigError(
                f"no artifact in {self.root} has a key that starts with {text!r}; list them with `python -m data_contracts ls`"
            )
        raise ConfigError(
            f"{start!r} is the start of {len(hits)} keys: " + ", ".join(f"{hit.kind}/{hit.key}" for hit in hits[:8])
        )
