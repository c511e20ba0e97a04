"""Flows - a run's pairs and generations as Parquet files in the common conversational format.

    preferences   prompt, chosen, rejected: lists of {role, content}; what a preference trainer reads
    responses     prompt, completion: the same for methods on single responses
    generations   prompt, completion: every candidate that a policy sampled

One file per configuration and iteration; the columns beside the messages say where a row comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError
from data_contracts.shard_rows import Row, RowsByPrompt, ShardRows
from data_contracts.shards import MESSAGES, shard_parts, shard_paths
from flows.cli.finished import PlayedRun
from flows.forecast.rehearsal import Step
from stages.scoring.pairing import PAIRINGS
from stages.stage import STAGES
from tasks.place import Purpose

PREFERENCES, RESPONSES, GENERATIONS = "preferences", "responses", "generations"
CONFIGURATIONS = {
    PREFERENCES: "what was trained on: a prompt, the preferred answer and the rejected one, with scores and win rates",
    RESPONSES: "what was trained on: a prompt and one answer, with its score and win rate",
    GENERATIONS: "every candidate that the policy of the iteration sampled",
}
_ORIGIN = [("iteration", pa.int32()), ("prompt_id", pa.string()), ("source", pa.string())]
_NUMBERS = ("score", "win_rate")
SCHEMAS = {
    PREFERENCES: pa.schema(
        [(name, MESSAGES) for name in ("prompt", "chosen", "rejected")]
        + [(f"{name}_{side}", pa.float64()) for name in _NUMBERS for side in ("chosen", "rejected")]
        + [("scorer", pa.string()), *_ORIGIN]
    ),
    RESPONSES: pa.schema(
        [(name, MESSAGES) for name in ("prompt", "completion")]
        + [(name, pa.float64()) for name in _NUMBERS]
        + [("scorer", pa.string()), *_ORIGIN]
    ),
    GENERATIONS: pa.schema(
        [(name, MESSAGES) for name in ("prompt", "completion")]
        + [("candidate", pa.int32()), ("finish_reason", pa.string()), *_ORIGIN]
    ),
}


def write_rows(run: PlayedRun, directory: Path) -> list[str]:
    """Write `<configuration>/iter_NN.parquet` below `directory`. Returns the configurations that have rows, what was
    trained on first. Raises: ConfigError if the run has built no rows yet.
    """
    is_single = PAIRINGS.get(run.config.pairing).is_single
    trained = RESPONSES if is_single else PREFERENCES
    kinds: dict[str, tuple[str, Callable[[Row], Row]]] = {
        trained: ("scored_pairs", _response if is_single else _preference),
        GENERATIONS: ("generations", _generation),
    }
    configurations: list[str] = []
    for name, (kind, convert) in kinds.items():
        for step in last_steps(run, kind):
            path = directory / name / f"{step.place.step}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(path, SCHEMAS[name]) as writer:
                for rows in _converted(run, step, kind, convert):
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMAS[name]))
            if name not in configurations:
                configurations.append(name)
    if not configurations:
        raise ConfigError(f"the run {run.config.name} has built no pairs and no generations yet: see `selfplay status`")
    return configurations


def last_steps(run: PlayedRun, kind: str) -> list[Step]:
    """Return each iteration's built artifact of a kind that its training went on with: the last refinement's."""
    steps: dict[int, Step] = {}
    for step in run.rehearsal.steps:
        if step.place.purpose == Purpose.TRAINING and STAGES[step.stage].produces == kind and step.record is not None:
            steps[step.iteration] = step
    return list(steps.values())


def _converted(run: PlayedRun, step: Step, kind: str, convert: Callable[[Row], Row]) -> Iterator[list[Row]]:
    """Yield the rows of an artifact, a shard's part at a time, with the messages of their prompts."""
    assert step.record is not None
    prompts = RowsByPrompt(ShardRows([_prompts_of(run, step).path], "prompts"))
    directory = run.history.store.directory(step.record.kind, step.record.key)
    for path in shard_paths(directory, kind):
        for part in shard_parts(path, kind):
            rows: list[Row] = part.to_pylist()
            prompt_groups = prompts.pick([row["prompt_id"] for row in rows])
            yield [
                {"prompt": prompt["messages"], "prompt_id": prompt["prompt_id"], "source": prompt["source"]}
                | {"iteration": step.iteration}
                | convert(row)
                for row, (prompt, *_) in zip(rows, prompt_groups, strict=True)
            ]


def _prompts_of(run: PlayedRun, step: Step) -> ArtifactRef:
    """The prompts that the rows of a step are about; a refinement may not have read them itself."""
    steps = [step, *(other for other in run.rehearsal.steps if other.place == step.place)]
    return next(other.inputs["prompts"] for other in steps if "prompts" in other.inputs)


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _preference(row: Row) -> Row:
    numbers = {name: row[name] for name in SCHEMAS[PREFERENCES].names if name.startswith(_NUMBERS)}
    return numbers | _messages(row, ("chosen", "rejected")) | {"scorer": row["scorer"]}


def _response(row: Row) -> Row:
    numbers = {name: row[f"{name}_chosen"] for name in _NUMBERS}
    return numbers | {"completion": _answer(row["chosen"]), "scorer": row["scorer"]}


def _generation(row: Row) -> Row:
    fields = {name: row[name] for name in ("candidate", "finish_reason")}
    return fields | _messages(row, ("completion",))


def _messages(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: _answer(row[name]) for name in names}
