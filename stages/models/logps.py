"""Stages - the log-prob store: log-probs of a response under a frozen model, computed once for all stages and runs.

    <root>/logps/<model content>-<dtype>-<kind>[-padded]/part-<digest>.parquet
                                   rows (digest of prompt and response ids, one number per token)

A model is addressed by the content of its files, so a changed model cannot hit an old entry. SWIFT's policy pass is the
reference pass of the same iteration; a teacher's pass over the ground truths is paid in the first iteration only.
Deleting the directory costs time only. In bf16 an entry may differ in its last bits from the same entry computed beside
other rows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ArtifactError, ContractError
from data_contracts.shards import read_shard, to_table, write_shard
from data_contracts.store import logps_directory
from stages.models.families import attention_in
from stages.models.key_index import KeyIndex
from stages.models.memory import free_device_memory
from stages.models.policy import load_causal_lm, pick_device, pin_threads, score_responses
from stages.models.tokens import context_length

if TYPE_CHECKING:
    from torch.nn import Module

VERSION = "1"
"""Bumped when the numbers of a pass change their meaning."""

Ids = Sequence[Sequence[int]]
"""Token ids of several prompts or responses."""
Score = Callable[["Module", Ids, Ids, int], list[np.ndarray]]
"""(model, prompts, responses, token budget) -> one number per response token."""


def row_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Return 16 bytes that identify a response to a prompt; the same text cut elsewhere has another key."""
    digest = hashlib.sha256(len(prompt).to_bytes(8, "little"))
    digest.update(np.asarray(prompt, dtype=np.int32).tobytes())
    digest.update(np.asarray(response, dtype=np.int32).tobytes())
    return digest.digest()[:16]


class Account(Protocol):
    """What counts the work of models: a job, or what the score stage lends to a scorer."""

    @property
    def used(self) -> Callable[..., None]:
        """As Job.used."""
        ...


class Pass:
    """One model's per-token numbers of responses. `fill` computes and stores the missing rows; `get` reads."""

    def __init__(
        self,
        root: Path,
        model: ArtifactRef,
        dtype: str,
        device: str,
        budget: int,
        kind: str = "logps",
        score: Score = score_responses,
        packing: bool = True,
    ):
        """packing: the layout of a bf16 pass of log-probs, which is another function of the ids in each layout."""
        # Where a model must run with another attention than transformers' choice, older rows are of that choice.
        attention = f"{name}-" if (name := attention_in(model.path)) else ""
        layout = ""
        if not packing and kind == "logps":
            score = partial(score_responses, packing=False)
            layout = "padded-" if dtype != "float32" else ""
        self.directory = logps_directory(root, model.content, f"{dtype}-{kind}-{attention}{layout}{VERSION}")
        self.model, self.dtype, self.device, self.budget, self.score = model, dtype, device, budget, score
        self.loaded: Module | None = None
        self.hits, self.misses = 0, 0
        self.accounted = (0, 0)
        """Hits and misses that `account` has reported."""
        self.tokens_read = 0
        """Tokens of prompts and responses that went through the model; stored rows cost none."""
        self.parts: list[Path] = []
        self.rows = KeyIndex()
        """Key -> part * 2^32 + row."""
        self.last_read: tuple[Path, pa.ListArray] | None = None
        self.indexed: set[str] = set()
        self.next_refresh = 0.0
        """When `fill` may list the directory again: listing takes a twentieth of its time at most."""

    def _refresh(self) -> None:
        """Index the parts written since by others: another role of the same model, another run."""
        began = time.monotonic()
        # Names only: making a Path for each of thousands of parts, at every shard, would cost more per row the more
        # parts there are.
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        self.next_refresh = time.monotonic() + 20 * (time.monotonic() - began)
        for name in sorted(names):
            if name.startswith("part-") and name.endswith(".parquet") and name not in self.indexed:
                self._index(self.directory / name)

    def _index(self, path: Path) -> None:
        self.indexed.add(path.name)
        try:
            # Reads the numbers too, though only the keys stay: damage must be found now, while the rows can still be
            # computed again.
            keys = cast(list[bytes], read_shard(path, "token_logps")["key"].to_pylist())
        except (ArtifactError, ContractError):
            path.unlink(missing_ok=True)
            return
        first = len(self.parts) << 32
        self.parts.append(path)
        self.rows.add(keys, range(first, first + len(keys)))

    def fill(self, prompts: Ids, responses: Ids) -> int:
        """Compute and store the rows that are missing, as one part; returns how many were missing."""
        requested = {
            row_key(prompt, response): (prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        }
        # A refresh finds what another run has just written; reading thousands of names at every shard would cost more
        # than it saves.
        if time.monotonic() >= self.next_refresh and not self._are_stored(list(requested)):
            self._refresh()
        numbers = self.rows.find(list(requested))
        missing = {key: row for (key, row), number in zip(requested.items(), numbers, strict=True) if number < 0}
        self.misses += len(missing)
        self.hits += len(prompts) - len(missing)
        if missing:
            values = self._score_within_context(list(missing.values()))
            path = self.directory / f"part-{hashlib.sha256(b''.join(missing)).hexdigest()[:16]}.parquet"
            write_shard(
                path,
                to_table([{"key": key, "logps": row} for key, row in zip(missing, values, strict=True)], "token_logps"),
            )
            self._index(path)
        return len(missing)

    def has(self, prompts: Ids, responses: Ids) -> bool:
        """Whether every row is stored, by this process or another."""
        self._refresh()
        return self._are_stored([row_key(*row) for row in zip(prompts, responses, strict=True)])

    def _are_stored(self, keys: Sequence[bytes]) -> bool:
        return min(self.rows.find(keys), default=0) >= 0

    def _score_within_context(self, rows: list[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Return the numbers of each row; NaN for tokens beyond the model's context.

        A teacher's context may be shorter than the policy's.
        """
        context = context_length(self.model.path)
        scored_lengths = []
        for prompt, response in rows:
            scored_lengths.append(
                len(response) if context is None else min(len(response), max(0, context - len(prompt)))
            )
        inside = [
            (prompt, response[:length])
            for (prompt, response), length in zip(rows, scored_lengths, strict=True)
            if length
        ]
        scores = iter(
            self.score(self._load(), [row[0] for row in inside], [row[1] for row in inside], self.budget)
            if inside
            else ()
        )
        self.tokens_read += sum(len(prompt) + len(response) for prompt, response in inside)
        values = []
        for (_, response), length in zip(rows, scored_lengths, strict=True):
            row = np.full(len(response), np.nan, dtype=np.float32)
            if length:
                row[:length] = next(scores)
                if not np.isfinite(row[:length]).all():
                    raise ContractError(
                        f"the pass of {self.model.path}: log-probs of {length} tokens hold NaN or infinity: "
                        "the model's weights are damaged"
                    )
            values.append(row)
        return values

    def get(self, prompts: Ids, responses: Ids) -> list[np.ndarray]:
        """Return the stored rows, in the order given."""
        keys = [row_key(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        if not self._are_stored(keys):
            self._refresh()  # another worker computed them
        values = []
        for key, place in zip(keys, self.rows.find(keys), strict=True):
            if place < 0:
                raise KeyError(key)
            part, number = divmod(place, 1 << 32)
            path = self.parts[part]
            if self.last_read is None or self.last_read[0] != path:
                self.last_read = (path, self._read(path))
            values.append(np.asarray(self.last_read[1][number].values, dtype=np.float32))
        return values

    def _read(self, path: Path) -> pa.ListArray:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(["logps"])
            return cast(pa.ListArray, table["logps"].combine_chunks())
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}). Delete it and run again: only its rows are computed anew"
            ) from None

    def _load(self) -> Module:
        if self.loaded is None:
            pin_threads(None)
            self.loaded = load_causal_lm(self.model.path, self.dtype, pick_device(self.device)).eval()
        return self.loaded

    def account(self, account: Account) -> None:
        """Report the tokens read, and the rows found or computed, since the last call."""
        hits, misses = self.accounted
        account.used(self.model.path, self.tokens_read, cache_hits=self.hits - hits, cache_misses=self.misses - misses)
        self.tokens_read, self.accounted = 0, (self.hits, self.misses)

    def release(self) -> None:
        """Drop the model, and give its memory back: the next pass or engine needs it."""
        self.loaded = None
        free_device_memory()
