"""Contracts - the content-addressed store: where artifacts live, how they are found, signed, verified and set aside.

    <root>/artifacts/<kind>/<key>/            part-00000.parquet ... record.json (written last)
    <root>/runs/<run>/iter_02/<stage>      -> the artifact, for people; deletable
    <root>/locks/                             who builds what: locks.py
    <root>/logps/<model content>-.../         log-probs by model: shards of the kind token_logps
    <root>/set_aside/<date>-<kind>-<key>/     moved out of the way: set_aside.py

A directory without `record.json` is unfinished work: its whole shards are kept and the next build continues after them.

Other rooms may keep directories of their own below the root. They need no entry in a list: `Store.abandoned` recognises
what a dead writer left in them by its name (files.py), `lock_apart` gives them a lock, and `gc` leaves them alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from glob import escape
from pathlib import Path

from data_contracts import lease, locks
from data_contracts.artifact import EXTERNAL, NOT_DATA, RECORD, ArtifactRecord, ArtifactRef, FileDigest, parse_record
from data_contracts.errors import ArtifactError, ConfigError, NewerRecordError
from data_contracts.files import (
    bytes_below,
    bytes_from_environment,
    is_abandoned,
    is_directory,
    temporary_beside,
    write_atomic,
)
from data_contracts.identity import digest_file
from data_contracts.lease import LockOwner
from data_contracts.set_aside import SET_ASIDE
from data_contracts.words import format_bytes

QUICK_BYTES = 64 << 20
"""Files up to this size are read whole when an artifact is looked up (at most some 50 ms each). Of larger files only
the size is compared; `verify` reads them."""
MAX_BYTES, MIN_FREE_BYTES = "SELFPLAY_STORE_MAX_BYTES", "SELFPLAY_STORE_MIN_FREE_BYTES"
"""Environment variables: budget of the store, and what must stay free on its disk."""
DEFAULT_MIN_FREE = 256 << 20
GC_ADVICE = "`selfplay gc --keep-runs 3 --dry-run` shows what can go"
WRITABLE_ADVICE = "Set SELFPLAY_STORE (or --store) to a directory you can write"
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
ARTIFACTS = "artifacts"
RUN_SETTINGS = "run.json"
"""In a run's directory: its resolved settings."""


def content_digest(files: list[FileDigest]) -> str:
    """Return the digest over names and digests of the files, whatever their order."""
    lines = "".join(f"{file.name}\0{file.sha256}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def remove_litter(directory: Path) -> None:
    """Delete the temporary files in an artifact. The caller holds its lock: whoever wrote them is dead."""
    for litter in directory.rglob(".*.tmp-*"):
        litter.unlink(missing_ok=True)


def data_files(directory: Path) -> list[Path]:
    """Return the data files of an artifact, sorted: no records, logs, hidden or temporary files, and no `resume/`."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and path.name not in NOT_DATA
        and not any(part.startswith(".") or part == "resume" for part in path.relative_to(directory).parts)
    )


def check_name(name: str) -> str:
    """Return a kind, key, run or step that is one part of a path. Raises: ConfigError for one that leads elsewhere."""
    if not NAME_PART.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} cannot name something in the store: "
            "use letters, digits, dots, dashes and underscores, and no path"
        )
    return name


def logps_directory(root: Path, model_content: str, settings: str) -> Path:
    """Return where the log-probs of one model are kept; `gc` reads the model back from the name."""
    return root / "logps" / f"{model_content[:16]}-{settings}"


def _ignore_owner(owner: LockOwner) -> None:
    pass


class Store:
    """A directory of artifacts. Opening one writes nothing."""

    def __init__(self, root: Path | str | None = None):
        # Resolved here and nowhere else: links of runs are relative, and `..` behind a link leads elsewhere than it
        # reads.
        self.root = Path(root or os.environ.get("SELFPLAY_STORE") or "store").resolve()

    # --- the directory itself

    def check_writable(self) -> None:
        """Raises: ConfigError if nothing could be written below the root. Leaves nothing behind."""
        directory = self._nearest_directory()
        if not directory.is_dir():
            raise ConfigError(
                f"the store {self.root} cannot be made: {directory} is a file. "
                "Set SELFPLAY_STORE (or --store) to a directory"
            )
        # os.access tells root that a read-only filesystem is writable; so write.
        probe = temporary_beside(directory / "selfplay-probe")
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise ConfigError(
                f"the store {self.root} is not writable ({error.strerror}: {directory}). {WRITABLE_ADVICE}"
            ) from None

    def check_room(self) -> None:
        """Raises: ArtifactError if the store exceeds its budget or its disk is nearly full. Asked before each build."""
        budget = bytes_from_environment(MAX_BYTES, None)
        min_free = bytes_from_environment(MIN_FREE_BYTES, DEFAULT_MIN_FREE)
        if budget is not None and (used := bytes_below(self.root)) >= budget:
            raise ArtifactError(
                f"the store {self.root} takes {format_bytes(used)}, "
                f"its budget {MAX_BYTES} is {format_bytes(budget)}. {GC_ADVICE}"
            )
        free = shutil.disk_usage(self._nearest_directory()).free
        if free < min_free:
            raise ArtifactError(
                f"the disk of the store {self.root} has {format_bytes(free)} left, "
                f"less than {format_bytes(min_free)} ({MIN_FREE_BYTES}). {GC_ADVICE}"
            )

    def _nearest_directory(self) -> Path:
        """Return the root, or the nearest path above it that exists."""
        return next(path for path in (self.root, *self.root.parents) if path.exists())

    def abandoned(self, in_artifacts: bool) -> Iterator[Path]:
        """Yield the temporary files and directories of dead writers below the root, except those set aside."""
        left_out = {SET_ASIDE} if in_artifacts else {SET_ASIDE, ARTIFACTS}
        if not self.root.is_dir():
            return
        for room in sorted(path for path in self.root.iterdir() if path.name not in left_out):
            for directory, subdirectories, names in os.walk(
                room
            ):  # a room that is a link to another disk is walked too
                for name in subdirectories + names:
                    if ".tmp-" in name and is_abandoned(path := Path(directory, name)):
                        yield path

    def sweep(self) -> int:
        """Delete what dead writers left outside of artifacts (a build tidies its own); return the number of paths."""
        num_deleted = 0
        for path in self.abandoned(in_artifacts=False):
            if is_directory(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            num_deleted += 1
        return num_deleted

    # --- artifacts

    def directory(self, kind: str, key: str) -> Path:
        """Return where an artifact lies, or would. Raises: ConfigError for a name that would leave the store."""
        return self.root / ARTIFACTS / check_name(kind) / check_name(key)

    def load(self, kind: str, key: str) -> ArtifactRecord | None:
        """Return the record, None for an artifact that was not signed. The files are not looked at; see `problems`.

        Its inputs have the paths that they have in this store: those in the file are where the builder found them.
        Raises: ArtifactError for a damaged record, NewerRecordError for one of a later version of this program.
        """
        path = self.directory(kind, key) / RECORD
        try:
            record = parse_record(path.read_bytes(), f"{path}")
            if (record.kind, record.key) != (kind, key):
                raise ValueError(f"it is that of {record.kind} {record.key}")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"{kind} {key}: record.json is damaged ({str(error).splitlines()[0]}). Run again: the artifact is set "
                f"aside and what is whole in it is used; it lies in {path.parent}"
            ) from None
        return record.model_copy(update={"inputs": {name: self.here(ref) for name, ref in record.inputs.items()}})

    def here(self, ref: ArtifactRef) -> ArtifactRef:
        """Return the reference with the path in this store, found by kind and key; a model of the user's as it is."""
        key, *rest = ref.key.split("/")  # "<key>/steps/000004": a checkpoint from the middle of a training
        if ref.key == EXTERNAL or not all(map(NAME_PART.fullmatch, (ref.kind, key, *rest))):
            return ref
        return ref.model_copy(update={"path": str(self.directory(ref.kind, key).joinpath(*rest))})

    def problems(self, record: ArtifactRecord, deep: bool = False) -> list[str]:
        """Return what is wrong with the files of a signed artifact, a sentence each; [] if they are intact.

        deep: compare the content of large files too, not only their size
        """
        return list(self.damaged_files(record, deep).values())

    def damaged_files(self, record: ArtifactRecord, deep: bool = False) -> dict[str, str]:
        """Return file name -> what is wrong with that file."""
        directory = self.directory(record.kind, record.key)
        problems: dict[str, str] = {}
        for file in record.files:
            path = directory / file.name
            if not path.is_file():
                problems[file.name] = f"{file.name} is missing"
            elif path.stat().st_size != file.size:
                problems[file.name] = f"{file.name} has {path.stat().st_size} bytes, not {file.size}"
            elif (deep or file.size <= QUICK_BYTES) and digest_file(path) != file.sha256:
                problems[file.name] = f"{file.name} has other content than was signed"
        return problems

    def find(self, kind: str, key: str) -> ArtifactRef | None:
        """Return the finished, intact artifact, or None. Raises: NewerRecordError."""
        try:
            record = self.load(kind, key)
        except NewerRecordError:
            raise
        except ArtifactError:
            return None
        if record is None or self.problems(record):
            return None
        return record.ref(str(self.directory(kind, key)))

    def sign(self, record: ArtifactRecord) -> ArtifactRecord:
        """Hash the data files and write the record with their digests, as the last act of a build; return that record.

        The caller holds the lock of the artifact, so a temporary file in it is that of a dead writer: it is deleted.
        Raises: ArtifactError if there is no data file, or if another process has taken over the lease.
        """
        directory = self.directory(record.kind, record.key)
        remove_litter(directory)
        files = [
            FileDigest(name=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest_file(path))
            for path in data_files(directory)
        ]
        if not files:
            raise ArtifactError(
                f"{record.kind} {record.key}: the stage {record.stage} ended without writing any file in {directory}"
            )
        signed = record.model_copy(update={"files": files, "content": content_digest(files)})
        lease.check_fence(self.root, f"{record.kind}-{record.key}")
        write_atomic(directory / RECORD, signed.model_dump_json(indent=1))
        return signed

    def artifact_names(self) -> list[tuple[str, str]]:
        """Return (kind, key) of every artifact's directory, finished or not."""
        paths = (self.root / ARTIFACTS).glob("*/*")
        names = sorted((path.parent.name, path.name) for path in paths if path.is_dir())
        return [(kind, key) for kind, key in names if NAME_PART.fullmatch(kind) and NAME_PART.fullmatch(key)]

    def strangers(self) -> list[Path]:
        """Return the directories among the artifacts whose names no artifact can have; nothing here touches them."""
        ours = {self.directory(kind, key) for kind, key in self.artifact_names()}
        return sorted(path for path in (self.root / ARTIFACTS).glob("*/*") if path.is_dir() and path not in ours)

    def records(self, kind: str | None = None, start: str = "") -> Iterator[ArtifactRecord]:
        """Yield every signed artifact whose key begins with `start`, oldest first.

        A damaged record is left out; `verify` names it.
        """
        pattern = f"{escape(kind) if kind else '*'}/{escape(start)}*/{RECORD}"
        for path in sorted((self.root / ARTIFACTS).glob(pattern), key=lambda path: path.stat().st_mtime):
            try:
                record = self.load(path.parent.parent.name, path.parent.name)
            except (ArtifactError, ConfigError):  # a ConfigError: a name that no artifact has
                continue
            if record is not None:
                yield record

    def resolve(self, text: str) -> ArtifactRecord:
        """Return the artifact that `text` names: a key, the start of one, or kind/key.

        Raises: ConfigError if no artifact, or several, have such a key.
        """
        kind, _, start = text.rpartition("/")
        # A text with several slashes is a path, of something that is not there.
        matches = [] if "/" in kind else list(self.records(kind or None, start))
        if len(matches) == 1:
            return matches[0]
        if not matches:
            raise ConfigError(
                f"no artifact in {self.root} has a key that starts with {text!r}; list them with `selfplay ls`"
            )
        raise ConfigError(
            f"{start!r} is the start of {len(matches)} keys: "
            + ", ".join(f"{record.kind}/{record.key}" for record in matches[:8])
        )

    def discard(self, kind: str, key: str) -> None:
        """Delete an artifact, its record first: a crash in between leaves unfinished work, never a signed ruin."""
        directory = self.directory(kind, key)
        (directory / RECORD).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    # --- locks

    def lock(
        self, kind: str, key: str, on_wait: Callable[[LockOwner], None] = _ignore_owner, poll: float = 0.5
    ) -> AbstractContextManager[int]:
        """Hold the right to build one artifact; yields the descriptor, for children to inherit.

        on_wait: called once, with the lock's owner, when another process holds it
        poll: seconds between two attempts
        """
        return locks.hold(self.root / "locks", f"{check_name(kind)}-{check_name(key)}", on_wait, poll)

    def try_lock(self, kind: str, key: str) -> AbstractContextManager[LockOwner | None]:
        """Hold the lock of an artifact if it is free. Yields: None when this process holds it now, else the owner."""
        return locks.try_hold(self.root / "locks", f"{check_name(kind)}-{check_name(key)}")

    def lock_apart(self, name: str) -> AbstractContextManager[int]:
        """Hold a lock that belongs to no artifact, e.g. of a database below the root. `lock_names` leaves it out."""
        return locks.hold(self.root / "locks", f".{check_name(name)}", _ignore_owner, poll=0.5)

    def lock_path(self, kind: str, key: str) -> Path:
        """Return the file that is locked while an artifact is built; under leases there is one per host instead."""
        return self.root / "locks" / f"{kind}-{key}"

    def lock_names(self) -> list[tuple[str, str]]:
        """Return (kind, key) of each artifact that is locked or once was."""
        return locks.lock_names(self.root / "locks")

    # --- runs

    def run_directory(self, run: str) -> Path:
        """Return where a run leaves what people read. Raises: ConfigError for a name that would leave the store."""
        return self.root / "runs" / check_name(run)

    def runs_with(self, name: str) -> list[str]:
        """Return the runs whose directory has a file of this name."""
        return sorted(path.parent.name for path in (self.root / "runs").glob(f"*/{name}"))

    def show_in_run(self, run: str, step: str, name: str, ref: ArtifactRef) -> None:
        """Point `runs/<run>/<step>/<name>` at the artifact, in one step."""
        link = self.run_directory(run) / check_name(step) / check_name(name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if ref.key == EXTERNAL:
            target = os.path.abspath(ref.path)
        else:
            target = os.path.relpath(self.root / ARTIFACTS / ref.kind / ref.key, link.parent)
        temporary = temporary_beside(link)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
