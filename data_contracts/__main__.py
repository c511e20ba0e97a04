"""python -m data_contracts ls [--kind K] | show KEY | explain KEY | verify [KEY ...] | ledger RUN [--csv]   [--store DIR]: what is in the store,
why, and what it cost.

KEY is a key, the start of one, or kind/key. Exit codes: 0, 2 the request is wrong, 4 `verify` found damage.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_contracts import ledger as ledgers
from data_contracts.artifact import RECORD, ArtifactRecord, ArtifactRef
from data_contracts.config import flatten
from data_contracts.errors import ArtifactError, PipelineError, print_error
from data_contracts.identity import fingerprint
from data_contracts.store import Store, content_digest, data_files

ABSENT = object()


def ls(store: Store, kind: str | None) -> int:
    """One line per finished artifact, oldest first."""
    rows = [
        (record.kind, record.key, str(record.rows), _when(record), f"{record.seconds.get('wall', 0):.1f}")
        for record in store.records(kind)
    ]
    if not rows:
        print(f"no {kind or 'artifact'} in {store.root}")
        return 0
    _print_table(("kind", "key", "rows", "when", "seconds"), rows, right=(2, 4))
    return 0


def show(store: Store, key: str) -> int:
    """Everything a record says."""
    record = store.resolve(key)
    print(f"{record.kind} {record.key}  (stage {record.stage}, version {record.version})")
    print(f"path     {store.directory(record.kind, record.key)}")
    print(f"built    {_when(record)} on {record.provenance.get('host', '?')}, {record.rows} rows")
    print(f"content  {record.content}")
    sections = {
        "config": flatten(record.config),
        "inputs": record.inputs,
        "metrics": record.metrics,
        "facts": flatten(record.facts),
    }
    for title, values in (sections | {"seconds": record.seconds, "cost": record.cost}).items():
        if values:
            print(f"\n{title}")
            _print_table((), [(f"  {name}", _say(value)) for name, value in values.items()])
    print("\nfiles")
    _print_table((), [(f"  {file.name}", str(file.size), file.sha256[:16]) for file in record.files], right=(1,))
    return 0


def explain(store: Store, key: str) -> int:
    """Why this artifact is not one of the others: the fields in which its recipe differs from the nearest sibling's."""
    record = store.resolve(key)
    siblings = [other for other in store.records(record.kind) if other.key != record.key]
    if not siblings:
        print(
            f"{record.kind} {record.key} is the only {record.kind} in {store.root}: there is nothing to compare it with"
        )
        return 0
    # The newest of the nearest: what was most likely meant to be found again.
    nearest = min(reversed(siblings), key=lambda other: len(_differences(record, other)))
    found = _differences(record, nearest)
    fields = "1 field" if len(found) == 1 else f"{len(found)} fields"
    print(f"{record.kind} {record.key} differs from its nearest sibling {nearest.key} ({_when(nearest)}) in {fields}:")
    for field, (here, there) in found.items():
        print(f"  {field} is {_say(here)} here, {_say(there)} there")
    for name, ref in record.inputs.items():
        if f"input {name}" in found and store.load(ref.kind, ref.key):
            print(f"  (why {name} differs: python -m data_contracts explain {_name(ref)})")
    return 0


def verify(store: Store, keys: Sequence[str]) -> int:
    """Read every byte again and compare it with what was signed; a line per problem. Raises: ArtifactError if there is one."""
    records = [store.resolve(key) for key in keys]
    directories = [store.directory(record.kind, record.key) for record in records]
    directories = directories or sorted(path for path in (store.root / "artifacts").glob("*/*") if path.is_dir())
    num_signed = num_bad = 0
    for directory in directories:
        name = f"{directory.parent.name}/{directory.name}"
        try:
            record = store.load(directory.parent.name, directory.name)
            problems = [] if record is None else _problems(store, record)
        except ArtifactError as error:
            record, problems = None, [str(error)]
        if record is None and not problems:
            shards = len(list(directory.glob("part-*.parquet")))
            print(
                f"{name}: unfinished ({shards} shard(s), last written {_stamp(_last_written(directory))}); the next build goes on from it"
            )
            continue
        num_signed += 1
        num_bad += bool(problems)
        for problem in problems:
            print(f"{name}: {problem}")
    print(f"{num_signed - num_bad} of {num_signed} finished artifact(s) are intact", flush=True)
    if num_bad:
        raise ArtifactError(
            f"{num_bad} artifact(s) in {store.root} are damaged; the next run that needs one of them builds it again"
        )
    return 0


def ledger(store: Store, run: str, as_csv: bool = False) -> int:
    """What a run cost: each artifact, each stage, everything; what was found instead of made; and the time that no stage accounts for."""
    account = ledgers.read(store, run)
    rows = ledgers.rows(account)
    if as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, names)
        writer.writeheader()
        writer.writerows(rows)
        return 0
    for by in (("step", "shown_as"), ("step",), ("stage",), ()):
        part = ledgers.total(rows, by)
        head, cells = ledgers.table(part, by)
        _print_table(head, cells, right=range(len(by), len(head)))
        print()
    for line in ledgers.summary(account) + ledgers.predicted(store, run):
        print(line)
    return 0


def _problems(store: Store, record: ArtifactRecord) -> list[str]:
    found = store.problems(record, deep=True)
    directory = store.directory(record.kind, record.key)
    signed = {file.name for file in record.files}
    found += [
        f"{name} is not in the record"
        for path in data_files(directory)
        if (name := path.relative_to(directory).as_posix()) not in signed
    ]
    recipe = fingerprint(
        record.stage, record.version, record.config, {name: ref.content for name, ref in record.inputs.items()}
    )
    if recipe != record.key or (record.kind, record.key) != (directory.parent.name, directory.name):
        found.append(f"{RECORD} does not belong here: its settings and inputs make the key {recipe}")
    if content_digest(record.files) != record.content:
        found.append(f"{RECORD} was changed: its content digest is not that of the files it lists")
    return found


def _differences(left: ArtifactRecord, right: ArtifactRecord) -> dict[str, tuple[Any, Any]]:
    """Field -> (value left, value right), where they differ; the fields are those that a key is made of."""
    here, there = _recipe(left), _recipe(right)
    pairs = {field: (here.get(field, ABSENT), there.get(field, ABSENT)) for field in here | there}
    return {field: pair for field, pair in pairs.items() if _content(pair[0]) != _content(pair[1])}


def _recipe(record: ArtifactRecord) -> dict[str, Any]:
    inputs = {f"input {name}": ref for name, ref in record.inputs.items()}
    return {"stage": record.stage, "version": record.version} | flatten(record.config, "config.") | inputs


def _content(value: Any) -> Any:
    return value.content if isinstance(value, ArtifactRef) else value


def _say(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if isinstance(value, ArtifactRef):
        return f"{_name(value)} with content {value.content[:16]}" + (
            f" ({value.path})" if value.key == "external" else ""
        )
    return f"{value:.6g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)


def _name(ref: ArtifactRef) -> str:
    return f"{ref.kind}/{ref.key}"


def _when(record: ArtifactRecord) -> str:
    return str(record.provenance.get("time", "?"))[:19].replace("T", " ")


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _last_written(directory: Path) -> float:
    return max(path.stat().st_mtime for path in (directory, *directory.iterdir()))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    lines = [head, *rows] if head else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def main(arguments: list[str]) -> int:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store", default=argparse.SUPPRESS, metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store"
    )
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts", description="What is in the store, and why.", parents=[shared]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", parents=[shared], help=ls.__doc__).add_argument(
        "--kind", help="only generations, checkpoint, ..."
    )
    commands.add_parser("show", parents=[shared], help=show.__doc__).add_argument("key")
    commands.add_parser("explain", parents=[shared], help=explain.__doc__).add_argument("key")
    commands.add_parser(
        "verify", parents=[shared], help="read every byte again; exit code 4 if one is wrong"
    ).add_argument("keys", nargs="*", metavar="KEY")
    bill = commands.add_parser("ledger", parents=[shared], help="what a run cost")
    bill.add_argument("run")
    bill.add_argument("--csv", action="store_true", help="one row per artifact, for a spreadsheet")
    options = parser.parse_args(arguments)
    store = Store(getattr(options, "store", None))
    try:
        if options.command == "ls":
            return ls(store, options.kind)
        if options.command == "verify":
            return verify(store, options.keys)
        if options.command == "ledger":
            return ledger(store, options.run, options.csv)
        return {"show": show, "explain": explain}[options.command](store, options.key)
    except PipelineError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
