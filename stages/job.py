"""Stages - a running stage: its settings, inputs and output directory, and the ways in which it reports."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts import lease
from data_contracts.artifact import ArtifactRef
from data_contracts.files import write_atomic
from data_contracts.shards import shard_is_whole, shard_path, to_table, write_shard
from stages.running.claims import Claims, label_of, poison, raise_poison
from stages.running.cost import FORWARD, parameters
from stages.running.history import EVENTS

if TYPE_CHECKING:
    from stages.stage import Stage


class Job:
    """What a running stage holds: settings, inputs, its output directory, and the ways to report."""

    def __init__(
        self, stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], out: Path, claims: Claims | None = None
    ):
        """`claims`: this process is one of several workers on the artifact."""
        self.stage, self.config, self.inputs, self.out, self.claims = stage, config, inputs, out, claims
        self.events = out / (
            EVENTS if claims is None else f".events-{platform.node()}-{os.getpid()}-{claims.number}.jsonl"
        )
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._bar: Any = None
        self.on_shard: Callable[[int, int], None] = lambda done, total: self.progress(done, total, "shards")
        """Told how many shards are done; a stage that counts in something smaller puts its own here."""

    def path(self, name: str) -> Path:
        return Path(self.inputs[name].path)

    @property
    def is_worker(self) -> bool:
        """Whether this process only makes its share of the shards; somebody else looks at the whole and signs."""
        return self.claims is not None

    @property
    def store_root(self) -> Path:
        return self.out.parent.parent.parent

    def log(self, text: str) -> None:
        print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """Append to the history of this build, over all its tries."""
        values |= {} if self.claims is None else {"worker": self.claims.number}
        with open(self.events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": name, "time": time.time(), "pid": os.getpid(), **values}) + "\n")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count these seconds under `name` in the record; "waiting" is for a server that is not ours, and not busy."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.event("seconds", what=name, seconds=time.monotonic() - start)

    def used(
        self, model: Path | str, tokens_in: int, tokens_out: int = 0, per_token: int = FORWARD, **counts: int
    ) -> None:
        """Account for tokens that a model read and wrote, and so for FLOPs; `counts`: cache_hits, cache_misses. Tokens that are padding
        do not count."""
        flops = (
            per_token * parameters(str(model)) * (tokens_in + tokens_out) if model else 0
        )  # "": a model behind a server
        self.event("used", tokens_in=int(tokens_in), tokens_out=int(tokens_out), flops=int(flops), **counts)

    def progress(self, done: int, total: int, unit: str) -> None:
        """A bar for a person; one line of JSON for the task that watches this process."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self._bar is None:
                self._bar = tqdm(total=total, unit=unit, desc=self.stage.name)
            self._bar.update(done - self._bar.n)
        else:
            print("@progress " + json.dumps({"done": done, "total": total, "unit": unit}), flush=True)

    def missing_shards(
        self, items: Sequence[Any], size: int, kind: str, beside: Sequence[str] = ()
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        """Cut `items` into shards and yield those that no earlier try finished: (index, items of the shard).

        `beside`: what is written with every shard, under the same number (scores, dropped); one that is gone or damaged costs its shard.

        Another shard size than an earlier try's makes its shards useless: they are removed.
        """
        count = max(1, -(-len(items) // size))
        self._agree_on(json.dumps({"items": len(items), "size": size}))
        if self.claims is None:
            for index in range(count):
                if not self.has_shard(index, kind, beside):
                    yield index, items[index * size : (index + 1) * size]
                self.on_shard(index + 1, count)
            return
        label = lambda index: label_of(items[index * size : (index + 1) * size])  # noqa: E731
        for index in self.claims.share("part", count, lambda index: self.has_shard(index, kind, beside), label):
            yield index, items[index * size : (index + 1) * size]
            self.on_shard(len(list(self.out.glob("part-?????.parquet"))), count)

    def share(self, name: str, parts: Sequence[Any], is_done: Callable[[Any], bool]) -> Iterator[tuple[int, Any]]:
        """The parts of a piece of work that this process is to do: all of them, or its share. Returns when all are done by somebody.

        Raises: StageError if one was given up.
        """
        if self.claims is None:
            yield from enumerate(parts)
            return
        for index in self.claims.share(
            name, len(parts), lambda index: is_done(parts[index]), lambda index: f"from row {parts[index]}"
        ):
            yield index, parts[index]
        if found := [one for one in poison(self.out) if one.name.startswith(f"{name}-")]:
            raise_poison(self.stage.name, found)

    def _agree_on(self, wanted: str) -> None:
        """All tries and all workers cut alike; the shards of another cut are removed."""
        plan = self.out / ".plan"
        with self.claims.alone("plan") if self.claims else nullcontext():
            if not plan.is_file() or plan.read_text(errors="replace") != wanted:
                for path in self.out.glob("*-?????.parquet"):  # the shards, and the scores and drops beside them
                    path.unlink()
                write_atomic(plan, wanted)

    def has_shard(self, index: int, kind: str, beside: Sequence[str] = ()) -> bool:
        """Whether an earlier try left the shard, and all that belongs to it, whole."""
        return shard_is_whole(shard_path(self.out, index), kind) and all(
            shard_is_whole(shard_path(self.out, index, other), other) for other in beside
        )

    def write(self, index: int, rows: list[dict[str, Any]], kind: str | None = None) -> None:
        """Write one shard of the artifact, atomically."""
        lease.check_fence(self.store_root, f"{self.stage.produces}-{self.out.name}")
        write_shard(shard_path(self.out, index), to_table(rows, kind or self.stage.produces))
        self.event("shard", index=index, rows=len(rows))
