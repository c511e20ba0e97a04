"""Contracts - signed artifacts in an object store (S3 and compatible servers), with the local store as their cache.

    <url>/artifacts/<kind>/<key>/<content>/part-00000.parquet ...     the files, under the digest of their content
    <url>/artifacts/<kind>/<key>/record.json                          put last: names the content that counts

The promise is that of the store: whoever finds the record finds every file it lists, whole. An object store shows an
object only when all of it has arrived, and a put replaces an object in one step. Files lie under the digest of their
content, so two machines that put different builds of one key never mix them: the later record wins as a whole. Fetched
files are checked by their digests before the record is written here. An object store has no locks: two machines without
a common file system may build one artifact twice, never half.

python -m data_contracts.mirror push|fetch|evict URL [--store DIR] [--keep-gib N] [KIND/KEY ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from data_contracts.artifact import NOT_DATA, RECORD, ArtifactRecord, parse_record
from data_contracts.errors import ArtifactError, ConfigError, PipelineError, TransientError, print_error
from data_contracts.files import temporary_beside, write_atomic
from data_contracts.identity import digest_file
from data_contracts.redaction import redact, redact_output
from data_contracts.store import Store
from data_contracts.streams import open_standard_streams

MIRROR = "SELFPLAY_MIRROR"
"""Environment variable: the URL, e.g. s3://bucket/selfplay?endpoint_override=objects:9000&scheme=http. Credentials are
those of the AWS tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."""
CHUNK_BYTES = 1 << 24


class Mirror:
    """The artifacts below one URL."""

    def __init__(self, url: str):
        """Raises: ConfigError for a URL that names no object store."""
        self.url = redact(url).partition("?")[0]  # for messages
        try:
            self.files, root = fs.FileSystem.from_uri(_with_delayed_open(url))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ConfigError(
                f"{MIRROR} = {self.url!r} is no address of an object store ({error}); it looks like s3://bucket/prefix"
            ) from None
        self.root = root.rstrip("/")

    def _object_path(self, kind: str, key: str, *rest: str) -> str:
        return "/".join([self.root, "artifacts", kind, key, *rest])

    def load(self, kind: str, key: str) -> ArtifactRecord | None:
        """Return the record that counts, None if the artifact is not in the mirror."""
        path = self._object_path(kind, key, RECORD)
        with self._outages_transient(f"read {kind} {key}"):
            if self.files.get_file_info(path).type == fs.FileType.NotFound:
                return None
            with self.files.open_input_stream(path) as stream:
                return parse_record(stream.read(), f"{self.url}: the record of {kind} {key}")

    def push(self, store: Store, record: ArtifactRecord) -> bool:
        """Put a signed artifact, its record last. Returns: False if the mirror already has it."""
        mirrored = self.load(record.kind, record.key)
        if mirrored is not None and mirrored.content == record.content:
            return False
        directory = store.directory(record.kind, record.key)
        with self._outages_transient(f"put {record.kind} {record.key}"):
            for file in record.files:
                target = self._object_path(record.kind, record.key, record.content, file.name)
                if isinstance(self.files, fs.LocalFileSystem):
                    self.files.create_dir(target.rpartition("/")[0])
                with open(directory / file.name, "rb") as source, self.files.open_output_stream(target) as sink:
                    while chunk := source.read(CHUNK_BYTES):
                        sink.write(chunk)
            with self.files.open_output_stream(self._object_path(record.kind, record.key, RECORD)) as sink:
                sink.write(record.model_dump_json(indent=1).encode())
        return True

    def fetch(self, store: Store, kind: str, key: str) -> ArtifactRecord | None:
        """Bring an artifact into the store, in place of unfinished work; return its record, None if there is none.

        The caller holds the artifact's lock.
        Raises: ArtifactError if a file has other content than was signed; the record is not written then.
        """
        record = self.load(kind, key)
        if record is None:
            return None
        directory = store.directory(kind, key)
        fetched = _delete_other_files(directory, record)
        with self._outages_transient(f"fetch {kind} {key}"):
            for file in record.files:
                if file.name not in fetched:
                    self._fetch_file(record, file.name, file.sha256, directory / file.name)
        write_atomic(directory / RECORD, record.model_dump_json(indent=1))
        return store.load(kind, key)  # with the paths of this store

    def _fetch_file(self, record: ArtifactRecord, name: str, sha256: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        path = self._object_path(record.kind, record.key, record.content, name)
        with self.files.open_input_stream(path) as source, open(temporary, "wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
        if digest_file(temporary) != sha256:
            temporary.unlink()
            raise ArtifactError(
                f"{self.url}: {record.kind} {record.key}: {name} has other content than was signed; "
                f"delete artifacts/{record.kind}/{record.key} there, and it is built again"
            )
        os.replace(temporary, target)

    @contextmanager
    def _outages_transient(self, action: str) -> Generator[None]:
        """Raises: TransientError in place of an OSError: an object store that does not answer is worth another try."""
        try:
            yield
        except OSError as error:
            raise TransientError(f"{self.url}: could not {action}: {str(error)[:500]}") from None


def _with_delayed_open(url: str) -> str:
    """Ask pyarrow to put a small object (the record) by one request, not three."""
    if not url.startswith("s3://") or "allow_delayed_open" in url:
        return url
    separator = "&" if "?" in url else "?"
    return f"{url}{separator}allow_delayed_open=true"


def _delete_other_files(directory: Path, record: ArtifactRecord) -> set[str]:
    """Delete the data files that are not part of this build and return the names of those that are there whole.

    Shards that were cut otherwise, with their seals, would be read together with those that are fetched.
    """
    signed, whole = {file.name: file for file in record.files}, set[str]()
    for path in [path for path in directory.rglob("*") if path.is_file() and path.name not in NOT_DATA]:
        file = signed.get(path.relative_to(directory).as_posix())
        if file is not None and path.stat().st_size == file.size and digest_file(path) == file.sha256:
            whole.add(file.name)
        else:
            path.unlink()
    return whole


def mirror_from_environment() -> Mirror | None:
    """Return the mirror that the environment names, or None."""
    if os.environ.get(MIRROR):
        return Mirror(os.environ[MIRROR])
    return None


def evict(store: Store, mirror: Mirror, keep_bytes: int) -> list[ArtifactRecord]:
    """Delete the artifacts unused for longest until the store holds at most `keep_bytes`; return their records.

    Only what the mirror has, with the same content, is deleted.
    """

    def last_used(record: ArtifactRecord) -> float:
        return (store.directory(record.kind, record.key) / RECORD).stat().st_atime

    records = sorted(store.records(), key=last_used)
    num_bytes = sum(file.size for record in records for file in record.files)
    evicted: list[ArtifactRecord] = []
    for record in records:
        if num_bytes <= keep_bytes:
            break
        mirrored = mirror.load(record.kind, record.key)
        if mirrored is not None and mirrored.content == record.content:
            store.discard(record.kind, record.key)
            num_bytes -= sum(file.size for file in record.files)
            evicted.append(record)
    return evicted


def main(arguments: list[str]) -> int:
    """Run the command of the module's docstring and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts.mirror",
        description="Copy artifacts to an object store, fetch them from it, delete local copies.",
    )
    parser.add_argument("verb", choices=["push", "fetch", "evict"])
    parser.add_argument("url", help="e.g. s3://bucket/prefix")
    parser.add_argument(
        "names", nargs="*", metavar="KIND/KEY", help="fetch: these; push: these, or all if none is named"
    )
    parser.add_argument("--store", metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store")
    parser.add_argument("--keep-gib", type=float, default=0.0, metavar="N", help="evict: GiB that may stay; default 0")
    options = parser.parse_args(arguments)
    redact_output()
    try:
        store, mirror = Store(options.store), Mirror(options.url)
        if options.verb == "evict":
            for record in evict(store, mirror, int(options.keep_gib * 2**30)):
                print(f"{record.kind}/{record.key} was deleted here")
        elif options.verb == "push":
            for record in [store.resolve(name) for name in options.names] or store.records():
                outcome = "was put into the mirror" if mirror.push(store, record) else "is in the mirror already"
                print(f"{record.kind}/{record.key} {outcome}")
        else:
            for name in options.names:
                kind, _, key = name.partition("/")
                with store.lock(kind, key):
                    outcome = "was fetched" if mirror.fetch(store, kind, key) else "is not in the mirror"
                print(f"{name} {outcome}")
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))
