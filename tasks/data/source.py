"""Tasks - where rows come from, as people write it: a path, a set of the hub, or a mix of such; and what a run does
with them."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_contracts.config import Config

ColumnName = Literal[
    "prompt", "messages", "conversations", "instruction", "input", "context", "history", "system", "response", "output",
    "completion", "label", "chosen", "rejected", "real", "generated", "response_0", "response_1", "better_response_id",
    "checks", "source", "prompt_id",
]  # fmt: skip
"""Names that shapes are recognised by (tasks/data/shapes.py)."""
Columns = dict[ColumnName, str]


class Source(Config):
    """A file, a directory or a glob; or a data set of the hub; or a mix. A plain text is a `path`."""

    path: str | None = None
    """JSON lines, JSON, CSV, Parquet or Arrow, also as .gz, .bz2, .xz, .zst; a directory of them or of `save_to_disk`; or a
    glob."""
    hub_id: str | None = None
    """`owner/name` of a data set on the Hugging Face hub; fetched once, then read from the local cache."""
    name: str | None = None
    """Which configuration of `hub_id`, where it has several."""
    split: str | None = None
    """Which split, where there are several; without it, `train`."""
    revision: str | None = None
    """Commit, tag or branch of `hub_id`. Pin a commit if results are to be reproduced."""
    columns: Columns = Field({})
    """Which column of the data holds what, e.g. {prompt: question, response: answer}; then no other column is read."""
    limit: int | None = Field(None, ge=1)
    """So many rows, drawn by the run's seed."""
    mix: tuple[Share, ...] = ()
    """Several sources, each with the share that its weight says, as many rows as the scarcest one allows, or `limit` in
    all."""

    @model_validator(mode="before")
    @classmethod
    def _a_text_is_a_path(cls, value: Any) -> Any:
        if isinstance(value, str | os.PathLike):
            return {"path": os.fspath(value)}
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if sum((self.path is not None, self.hub_id is not None, bool(self.mix))) != 1:
            raise ValueError("give exactly one of `path`, `hub_id` and `mix`")
        for field in ("name", "revision"):
            if getattr(self, field) is not None and self.hub_id is None:
                raise ValueError(f"`{field}` goes with `hub_id`")
        if self.mix and (self.split is not None or self.columns):
            raise ValueError("`split` and `columns` go into the sources of the mix")
        return self

    @field_validator("columns")
    @classmethod
    def _each_column_once(cls, value: dict[str, str]) -> dict[str, str]:
        if len(set(value.values())) < len(value):
            raise ValueError("a column of the data can be one thing only")
        return value

    def __str__(self) -> str:
        if self.mix:
            return "mix of " + ", ".join(str(share.source) for share in self.mix)
        parts = [self.path or self.hub_id, self.name, self.split and f"split {self.split}", self.revision]
        return " ".join(str(part) for part in parts if part)


class Share(Config):
    """A source of a mix."""

    source: Source
    weight: float = Field(1.0, gt=0)
    """Its part of the rows, in proportion to the other weights."""


Source.model_rebuild()


class PromptsConfig(Config):
    """Which prompts train and which measure; docs/data.md."""

    train: Source
    """Training prompts: a path, {hub_id, name, split, revision} or {mix: [{source, weight}]}."""
    heldout: Annotated[float, Field(gt=0, lt=1)] | Source
    """Prompts that measure: another source, or the part of `train` that is held out, e.g. 0.05. None of them trains,
    not even nearly."""
    columns: Columns = Field({})
    """Which column of the data holds what, for sources that do not say it themselves, e.g. {prompt: question, response:
    answer}."""
    limit: int | None = Field(None, ge=1)
    """So many training rows, drawn by the run's seed."""
    overlong: Literal["refuse", "drop", "truncate_left"] = "refuse"
    """A prompt of more than sampling.max_prompt_tokens: refuse the run; drop the row; or cut the beginning of its
    texts, oldest turns first."""
    max_drop_rate: float = Field(0.5, ge=0, le=1)
    """Stop if this part of the rows, or more, cannot be used. 0: at the first one."""
    per_iteration: int | None = Field(None, ge=1)
    """Prompts of an iteration. None: all of them divided by the iterations (SPPO), or all with `reuse`."""
    reuse: bool = False
    """Every iteration trains on the same prompts (SPIN, SWIFT) instead of a part of its own (SPPO)."""
    answers_from_teacher: bool = False
    """Let models.teacher write the `response` of every prompt first (SeqKD; SPIN and SWIFT without ground truths)."""
    duplicate_similarity: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of n-grams from which a held-out prompt counts as being in the training set."""
    near_duplicates: Literal["refuse", "drop"] = "refuse"
    """A training prompt that is nearly a held-out one: refuse the run, or drop the row. Always dropped where `heldout`
    is a part of `train`."""

    @property
    def train_source(self) -> Source:
        """`train`, with the columns and the limit that stand beside it."""
        return _with_defaults(self.train, self.columns, self.limit)

    @property
    def heldout_source(self) -> Source | None:
        """`heldout`, with the columns that stand beside it; None: a part of `train`."""
        if isinstance(self.heldout, Source):
            return _with_defaults(self.heldout, self.columns, None)
        return None


def _with_defaults(source: Source, columns: Columns, limit: int | None) -> Source:
    update: dict[str, Any] = {"limit": source.limit if limit is None else limit}
    if source.mix:
        parts = (
            share.model_copy(update={"source": _with_defaults(share.source, columns, None)}) for share in source.mix
        )
        update["mix"] = tuple(parts)
    elif not source.columns:
        update["columns"] = columns
    return source.model_copy(update=update)
