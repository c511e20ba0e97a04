"""Stages - a running stage: its settings, inputs and output directory, and the ways in which it reports."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_contracts import lease
from data_contracts.artifact import ArtifactRef
from data_contracts.files import write_atomic
from data_contracts.set_aside import set_files_aside
from data_contracts.shards import shard_is_whole, shard_path, to_table, write_shard
from stages.running.claims import Claims, label_of, poison, raise_poison
from stages.running.cost import FORWARD, parameters
from stages.running.history import EVENTS

if TYPE_CHECKING:
    from stages.stage import Stage


class Shard(NamedTuple):
    """A shard that is to be made."""

    number: int
    items: Sequence[Any]
    finish: Callable[[], None]
    """To be called once it is written."""


class Job:
    """Settings, inputs and output directory of a running stage, and the ways in which it reports."""

    def __init__(
        self, stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], out: Path, claims: Claims | None = None
    ):
        """claims: set if this process is one of several workers on the artifact."""
        self.stage, self.config, self.inputs, self.out, self.claims = stage, config, inputs, out, claims
        self.events = out / EVENTS
        if claims is not None:
            self.events = out / f".events-{platform.node()}-{os.getpid()}-{claims.number}.jsonl"
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._bar: Any = None
        self.on_shard: Callable[[int, int], None] = lambda count, total: self.progress(count, total, "shards")
        """Called with the number of finished shards; a stage that counts something smaller replaces it."""

    def path(self, name: str) -> Path:
        """Return the directory of an input."""
        return Path(self.inputs[name].path)

    @property
    def is_worker(self) -> bool:
        """Whether this process only makes its share of the shards; the launcher checks the whole and signs."""
        return self.claims is not None

    @property
    def store_root(self) -> Path:
        """The directory of the store that the artifact is in."""
        return self.out.parent.parent.parent

    def log(self, text: str) -> None:
        """Write a line to the stage's log."""
        print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """Append to the history of this build, over all its tries."""
        if self.claims is not None:
            values["worker"] = self.claims.number
        with open(self.events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": name, "time": time.time(), "pid": os.getpid(), **values}) + "\n")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count these seconds under `name` in the record.

        The name "waiting" is for other machines' work: it is no busy time.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            self.event("seconds", what=name, seconds=time.monotonic() - start)

    def used(
        self, model: Path | str, tokens_in: int, tokens_out: int = 0, per_token: int = FORWARD, **counts: int
    ) -> None:
        """Account for the tokens that a model read and wrote, without padding, and for the FLOPs they took.

        model: its directory; "" for a model behind a server, whose FLOPs are not ours. counts: cache_hits,
            cache_misses.
        """
        flops = per_token * parameters(str(model)) * (tokens_in + tokens_out) if model else 0
        self.event("used", tokens_in=int(tokens_in), tokens_out=int(tokens_out), flops=int(flops), **counts)

    def progress(self, count: int, total: int, unit: str) -> None:
        """Show progress: a bar on a terminal, else one line of JSON for the task that watches this process."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self._bar is None:
                self._bar = tqdm(total=total, unit=unit, desc=self.stage.name)
            self._bar.update(count - self._bar.n)
        else:
            print("@progress " + json.dumps({"done": count, "total": total, "unit": unit}), flush=True)

    def missing_shards(
        self, items: Sequence[Any], size: int, kind: str, beside: Sequence[str] = ()
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        """Cut `items` into shards and yield those that no earlier try finished: (index, items of the shard).

        beside: kinds of files that are written with every shard, under its number (scores, dropped); a shard without
            one of them is made again.

        Shards of an earlier try with another shard size are set aside.
        """
        for shard in self.shards_ahead(items, size, kind, beside):
            if shard is not None:
                yield shard.number, shard.items
                shard.finish()

    def shards_ahead(
        self, items: Sequence[Any], size: int, kind: str, beside: Sequence[str] = ()
    ) -> Iterator[Shard | None]:
        """As `missing_shards`, for a caller that reads several shards ahead and calls `finish` when one is written.

        None asks to finish all of them before reading on (see Claims.share_ahead).
        """
        count = max(1, -(-len(items) // size))
        self._agree_on(json.dumps({"items": len(items), "size": size}))

        def cut(index: int) -> Sequence[Any]:
            return items[index * size : (index + 1) * size]

        if self.claims is None:
            for index in range(count):
                if self.has_shard(index, kind, beside):
                    self.on_shard(index + 1, count)
                else:
                    yield Shard(index, cut(index), partial(self.on_shard, index + 1, count))
            return
        claims = self.claims

        def finish(index: int) -> None:
            claims.finish(index)
            self.on_shard(len(list(self.out.glob("part-?????.parquet"))), count)

        is_done = partial(self.has_shard, kind=kind, beside=beside)
        for index in claims.share_ahead("part", count, is_done, lambda index: label_of(cut(index))):
            yield None if index is None else Shard(index, cut(index), partial(finish, index))

    def share(self, name: str, parts: Sequence[Any], is_done: Callable[[Any], bool]) -> Iterator[tuple[int, Any]]:
        """Yield (index, part) of the parts that this process is to do: all of them, or a worker's share.

        Ends when every part is done.

        Raises: StageError for a part that failed twice.
        """
        if self.claims is None:
            yield from enumerate(parts)
            return
        for index in self.claims.share(
            name, len(parts), lambda index: is_done(parts[index]), lambda index: f"from row {parts[index]}"
        ):
            yield index, parts[index]
        if failed := [shard for shard in poison(self.out) if shard.name.startswith(f"{name}-")]:
            raise_poison(self.stage.name, failed)

    def _agree_on(self, cut: str) -> None:
        """Make all tries and workers cut the work alike: shards of another cut are set aside."""
        plan = self.out / ".plan"
        with self.claims.alone("plan") if self.claims else nullcontext():
            if plan.is_file() and plan.read_text(errors="replace") == cut:
                return
            if shards := sorted(self.out.glob("*-?????.parquet")):  # with the scores and drops beside them
                why = "an earlier try cut the work into other shards (another shard size, or its plan is lost)"
                aside = set_files_aside(self.store_root, self.out, shards, why, by="a build")
                self.log(f"{why}: they lie in {aside}")
            write_atomic(plan, cut)

    def has_shard(self, index: int, kind: str, beside: Sequence[str] = ()) -> bool:
        """Whether an earlier try finished the shard and the files beside it."""
        paths = {kind: shard_path(self.out, index)} | {other: shard_path(self.out, index, other) for other in beside}
        return all(shard_is_whole(path, schema) for schema, path in paths.items())

    def write(self, index: int, rows: Sequence[Mapping[str, Any]], kind: str | None = None) -> None:
        """Write one shard of the artifact, atomically."""
        lease.check_fence(self.store_root, f"{self.stage.produces}-{self.out.name}")
        write_shard(shard_path(self.out, index), to_table(rows, kind or self.stage.produces))
        self.event("shard", index=index, rows=len(rows))
