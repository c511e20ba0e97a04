"""Shared by `kills`: a store after kills, compared file by file with one that nobody disturbed.

What may differ, because it tells of the run and not of its result:

- record.json: `seconds`, `cost`, `provenance`, the paths of inputs, and metrics of speed and of what was found; metrics.jsonl: its speeds
- stage.log, `.events*.jsonl`, `.workers/`: the history of the tries
- spec.json, .ranks.json: the path of the store; run.json: nothing
- report.md, comparison.json: the seconds, the date, the path of the store; comparison.md: all but its title; report.html, comparison.html: must be whole
- ledger.jsonl: compared by what was built: each artifact once
- mlflow.db: compared by runs, metrics and model versions; prefect/, digests/ and the content of lock files are not
- names in set_aside/: the date and the counter

Everything else is equal byte for byte, and there is no other file.
"""

from __future__ import annotations

import fcntl
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_contracts.identity import digest_file, digest_text
from flows.tracked import COMPLETE
from stages.stage import STAGES
from stages.training.speed import SPEEDS

NOT_COMPARED = ("prefect", "digests", "locks", "mlflow-artifacts")
HISTORY = re.compile(r"(^|/)(stage\.log|\.events.*\.jsonl|\.workers(/.*)?|mlflow\.db.*|ledger\.jsonl|set_aside\.json)$")
NOT_RESULTS = ("provenance", "seconds", "cost")
COST_METRIC = re.compile(r"/(seconds|cost)/")
"""Which of them there are depends on what a try found in the log-prob store."""
SPEED_METRIC = re.compile(r"seconds|per_second|(^|[ _])s$|cached|mfu|/s$|/(hits|misses)$")
"""Speeds, and what a try found: in the store, and in the store of log-probs."""
FOUND = re.compile(r"/cached$")
"""A session says whether it built an artifact or found it: two that send one artifact say both."""
LITTER = re.compile(r"\.tmp-")


def problems(expected: Path, actual: Path, sessions: int) -> list[str]:
    """Return what differs between an undisturbed store and one that was struck, a sentence each.

    sessions: how many processes have played the run in `actual`, killed ones included
    """
    before, after = contents(expected), contents(actual)
    sentences = [f"lost: {name}" for name in sorted(before.keys() - after.keys())]
    for name in sorted(after.keys() - before.keys()):
        word = "temporary file left behind" if LITTER.search(name) else "left behind"
        sentences.append(f"{word}: {name}")
    sentences += [
        f"other content: {name}" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]
    ]
    sentences += ledger_problems(expected, actual)
    sentences += logp_problems(expected, actual)
    sentences += mlflow_problems(expected, actual, sessions)
    sentences += [f"lock still held: {path.name}" for path in held_locks(actual)]
    return sentences


def contents(store: Path) -> dict[str, str]:
    """Return name -> digest of the result in every file and link of a store, but for what is not compared."""
    found: dict[str, str] = {}
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        room = name.split("/")[0]
        is_compared_apart = room in NOT_COMPARED or (room == "logps" and path.suffix in (".parquet", ".sha256"))
        if is_compared_apart and not LITTER.search(name):
            continue
        if path.is_dir() and not path.is_symlink() and not LITTER.search(name):
            if room == "set_aside" or path.name == "resume":
                found[_without_date(name) + "/"] = ""
            continue
        if HISTORY.search(name):
            continue
        found[_without_date(name)] = digest_of(path, store)
    return found


def _without_date(name: str) -> str:
    return re.sub(r"^set_aside/[\d-]{10}-([^/]*?)(\.\d+)?(/|$)", r"set_aside/\1\3", name)


def digest_of(path: Path, store: Path) -> str:
    """Return a digest of what a file says about the result of a run."""
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.name == "record.json":
        return digest_text(json.dumps(_result(json.loads(path.read_bytes())), sort_keys=True))
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return digest_text(json.dumps([_without_speed(line) for line in lines], sort_keys=True))
    if path.name == "spec.json":
        return digest_text(re.sub(r'"[^"]*/artifacts/', '"artifacts/', _spec(path, store)))
    if path.name == ".ranks.json":
        return digest_text(re.sub(r'"[^"]*/artifacts/', '"artifacts/', path.read_text(encoding="utf-8")))
    if path.name == "comparison.json":
        page = json.loads(path.read_bytes())
        page["variants"] = [_without_speed(row) for row in page["variants"]]
        return digest_text(json.dumps({name: value for name, value in page.items() if name != "seconds"}))
    if path.name == "comparison.md":  # tables of seconds; its figures are in the JSON
        return digest_text(path.read_text(encoding="utf-8").partition("\n")[0])
    if path.name == COMPLETE:  # digests of run.json's settings, and of MLflow's address, in which the store's path is
        return "whole" if path.read_text(encoding="utf-8").count("\n") == 2 else "cut"
    if path.name in ("report.html", "comparison.html"):
        return "whole" if path.read_text(encoding="utf-8").rstrip().endswith("</html>") else "cut"
    if path.name == "report.md":
        page = path.read_text(encoding="utf-8").replace("\\_", "_").replace(str(store.resolve()), "STORE")
        return digest_text("\n".join(_without_seconds(page.splitlines())))
    if path.suffix == ".svg":  # a figure of seconds is another one each time
        return "whole" if path.read_text(encoding="utf-8").rstrip().endswith("</svg>") else "cut"
    return digest_file(path)


def _spec(path: Path, store: Path) -> str:
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec.pop("store")
    return json.dumps(spec, sort_keys=True)


def _result(record: dict[str, Any]) -> dict[str, Any]:
    result = {name: value for name, value in record.items() if name not in NOT_RESULTS}
    result["metrics"] = _without_speed(record["metrics"])
    result["inputs"] = {
        name: {field: value for field, value in ref.items() if field != "path"}
        for name, ref in record["inputs"].items()
    }
    return result


def _without_speed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in SPEEDS and not SPEED_METRIC.search(name)}


def _without_seconds(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a report but for its date; of a table only the columns whose titles do not end in ` s`."""
    kept: list[int] | None = None
    for line in lines:
        if line.startswith("- built: "):
            continue
        if not line.startswith("|"):
            kept = None
            yield line
            continue
        cells = line.strip("|").split("|")
        if kept is None:
            kept = [number for number, cell in enumerate(cells) if not cell.strip().endswith(" s")]
        yield "|".join(cells[number].strip() for number in kept if number < len(cells))


def ledger_problems(expected: Path, actual: Path) -> list[str]:
    """Return what a ledger says to be built twice, or not at all, although the undisturbed one has it once."""
    sentences: list[str] = []
    for path in sorted(expected.glob("runs/*/ledger.jsonl")):
        name = path.relative_to(expected).as_posix()
        before, after = _built(path), _built(actual / name)
        sentences += [f"lost: {name} does not say what {' '.join(row)} cost" for row in sorted(before - after)]
        sentences += [f"doubled: {name} counts {' '.join(row)} twice" for row in sorted(after - before)]
    return sentences


def _built(path: Path) -> Counter[tuple[str, str, str]]:
    """Return how often each artifact counts as built by the run."""
    from data_contracts.ledger import cost_rows, read_account
    from data_contracts.store import Store

    store = Store(path.parent.parent.parent)
    if not path.is_file():
        return Counter()
    rows = cost_rows(read_account(store, path.parent.name))
    return Counter((row["step"], row["shown_as"], row["key"]) for row in rows if not row["cached"])


def logp_problems(expected: Path, actual: Path) -> list[str]:
    """Return which rows of log-probs are lost, doubled or others; their division into files may differ."""
    sentences: list[str] = []
    names = {path.name for store in (expected, actual) for path in store.glob("logps/*")}
    for name in sorted(names):
        before, after = _logp_rows(expected / "logps" / name), _logp_rows(actual / "logps" / name)
        keys_before, keys_after = _keys(before), _keys(after)
        if lost := sum((keys_before - keys_after).values()):
            sentences.append(f"lost: {lost} rows of logps/{name}")
        if doubled := sum((keys_after - keys_before).values()):
            sentences.append(f"doubled: {doubled} rows of logps/{name}")
        if not (lost or doubled) and before != after:
            sentences.append(f"other content: logps/{name}")
    return sentences


def _keys(rows: Counter[tuple[bytes, tuple[float, ...]]]) -> Counter[bytes]:
    return Counter(key for key, _ in rows.elements())


def _logp_rows(directory: Path) -> Counter[tuple[bytes, tuple[float, ...]]]:
    rows: Counter[tuple[bytes, tuple[float, ...]]] = Counter()
    for path in sorted(directory.glob("part-*.parquet")):
        table = pq.read_table(path, use_threads=False)
        rows.update(
            (key, tuple(values))
            for key, values in zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True)
        )
    return rows


class Mirror:
    """What MLflow's database says of the sessions of a store."""

    def __init__(self, path: Path):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            self.runs = database.execute(
                "select run_uuid, name, status, start_time from runs order by rowid"
            ).fetchall()
            self.parent_of = dict(
                database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
            )
            self.metrics = database.execute("select run_uuid, key, step, value from metrics").fetchall()
            self.params = database.execute("select run_uuid, key, value from params").fetchall()
            versions = "select name, value from model_version_tags where key = 'digest'"
            self.versions = Counter(database.execute(versions).fetchall())
        self.parents = [row for row in self.runs if row[0] not in self.parent_of]

    def last(self, name: str) -> str:
        """Return the id of the last session of a run."""
        return [row[0] for row in self.parents if row[1] == name][-1]

    def values(self, parent: str) -> Counter[tuple[str, str, int, float | None]]:
        """Return (child's name, metric, step, value) of one session, how often each; the value of a speed is None."""
        names = {row[0]: row[1] for row in self.runs if self.parent_of.get(row[0]) == parent} | {parent: ""}
        return Counter(
            (names[run], key, step, None if SPEED_METRIC.search(key) else value)
            for run, key, step, value in self.metrics
            if run in names and not COST_METRIC.search(key) and not FOUND.search(key)
        )


def mlflow_problems(expected: Path, actual: Path, sessions: int) -> list[str]:
    """Return what MLflow's copy of the run lacks, has twice, or says to be running still."""
    if not (expected / "mlflow.db").is_file():
        return []
    if not (actual / "mlflow.db").is_file():
        return ["lost: mlflow.db"]
    before, after = Mirror(expected / "mlflow.db"), Mirror(actual / "mlflow.db")
    sentences: list[str] = []
    for name in sorted({row[1] for row in before.parents}):
        of_name = [row for row in after.parents if row[1] == name]
        if not of_name:
            sentences.append(f"lost: MLflow has no run {name}")
            continue
        if len(of_name) > sessions:
            sentences.append(f"doubled: MLflow has {len(of_name)} runs {name} of {sessions} sessions")
        if of_name[-1][2] != "FINISHED":
            sentences.append(f"MLflow says that the last run {name} is {of_name[-1][2]}")
        values, others = before.values(before.last(name)), after.values(after.last(name))
        sentences += [f"lost: MLflow's {' '.join(map(str, row))}" for row in sorted(values - others, key=str)[:5]]
        sentences += [f"doubled: MLflow's {' '.join(map(str, row))}" for row in sorted(others - values, key=str)[:5]]
    running = [row for row in after.runs if row[2] == "RUNNING"]
    if running:
        sentences.append(f"left behind: MLflow says that {len(running)} dead runs are RUNNING")
    sentences += [f"lost: model version {row}" for row in before.versions - after.versions]
    sentences += [f"doubled: model version {row}" for row in after.versions - before.versions]
    return sentences


def mirror_problems(store: Path, mirror: Path) -> list[str]:
    """Return which artifacts that a stage built are not in the mirror, or not whole. `mirror`: its directory."""
    sentences: list[str] = []
    for path in sorted(store.glob("artifacts/*/*/record.json")):
        record = json.loads(path.read_bytes())
        if record["stage"] not in STAGES:  # prompts and merges are made by the run itself, on each machine
            continue
        directory = mirror / path.parent.relative_to(store)
        try:
            mirrored = json.loads((directory / "record.json").read_bytes())
            is_whole = all(
                digest_file(directory / mirrored["content"] / file["name"]) == file["sha256"]
                for file in record["files"]
            )
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:
            sentences.append(f"lost: {path.parent.relative_to(store)} is not in the mirror")
    return sentences


def held_locks(store: Path) -> list[Path]:
    """Return the lock files that some process holds."""
    held: list[Path] = []
    for path in sorted(store.glob("locks/*")) + sorted(store.glob("artifacts/*/*/.claims/*")):
        with suppress(FileNotFoundError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path)
    return held
