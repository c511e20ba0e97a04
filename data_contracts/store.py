"""Contracts - the content-addressed store: where artifacts live, how they are found, signed, explained and verified.

    <root>/artifacts/<kind>/<key>/            part-00000.parquet ... record.json (last)
    <root>/runs/<run>/iter_02/<stage>      -> the artifact, for people; deletable
    <root>/locks/<kind>-<key>                 held (flock) while somebody builds it

A directory without `record.json` is unfinished work: its whole shards are kept and the next build goes on from them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from data_contracts.artifact import NOT_DATA, RECORD, ArtifactRecord, ArtifactRef, FileDigest
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.identity import digest_file


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


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


class Store:
    """A directory of artifacts. Opening one writes nothing."""

    def __init__(self, root: Path | str | None = None):
        self.root = Path(root or os.environ.get("SELFPLAY_STORE") or "store").absolute()

    def check_writable(self) -> None:
        """Raises: ConfigError if nothing could be written below the root. Leaves nothing behind."""
        nearest = self.root
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise ConfigError(f"the store {self.root} cannot be made: {nearest} is a file. Set SELFPLAY_STORE (or --store) to a directory")
        # Ask by doing: os.access tells root that a read-only file system is writable.
        probe = nearest / f".selfplay-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise ConfigError(
                f"the store {self.root} is not writable ({error.strerror}: {nearest}). Set SELFPLAY_STORE (or --store) to a directory you can write"
            ) from None

    def directory(self, kind: str, key: str) -> Path:
        return self.root / "artifacts" / kind / key

    def load(self, kind: str, key: str) -> ArtifactRecord | None:
        """The record, if the artifact was signed. Says nothing of the files; see `problems`."""
        try:
            return ArtifactRecord.model_validate_json((self.directory(kind, key) / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"{kind} {key}: record.json is damaged ({str(error).splitlines()[0]}). Delete {self.directory(kind, key)} and run again"
            ) from None

    def problems(self, record: ArtifactRecord, deep: bool = False) -> list[str]:
        """What is wrong with a signed artifact's files: missing, of another size, or (`deep`) of other content."""
        directory = self.directory(record.kind, record.key)
        found = []
        for file in record.files:
            path = directory / file.name
            if not path.is_file():
                found.append(f"{file.name} is missing")
            elif path.stat().st_size != file.size:
                found.append(f"{file.name} has {path.stat().st_size} bytes, not {file.size}")
            elif deep and digest_file(path) != file.sha256:
                found.append(f"{file.name} has other content than was signed")
        return found

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
            raise ArtifactError(f"{record.kind} {record.key}: the stage {record.stage} ended without writing any file in {directory}")
        signed = record.model_copy(update={"files": files, "content": content_digest(files)})
        write_atomic(directory / RECORD, signed.model_dump_json(indent=1))
        return signed

    def discard(self, kind: str, key: str) -> None:
        """Remove an artifact; the record first, so that a crash in between leaves unfinished work, never a signed ruin."""
        directory = self.directory(kind, key)
        (directory / RECORD).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def lock(self, kind: str, key: str, waiting: Callable[[str], None] = lambda owner: None, poll: float = 0.5) -> Iterator[int]:
        """Hold the right to build one artifact; yields the descriptor, for children to inherit.

        flock belongs to the open file: the kernel drops it when the last process that has it is gone, however it died. A stage tree that
        inherits it keeps others out for as long as any of its processes lives. `waiting(owner)` is called once per wait.
        """
        path = self.root / "locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            told = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        file.seek(0)
                        waiting(file.read().strip())
                        told = True
                    time.sleep(poll)
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            file.flush()
            yield file.fileno()

    def show_in_run(self, run: str, step: str, name: str, ref: ArtifactRef) -> None:
        """Point `runs/<run>/<step>/<name>` at the artifact."""
        link = self.root / "runs" / run / step / name
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(ref.path, link.parent)
        temporary = link.with_name(f".{name}.tmp-{os.getpid()}")
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
        raise ConfigError(f"{start!r} is the start of {len(hits)} keys: " + ", ".join(f"{hit.kind}/{hit.key}" for hit in hits[:8]))
