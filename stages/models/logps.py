"""Stages - the log-prob store: what a frozen model thinks of a response is computed once, for all stages, iterations and runs.

    <root>/logps/<model content>-<dtype>-<kind>/part-<digest>.parquet       rows (digest of prompt and response ids, one number per token)

A model is addressed by the content of its files, so a changed one cannot hit an old entry. SWIFT's policy pass is the reference pass of the
same iteration; a teacher's pass over the ground truths is paid in the first iteration only. Deleting the directory costs time, nothing else.
In bf16 an entry may differ in its last bits from one computed beside other rows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ArtifactError, ContractError
from data_contracts.shards import read_shard, to_table, write_shard
from stages.models.policy import load_causal_lm, pick_device, pin_threads, score_responses
from stages.models.tokens import context_length

VERSION = "1"
"""Bumped when the numbers of a pass change their meaning."""

Score = Callable[[Any, Sequence[Sequence[int]], Sequence[Sequence[int]], int], list[np.ndarray]]


def row_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16 bytes for one response to one prompt; the seam counts."""
    digest = hashlib.sha256(len(prompt).to_bytes(8, "little"))
    digest.update(np.asarray(prompt, dtype=np.int32).tobytes())
    digest.update(np.asarray(response, dtype=np.int32).tobytes())
    return digest.digest()[:16]


class Pass:
    """One model's pass over responses. `fill` computes what is missing, part by part; `get` reads."""

    def __init__(
        self,
        root: Path,
        model: ArtifactRef,
        dtype: str,
        device: str,
        budget: int,
        kind: str = "logps",
        score: Score = score_responses,
    ):
        self.directory = root / "logps" / f"{model.content[:16]}-{dtype}-{kind}-{VERSION}"
        self.model, self.dtype, self.device, self.budget, self.score = model, dtype, device, budget, score
        self.loaded: Any = None
        self.hits, self.misses = 0, 0
        self.told = (0, 0)
        self.tokens_read = 0
        """Prompts and responses that went through the model; what was found stored cost nothing."""
        self.parts: list[Path] = []
        self.where: dict[bytes, int] = {}  # key -> part * 2^32 + row: a tuple would take half as much again
        self.cached: tuple[Path | None, list[Any]] = (None, [])
        self.seen: set[str] = set()
        self.next_look = 0.0
        """When `fill` may read the directory again: a twentieth of its time at most goes into that."""

    def _refresh(self) -> None:
        """Learn of the parts that others wrote since: another role of the same model, another run."""
        began = time.monotonic()
        # Names only: a Path for each of thousands of parts, at every shard, would make a row dearer the more of them there are.
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        self.next_look = time.monotonic() + 20 * (time.monotonic() - began)
        for name in sorted(
            name for name in names if name.startswith("part-") and name.endswith(".parquet") and name not in self.seen
        ):
            self._index(self.directory / name)

    def _index(self, path: Path) -> None:
        self.seen.add(path.name)
        try:
            # The numbers too, though only the keys are kept: damage must be found here, where the rows are still computed again.
            keys = read_shard(path, "token_logps")["key"].to_pylist()
        except (ArtifactError, ContractError):
            path.unlink(missing_ok=True)
            return
        first = len(self.parts) << 32
        self.parts.append(path)
        for number, key in enumerate(keys):
            self.where.setdefault(key, first + number)

    def fill(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> int:
        """Make sure that every row is there; the missing ones are one part, written whole. Returns how many were missing."""
        wanted = {
            row_key(prompt, response): (prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        }
        # What another run has just written would be found; but thousands of names read at every shard would cost more than that is worth.
        if not wanted.keys() <= self.where.keys() and time.monotonic() >= self.next_look:
            self._refresh()
        missing = {key: row for key, row in wanted.items() if key not in self.where}
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

    def has(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> bool:
        """Whether every row is there, by this process or another."""
        self._refresh()
        return all(row_key(prompt, response) in self.where for prompt, response in zip(prompts, responses, strict=True))

    def _score_within_context(self, rows: list[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Tokens beyond the model's context are NaN: a teacher may be shorter than the policy."""
        context = context_length(self.model.path)
        kept = [
            (prompt, response if context is None else response[: max(0, context - len(prompt))])
            for prompt, response in rows
        ]
        inside = [(prompt, response) for prompt, response in kept if len(response)]
        scored = iter(self.score(self._load(), *zip(*inside, strict=True), self.budget)) if inside else iter(())
        self.tokens_read += sum(len(prompt) + len(response) for prompt, response in inside)
        values = []
        for (_, response), (_, cut) in zip(rows, kept, strict=True):
            row = np.full(len(response), np.nan, dtype=np.float32)
            if len(cut):
                row[: len(cut)] = next(scored)
                if not np.isfinite(row[: len(cut)]).all():
                    raise ContractError(
                        f"the pass of {self.model.path}: log-probs of {len(cut)} tokens hold NaN or infinity: the model's weights are damaged"
                    )
            values.append(row)
        return values

    def get(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The stored rows, in the order asked for."""
        found = []
        if any(
            row_key(prompt, response) not in self.where for prompt, response in zip(prompts, responses, strict=True)
        ):
            self._refresh()  # made by another worker
        for prompt, response in zip(prompts, responses, strict=True):
            part, number = divmod(self.where[row_key(prompt, response)], 1 << 32)
            path = self.parts[part]
            if self.cached[0] != path:
                self.cached = (path, self._read(path))
            found.append(np.asarray(self.cached[1][number].values, dtype=np.float32))
        return found

    def _read(self, path: Path) -> Any:
        try:
            return pq.read_table(path, columns=["logps"], page_checksum_verification=True)["logps"].combine_chunks()
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}). Delete it and run again: only its rows are computed anew"
            ) from None

    def _load(self) -> Any:
        if self.loaded is None:
            pin_threads(None)
            self.loaded = load_causal_lm(self.model.path, self.dtype, pick_device(self.device)).eval()
        return self.loaded

    def account(self, job: Any) -> None:
        """Tell the job what was read since the last time, and what was found."""
        job.used(
            self.model.path,
            self.tokens_read,
            cache_hits=self.hits - self.told[0],
            cache_misses=self.misses - self.told[1],
        )
        self.tokens_read, self.told = 0, (self.hits, self.misses)

    def release(self) -> None:
        """Drop the model: the next pass needs the memory."""
        self.loaded = None
