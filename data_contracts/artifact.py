"""Contracts - what a finished artifact says about itself (`record.json`), and the reference that tasks pass on."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_contracts.errors import NewerRecordError

RECORD = "record.json"
RECORD_FORMAT = 1
NOT_DATA = frozenset({RECORD, "spec.json", "stage.log", "metrics.jsonl", "set_aside.json"})
"""Files beside the data that do not enter the content digest: they hold times, paths or explanations."""
EXTERNAL = "external"
"""The key of a model directory that the user brought: it lies outside of the store."""


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_FrozenModel):
    name: str
    """Relative to the artifact's directory, with forward slashes."""
    size: int
    sha256: str

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            raise ValueError(f"{name!r} leads out of the artifact's directory")
        return name


class ArtifactRef(_FrozenModel):
    """Where an artifact lies and what it holds: a few hundred bytes, passed between tasks instead of the data."""

    kind: str
    key: str
    """Its key in the store, or "external" for a model directory that the user brought."""
    path: str
    content: str
    """Digest over the digests of its data files. Keys of artifacts made from it contain this digest."""

    def __str__(self) -> str:
        return f"{self.kind} {self.key[:12]}"


class ArtifactRecord(_FrozenModel):
    """`record.json`. It is written last and in one step: whoever finds it may rely on every file that it lists."""

    kind: str
    key: str
    stage: str
    version: str
    config: dict[str, Any]
    """The resolved settings without their runtime part: exactly what was hashed."""
    inputs: dict[str, ArtifactRef]
    content: str
    files: list[FileDigest]
    rows: int
    """Rows in the Parquet shards; 0 for a checkpoint."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Scalars that a reader compares: counts, rates, means. Loss curves are in metrics.jsonl."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """Provenance that is not a number: tokenizer and template digests, library versions, device."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """All tries together: wall = start_up + waiting + busy. Also last_try, and what a stage adds."""
    cost: dict[str, float] = Field(default_factory=dict)
    """tokens_in, tokens_out, flops, peak_rss_bytes, peak_gpu_bytes, gpus, cache_hits, cache_misses; cpu_seconds of the
    last try."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Who built it, when and on what: commit, host, python, runtime settings, number of starts."""
    format: int = Field(default=RECORD_FORMAT, ge=1)
    """Version of this class. It goes up when an older program could misread a record; that program then refuses it."""

    def ref(self, path: str) -> ArtifactRef:
        """Return the reference to this artifact, which lies at `path`."""
        return ArtifactRef(kind=self.kind, key=self.key, path=path, content=self.content)


def parse_record(text: bytes | str, where: str) -> ArtifactRecord:
    """Return the record that `text` holds; `where` names it in messages.

    Raises: NewerRecordError for a record of a later format; ValueError for anything else that is no record.
    """
    try:
        data: Any = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(data, dict):
        version = cast(dict[str, Any], data).get("format", 1)
        if isinstance(version, int) and version > RECORD_FORMAT:
            raise NewerRecordError(
                f"{where} was written by a newer version of this program (record format {version}, this one reads "
                f"{RECORD_FORMAT}). Nothing was changed: update the program, or give this one another store"
            )
    return ArtifactRecord.model_validate(data)
