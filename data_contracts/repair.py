"""Contracts - damaged artifacts: repaired from their inputs, or set aside with what is whole left to be built upon.

Nothing is deleted. The caller of each function holds the artifact's lock.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_contracts.artifact import NOT_DATA, RECORD, ArtifactRecord
from data_contracts.errors import ArtifactError, NewerRecordError
from data_contracts.files import link_or_copy, open_atomic
from data_contracts.identity import digest_file
from data_contracts.set_aside import REASON, set_aside, set_files_aside
from data_contracts.store import Store

SHARD = re.compile(r"[a-z_]+-(\d{5})\.parquet")


def set_damaged_aside(store: Store, kind: str, key: str, why: str) -> Path:
    """Set a damaged artifact aside and leave unfinished work in its place; return where the artifact lies now.

    The unfinished work has the whole shards, as links to the same bytes, so that the next build makes only what is
    missing: a damaged shard with the files of the same number beside it, and every file that is no shard.
    """
    directory = store.directory(kind, key)
    try:
        record = store.load(kind, key)
    except NewerRecordError:
        raise
    except ArtifactError:
        record = None
    damaged_names = list(store.damaged_files(record, deep=True)) if record else []
    damaged_numbers = {match[1] for name in damaged_names if (match := SHARD.fullmatch(name))}
    aside = set_aside(store.root, directory, why, by="a build")
    for path in sorted(aside.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.name in (RECORD, REASON) or ".tmp-" in path.name:
            continue
        is_hidden = any(part.startswith(".") or part == "resume" for part in path.relative_to(aside).parts)
        match = SHARD.fullmatch(path.name)
        is_whole_shard = match is not None and match[1] not in damaged_numbers
        if is_hidden or path.name in NOT_DATA or is_whole_shard:
            link_or_copy(path, directory / path.relative_to(aside))
    return aside


def repair_from_inputs(store: Store, record: ArtifactRecord) -> list[str]:
    """Replace an artifact's damaged files by equal files of its inputs, if all of them can be; set the damaged ones
    aside.

    A checkpoint shares its tokenizer and chat template with the policy it was trained from.
    Returns: a sentence per replacement; [] if a file could not be replaced, and then nothing was changed.
    """
    directory = store.directory(record.kind, record.key)
    sha256 = {file.name: file.sha256 for file in record.files}
    damaged_names = list(store.damaged_files(record))
    sources = {name: _equal_file(store, record, name, sha256[name]) for name in damaged_names}
    replacements = {name: source for name, source in sources.items() if source is not None}
    if len(replacements) < len(sources):
        return []
    sentences = [f"{name} was replaced by {source}, which is what was signed" for name, source in replacements.items()]
    damaged_paths = [directory / name for name in damaged_names if (directory / name).exists()]
    if damaged_paths:
        aside = set_files_aside(store.root, directory, damaged_paths, "not what was signed", by="a build")
        sentences.append(f"what was there lies in {aside}")
    for name, source in replacements.items():
        with open_atomic(directory / name) as file:
            file.write(source.read_bytes())
    return sentences


def _equal_file(store: Store, record: ArtifactRecord, name: str, sha256: str) -> Path | None:
    """Return the file of an input that has this name and digest, or None."""
    for ref in record.inputs.values():
        path = Path(store.here(ref).path) / Path(name).name
        if path.is_file() and digest_file(path) == sha256:
            return path
    return None
