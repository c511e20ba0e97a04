"""Stages - what a stage is, and the one way to run one: check, work shard by shard, sign.

A stage reads finished artifacts and writes exactly one new artifact; nothing is passed in memory. `python -m stages NAME SPEC.json` is the
same command that a task and a human type.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from data_contracts import lease
from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import Config, Runtime, parse
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.identity import fingerprint
from data_contracts.shards import count_rows, shard_is_whole, shard_path, to_table, write_shard
from data_contracts.store import Store, write_atomic
from stages.running.claims import Claims, forget, label_of, poison, raise_poison
from stages.running.cost import FORWARD, MemoryWatch, cost_of, loading, parameters

LOCK_HELD = "SELFPLAY_LOCK_HELD"
"""Environment: kind-key of the artifact whose lock the launcher already holds for us."""
EVENTS = ".events.jsonl"
REMOTE = "SELFPLAY_REMOTE"
"""Environment: the launcher is on another machine, so its lock cannot be inherited."""
SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|APIKEY|(API|ACCESS|PRIVATE|SECRET)_KEY|AUTH)($|_)", re.IGNORECASE
)
"""Names of environment variables whose values are nobody's business."""


class StageRuntime(Runtime):
    """How a stage is executed; shared by all of them."""

    python: str | None = None
    """Interpreter to run the stage with; another environment than the orchestrator's, e.g. one that has vLLM. None: the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if torch sees one."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables for the stage process, e.g. CUDA_VISIBLE_DEVICES."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Stop the stage after so long; None: never."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if secret := [name for name in env if SECRET.search(name)]:
            raise ValueError(
                f"{secret[0]} looks like a secret, and settings end in records, logs and MLflow: export it in the shell, every stage inherits it"
            )
        return env


class Stage(NamedTuple):
    name: str
    version: str
    """Bumped when the meaning of the output changes; the source is never hashed."""
    produces: str
    consumes: dict[str, str]
    """Input name -> artifact kind; a trailing "?" marks an optional input."""
    target: str
    """"module" with a `Config` class and `run(job)`."""
    section: str
    """Field of the run config that holds its settings."""
    phase: str
    """Column of a comparison's table of seconds: generation, scoring, weights, training or evaluation."""
    unit: str
    """What its seconds grow with: candidates, pairs, or answers."""
    is_sharded: bool = True
    """Whether several workers can share its shards."""
    after: str | None = None
    """Set for a stage that makes another artifact of the kind it reads: the stage whose output it refines in every iteration."""

    def load(self) -> Any:
        return importlib.import_module(self.target)

    def parse(self, config: Any) -> Config:
        return (
            parse(self.load().Config, config, f"settings of the stage {self.name}")
            if not isinstance(config, Config)
            else config
        )

    def key(self, config: Config, inputs: Mapping[str, ArtifactRef]) -> str:
        return fingerprint(self.name, self.version, config, {name: ref.content for name, ref in inputs.items()})

    def check_inputs(self, inputs: Mapping[str, ArtifactRef]) -> None:
        """Raises: ConfigError for a missing, unknown or wrong kind of input."""
        known = {name.rstrip("?"): kind for name, kind in self.consumes.items()}
        needed = {name for name in self.consumes if not name.endswith("?")}
        if missing := needed - inputs.keys():
            raise ConfigError(f"the stage {self.name} needs the input(s) {sorted(missing)}")
        for name, ref in inputs.items():
            if name not in known:
                raise ConfigError(f"the stage {self.name} knows no input {name!r}; it takes {sorted(known)}")
            if ref.kind != known[name]:
                raise ConfigError(f"the stage {self.name} takes {known[name]} as {name!r}, got {ref.kind} {ref.key}")


class Stages(dict[str, Stage]):
    """The stages of this package by name, in the order of an iteration; a stage of another package is looked up when it is named.

    Another package declares an entry point in the group `selfplay.stages` whose value is a `Stage`.
    """

    def __missing__(self, name: str) -> Stage:
        for point in entry_points(group="selfplay.stages"):
            if point.name == name:
                return point.load()
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        try:
            return self[str(name)] is not None
        except KeyError:
            return False


MODELS = ("reference", "policy", "teacher", "positive", "negative", "reward_model")
STAGES = Stages(
    (stage.name, stage)
    for stage in (
        Stage(
            "sample",
            version="1",
            produces="generations",
            consumes={"prompts": "prompts", "policy": "checkpoint"},
            target="stages.sampling.stage",
            section="sampling",
            phase="generation",
            unit="candidates",
        ),
        Stage(
            "score",
            version="1",
            produces="scored_pairs",
            consumes={
                "prompts": "prompts",
                "generations?": "generations",
                "policy?": "checkpoint",
                "start?": "checkpoint",
            },
            target="stages.scoring.stage",
            section="scoring",
            phase="scoring",
            unit="candidates",
        ),
        Stage(
            "weigh",
            version="1",
            produces="weighted_pairs",
            consumes={"pairs": "scored_pairs", "prompts?": "prompts"} | {f"{role}?": "checkpoint" for role in MODELS},
            target="stages.weighting.stage",
            section="weighting",
            phase="weights",
            unit="pairs",
        ),
        Stage(
            "train",
            version="1",
            produces="checkpoint",
            consumes={
                "pairs": "weighted_pairs",
                "more_pairs?": "weighted_pairs",
                "policy": "checkpoint",
                "reference?": "checkpoint",
                "teacher?": "checkpoint",
            },
            target="stages.training.stage",
            section="training",
            phase="training",
            unit="pairs",
            is_sharded=False,
        ),
        Stage(
            "evaluate",
            version="1",
            produces="eval_report",
            consumes={
                "prompts": "prompts",
                "generations": "generations",
                "policy": "checkpoint",
                "start": "checkpoint",
            },
            target="stages.evaluation.stage",
            section="evaluation",
            phase="evaluation",
            unit="answers",
            is_sharded=False,
        ),
    )
)


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
        lease.check(self.store_root, f"{self.stage.produces}-{self.out.name}")
        write_shard(shard_path(self.out, index), to_table(rows, kind or self.stage.produces))
        self.event("shard", index=index, rows=len(rows))


def execute(
    stage: Stage, config: Config, inputs: Mapping[str, ArtifactRef], store: Store, launched: float | None = None
) -> ArtifactRecord:
    """Build the artifact unless it is there; returns its record. The caller may already hold its lock (see LOCK_HELD).

    `launched`: when the process began (seconds since the epoch), so that importing libraries counts as start-up. None: now.
    """
    stage.check_inputs(inputs)
    key = stage.key(config, inputs)
    name = f"{stage.produces}-{key}"
    remote = bool(os.environ.get(REMOTE))
    if os.environ.get(LOCK_HELD) == name and not remote:
        return _build(stage, config, inputs, store, key, launched)
    # Far from the launcher, what keeps two builders apart is a lock of the builders' own.
    lock = store.lock(
        stage.produces,
        key + "-remote" * remote,
        lambda owner: print(f"{name} is being built by {owner}: waiting", flush=True),
    )
    with lock:
        if store.find(stage.produces, key):
            print(f"{stage.produces} {key} is already built", flush=True)
            return store.load(stage.produces, key)
        return _build(stage, config, inputs, store, key, launched)


def execute_share(stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], store: Store, worker: str) -> None:
    """Make shards of the artifact, beside other workers, until none is left; nothing is signed. Whoever started the workers holds its lock."""
    stage.check_inputs(inputs)
    _check_inputs_are_there(stage, inputs)
    key = stage.key(config, inputs)
    out = store.directory(stage.produces, key)
    # Under leases nobody's flock tells whether the launcher lives.
    claims = Claims(out, worker, None if lease.is_wanted() else store.root / "locks" / f"{stage.produces}-{key}")
    job = Job(stage, config, inputs, out, claims)
    job.event("worker")
    loading.seconds = 0.0
    try:
        stage.load().run(job)
    except BaseException as error:
        claims.failed(error)
        raise
    finally:
        job.event("seconds", what="load", seconds=loading.seconds)


def _check_inputs_are_there(stage: Stage, inputs: Mapping[str, ArtifactRef]) -> None:
    for name, ref in inputs.items():
        if not Path(ref.path).is_dir():
            raise ArtifactError(f"the input {name!r} of the stage {stage.name} is gone: {ref.path}")


def _build(
    stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], store: Store, key: str, launched: float | None
) -> ArtifactRecord:
    _check_inputs_are_there(stage, inputs)
    out = store.directory(stage.produces, key)
    out.mkdir(parents=True, exist_ok=True)
    for litter in out.rglob(".*.tmp-*"):
        litter.unlink()
    job = Job(stage, config, inputs, out)
    job.event("start", launched=launched or time.time())
    loading.seconds = 0.0
    with MemoryWatch() as watch:
        stage.load().run(job)
    job.event("seconds", what="load", seconds=loading.seconds)
    job.event("end")
    history = events(out)
    forget(out)
    record = ArtifactRecord(
        kind=stage.produces,
        key=key,
        stage=stage.name,
        version=stage.version,
        config=config.identity(),
        inputs=dict(inputs),
        content="",
        files=[],
        rows=count_rows(out),
        metrics=job.metrics,
        facts=job.facts,
        seconds=seconds_of(history),
        cost=cost_of(history, watch),
        provenance=provenance(config, history),
    )
    signed = store.sign(record)
    # After the signature: a kill in between costs the clean-up (the next look does it), not the training.
    shutil.rmtree(out / "resume", ignore_errors=True)
    return signed


def events(directory: Path) -> list[dict[str, Any]]:
    """The history of a build, of all its workers: start, shard, step, end of every try. A line cut by a kill, or damaged, is left out."""
    found = []
    for path in sorted(directory.glob(".events*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), float):
                found.append(event)
    # One process's lines stay as they are, whatever its clock did.
    return found if not any("worker" in event for event in found) else sorted(found, key=lambda event: event["time"])


def seconds_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all tries together.

    wall: each try from the launch of its process to the last thing it is known to have done. start_up: importing libraries and loading
    models (of tries that were killed: until the stage began). waiting: for others, e.g. a judge's server. busy: wall less these two.
    last_try: the wall of the last one. And whatever the stage timed by name; workers/...: what several workers took, added up.
    """
    tries: list[list[float]] = []
    named: dict[str, float] = {}
    imports = 0.0
    for event in history:
        if event["event"] in ("start", "share"):
            tries.append([event.get("launched", event["time"]), event["time"]])
            imports += max(0.0, event["time"] - tries[-1][0])
        elif tries:
            tries[-1][1] = event["time"]
        if event["event"] == "seconds" and {"what", "seconds"} <= event.keys():
            name = "workers/" * ("worker" in event) + event["what"]
            named[name] = named.get(name, 0.0) + event["seconds"]
    walls = [max(0.0, last - began) for began, last in tries] or [0.0]  # a clock that was set back takes no time away
    start_up, waiting = imports + named.pop("load", 0.0), named.pop("waiting", 0.0)
    busy = max(0.0, sum(walls) - start_up - waiting)
    return {"wall": sum(walls), "last_try": walls[-1], "start_up": start_up, "waiting": waiting, "busy": busy, **named}


def provenance(config: Config, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Who, when, on what. Never part of a key."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "argv": sys.argv,
        "starts": sum(event["event"] == "start" for event in history),
        "settings": config.model_dump(mode="json"),
        "versions": {
            name: getattr(module, "__version__", "?")
            for name in ("torch", "transformers", "vllm", "deepspeed", "lm_eval", "pyarrow")
            if (module := sys.modules.get(name))
        },
    }
