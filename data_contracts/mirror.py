"""Contracts - signed artifacts in an object store (S3 and what speaks like it), the local store as their cache.

    <url>/artifacts/<kind>/<key>/<content>/part-00000.parquet ...     the files, under the digest of their content
    <url>/artifacts/<kind>/<key>/record.json                          put last: names the content that counts

The promises are those of the store: whoever finds the record finds every file it lists, whole. An object store shows an object only when all of it is
there, and a put replaces it in one step; because files lie under their content's digest, two that put different builds of one key never mix: the
later record wins as a whole. What is fetched is checked by its digests before it is signed here. There are no locks in an object store: two machines
without a common file system may build one artifact twice, never half.

python -m data_contracts.mirror push|fetch|evict URL [--store DIR] [--keep-gib N] [KIND/KEY ...]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from data_contracts.artifact import NOT_DATA, RECORD, ArtifactRecord
from data_contracts.errors import ArtifactError, ConfigError, PipelineError, TransientError, print_error
from data_contracts.files import temporary_beside, write_atomic
from data_contracts.identity import digest_file
from data_contracts.store import Store

MIRROR = "SELFPLAY_MIRROR"
"""Environment: the URL, e.g. s3://bucket/selfplay?endpoint_override=objects:9000&scheme=http. Credentials: AWS_ACCESS_KEY_ID and its like."""
CHUNK = 1 << 24


class Mirror:
    def __init__(self, url: str):
        """Raises: ConfigError for a URL that is none."""
        self.url = re.sub(r"//[^/@]*@", "//", url.partition("?")[0])  # without credentials, for messages
        if url.startswith("s3://") and "allow_delayed_open" not in url:
            url += (
                "&" if "?" in url else "?"
            ) + "allow_delayed_open=true"  # a small object (the record) is one request, not three
        try:
            self.files, self.root = fs.FileSystem.from_uri(url)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ConfigError(
                f"{MIRROR} = {self.url!r} is no address of an object store ({error}); it looks like s3://bucket/prefix"
            ) from None

    def _place(self, kind: str, key: str, *rest: str) -> str:
        return "/".join([self.root.rstrip("/"), "artifacts", kind, key, *rest])

    def load(self, kind: str, key: str) -> ArtifactRecord | None:
        """The record that counts, if there is one."""
        with self._told(f"read {kind} {key}"):
            if self.files.get_file_info(self._place(kind, key, RECORD)).type == fs.FileType.NotFound:
                return None
            with self.files.open_input_stream(self._place(kind, key, RECORD)) as stream:
                return ArtifactRecord.model_validate_json(stream.read())

    def push(self, store: Store, record: ArtifactRecord) -> bool:
        """Put a signed artifact; whether there was anything to put. Files first, the record last."""
        if (there := self.load(record.kind, record.key)) is not None and there.content == record.content:
            return False
        directory = store.directory(record.kind, record.key)
        with self._told(f"put {record.kind} {record.key}"):
            for file in record.files:
                target = self._place(record.kind, record.key, record.content, file.name)
                if isinstance(self.files, fs.LocalFileSystem):
                    self.files.create_dir(target.rpartition("/")[0])
                with open(directory / file.name, "rb") as source, self.files.open_output_stream(target) as sink:
                    while chunk := source.read(CHUNK):
                        sink.write(chunk)
            with self.files.open_output_stream(self._place(record.kind, record.key, RECORD)) as sink:
                sink.write(record.model_dump_json(indent=1).encode())
        return True

    def fetch(self, store: Store, kind: str, key: str) -> ArtifactRecord | None:
        """Bring an artifact into the store, in the place of unfinished work; the caller holds its lock. None if it is not there.

        Raises: ArtifactError if a file has other content than was signed; nothing is signed then.
        """
        record = self.load(kind, key)
        if record is None:
            return None
        directory = store.directory(kind, key)
        fetched = _keep_fetched(directory, record)
        with self._told(f"fetch {kind} {key}"):
            for file in record.files:
                target = directory / file.name
                if file.name in fetched:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = temporary_beside(target)
                with (
                    self.files.open_input_stream(self._place(kind, key, record.content, file.name)) as source,
                    open(temporary, "wb") as sink,
                ):
                    while chunk := source.read(CHUNK):
                        sink.write(chunk)
                    sink.flush()
                    os.fsync(sink.fileno())
                if digest_file(temporary) != file.sha256:
                    temporary.unlink()
                    raise ArtifactError(
                        f"{self.url}: {kind} {key}: {file.name} has other content than was signed; delete artifacts/{kind}/{key} there, and it is built again"
                    )
                os.replace(temporary, target)
        write_atomic(directory / RECORD, record.model_dump_json(indent=1))
        return record

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """An object store that does not answer is worth another try."""
        try:
            yield
        except OSError as error:
            raise TransientError(f"{self.url}: could not {what}: {str(error)[:500]}") from None


def _keep_fetched(directory: Path, record: ArtifactRecord) -> set[str]:
    """Remove what is not of this build: shards cut otherwise, with their seals, would be read beside it. What an earlier fetch brought whole."""
    wanted, kept = {file.name: file for file in record.files}, set()
    for path in [path for path in directory.rglob("*") if path.is_file() and path.name not in NOT_DATA]:
        file = wanted.get(path.relative_to(directory).as_posix())
        if file is not None and path.stat().st_size == file.size and digest_file(path) == file.sha256:
            kept.add(file.name)
        else:
            path.unlink()
    return kept


def mirror_from_environment() -> Mirror | None:
    return Mirror(os.environ[MIRROR]) if os.environ.get(MIRROR) else None


def evict(store: Store, mirror: Mirror, keep_bytes: int) -> list[ArtifactRecord]:
    """Remove the artifacts that were longest unused until the cache holds at most `keep_bytes`; only what lies in the mirror, bit for bit."""
    records = sorted(
        store.records(), key=lambda record: (store.directory(record.kind, record.key) / RECORD).stat().st_atime
    )
    held = sum(file.size for record in records for file in record.files)
    gone = []
    for record in records:
        if held <= keep_bytes:
            break
        there = mirror.load(record.kind, record.key)
        if there is None or there.content != record.content:
            continue
        store.discard(record.kind, record.key)
        held -= sum(file.size for file in record.files)
        gone.append(record)
    return gone


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts.mirror", description="Artifacts to and from an object store."
    )
    parser.add_argument("verb", choices=["push", "fetch", "evict"])
    parser.add_argument("url")
    parser.add_argument("names", nargs="*", metavar="KIND/KEY", help="push: all, unless named")
    parser.add_argument("--store")
    parser.add_argument("--keep-gib", type=float, default=0.0, help="evict: what may stay")
    options = parser.parse_args(arguments)
    try:
        store, mirror = Store(options.store), Mirror(options.url)
        if options.verb == "evict":
            for record in evict(store, mirror, int(options.keep_gib * 2**30)):
                print(f"removed {record.kind}/{record.key}")
        elif options.verb == "push":
            for record in [store.resolve(name) for name in options.names] or store.records():
                print(f"{record.kind}/{record.key} {'put' if mirror.push(store, record) else 'is there'}")
        else:
            for name in options.names:
                kind, _, key = name.partition("/")
                with store.lock(kind, key):
                    print(f"{name} {'fetched' if mirror.fetch(store, kind, key) else 'is not there'}")
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
