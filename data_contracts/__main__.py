"""python -m data_contracts COMMAND [--store DIR]: what is in the store, why it was built, and what it cost.

    ls [--kind KIND]       one line per finished artifact
    show KEY               all that a record says
    explain KEY            the fields in which an artifact's recipe differs from the most similar one's
    verify [KEY ...]       read every byte again
    ledger RUN [--csv]     what a run cost

KEY is a key, the start of one, or kind/key. Exit codes: 0; 2: the request is wrong; 4: `verify` found damage.
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
from data_contracts.artifact import EXTERNAL, RECORD, ArtifactRecord, ArtifactRef
from data_contracts.config import flatten
from data_contracts.errors import ArtifactError, NewerRecordError, PipelineError, print_error
from data_contracts.identity import fingerprint
from data_contracts.store import Store, content_digest, data_files
from data_contracts.streams import open_standard_streams
from data_contracts.words import plural

ABSENT = object()


def ls(store: Store, kind: str | None) -> None:
    """Print one line per finished artifact, oldest first."""
    rows = [
        (record.kind, record.key, str(record.rows), _build_time(record), f"{record.seconds.get('wall', 0):.1f}")
        for record in store.records(kind)
    ]
    if not rows:
        print(f"no {kind or 'artifact'} in {store.root}")
        return
    _print_table(("kind", "key", "rows", "when", "seconds"), rows, right=(2, 4))


def show(store: Store, key: str) -> None:
    """Print all that a record says."""
    record = store.resolve(key)
    print(f"{record.kind} {record.key}  (stage {record.stage}, version {record.version})")
    print(f"path     {store.directory(record.kind, record.key)}")
    print(f"built    {_build_time(record)} on {record.provenance.get('host', '?')}, {record.rows} rows")
    print(f"content  {record.content}")
    sections: dict[str, dict[str, Any]] = {
        "config": flatten(record.config),
        "inputs": dict(record.inputs),
        "metrics": dict(record.metrics),
        "facts": flatten(record.facts),
        "seconds": dict(record.seconds),
        "cost": dict(record.cost),
    }
    for title, values in sections.items():
        if values:
            print(f"\n{title}")
            _print_table((), [(f"  {name}", _in_words(value)) for name, value in values.items()])
    print("\nfiles")
    _print_table((), [(f"  {file.name}", str(file.size), file.sha256[:16]) for file in record.files], right=(1,))


def explain(store: Store, key: str) -> None:
    """Print why an artifact is not another one: the fields in which it differs from the most similar artifact."""
    record = store.resolve(key)
    siblings = [other for other in store.records(record.kind) if other.key != record.key]
    if not siblings:
        print(f"{_name(record)} is the only {record.kind} in {store.root}: there is nothing to compare it with")
        return
    # Of the most similar ones the newest: most likely it was meant to be found again.
    sibling = min(reversed(siblings), key=lambda other: len(_differences(record, other)))
    differences = _differences(record, sibling)
    print(
        f"{_name(record)} differs from the most similar {record.kind}, {sibling.key} of {_build_time(sibling)}, "
        f"in {plural(len(differences), 'field')}:"
    )
    for field, (value, sibling_value) in differences.items():
        print(f"  {field} is {_in_words(value)}, not {_in_words(sibling_value)}")
    for name, ref in record.inputs.items():
        if f"input {name}" in differences and store.load(ref.kind, ref.key):
            print(f"  (why {name} differs: selfplay explain {_name(ref)})")


def verify(store: Store, keys: Sequence[str]) -> None:
    """Read every byte again, compare it with what was signed, and print a line per problem.

    Raises: ArtifactError if there is a problem.
    """
    records = [store.resolve(key) for key in keys]
    directories = [store.directory(record.kind, record.key) for record in records]
    if not directories:
        directories = [store.directory(kind, key) for kind, key in store.artifact_names()]
        for path in store.strangers():
            print(f"{path.relative_to(store.root)}: no artifact has such a name; it is left alone")
    num_signed = num_damaged = 0
    for directory in directories:
        name = f"{directory.parent.name}/{directory.name}"
        try:
            record = store.load(directory.parent.name, directory.name)
            problems = [] if record is None else _problems(store, record)
        except NewerRecordError as error:
            print(f"{name}: not verified: {error}")
            continue
        except ArtifactError as error:
            record, problems = None, [str(error)]
        if record is None and not problems:
            print(f"{name}: {_progress(directory)}")
            continue
        num_signed += 1
        num_damaged += bool(problems)
        for problem in problems:
            print(f"{name}: {problem}")
    print(f"intact: {num_signed - num_damaged} of {plural(num_signed, 'finished artifact')}", flush=True)
    if num_damaged:
        raise ArtifactError(
            f"{plural(num_damaged, 'damaged artifact')} in {store.root}; "
            "the next run that needs a damaged artifact builds what is missing"
        )


def ledger(store: Store, run: str, as_csv: bool = False) -> None:
    """Print what a run cost: each artifact, iteration and stage, the sum, and the time that no stage explains."""
    account = ledgers.read_account(store, run)
    rows = ledgers.cost_rows(account)
    if as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, names)
        writer.writeheader()
        writer.writerows(rows)
        return
    for by in (("step", "shown_as"), ("step",), ("stage",), ()):
        titles, cells = ledgers.format_table(ledgers.sum_rows(rows, by), by)
        _print_table(titles, cells, right=range(len(by), len(titles)))
        print()
    for line in ledgers.session_lines(account) + ledgers.estimate_lines(store, run):
        print(line)


def _progress(directory: Path) -> str:
    """Return in words how far an unfinished build is."""
    num_shards = len(list(directory.glob("part-*.parquet")))
    last_written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last_written))
    return f"unfinished ({plural(num_shards, 'shard')}, last written {when}); the next build continues it"


def _problems(store: Store, record: ArtifactRecord) -> list[str]:
    """Return what is wrong with an artifact: its files, files beside them, its key, its content digest."""
    problems = store.problems(record, deep=True)
    directory = store.directory(record.kind, record.key)
    signed_names = {file.name for file in record.files}
    for path in data_files(directory):
        name = path.relative_to(directory).as_posix()
        if name not in signed_names:
            problems.append(f"{name} is not in the record")
    inputs = {name: ref.content for name, ref in record.inputs.items()}
    key = fingerprint(record.stage, record.version, record.config, inputs)
    if key != record.key or (record.kind, record.key) != (directory.parent.name, directory.name):
        problems.append(f"{RECORD} does not belong here: its settings and inputs make the key {key}")
    if content_digest(record.files) != record.content:
        problems.append(f"{RECORD} was changed: its content digest is not that of the files it lists")
    return problems


def _differences(left: ArtifactRecord, right: ArtifactRecord) -> dict[str, tuple[Any, Any]]:
    """Return field -> (value left, value right) for the fields of the keys' recipes that differ."""
    left_recipe, right_recipe = _recipe(left), _recipe(right)
    pairs = {
        field: (left_recipe.get(field, ABSENT), right_recipe.get(field, ABSENT)) for field in left_recipe | right_recipe
    }
    return {field: pair for field, pair in pairs.items() if _hashed_part(pair[0]) != _hashed_part(pair[1])}


def _recipe(record: ArtifactRecord) -> dict[str, Any]:
    """Return the fields that a key is made of."""
    inputs = {f"input {name}": ref for name, ref in record.inputs.items()}
    return {"stage": record.stage, "version": record.version} | flatten(record.config, "config.") | inputs


def _hashed_part(value: Any) -> Any:
    if isinstance(value, ArtifactRef):
        return value.content
    return value


def _in_words(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if isinstance(value, ArtifactRef):
        path = f" ({value.path})" if value.key == EXTERNAL else ""
        return f"{_name(value)} with content {value.content[:16]}{path}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value)
    return str(value)


def _name(artifact: ArtifactRef | ArtifactRecord) -> str:
    return f"{artifact.kind}/{artifact.key}"


def _build_time(record: ArtifactRecord) -> str:
    return str(record.provenance.get("time", "?"))[:19].replace("T", " ")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    """Print aligned columns, those numbered in `right` flush right."""
    lines = [head, *rows] if head else list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store", default=argparse.SUPPRESS, metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store"
    )
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts", description="What is in the store, and why.", parents=[shared]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls_parser = commands.add_parser("ls", parents=[shared], help="one line per finished artifact, oldest first")
    ls_parser.add_argument("--kind", help="only generations, checkpoint, ...")
    show_parser = commands.add_parser("show", parents=[shared], help="all that a record says")
    show_parser.add_argument("key")
    explain_parser = commands.add_parser(
        "explain", parents=[shared], help="the fields in which an artifact differs from the most similar one"
    )
    explain_parser.add_argument("key")
    verify_parser = commands.add_parser(
        "verify", parents=[shared], help="read every byte again; exit code 4 if one is wrong"
    )
    verify_parser.add_argument("keys", nargs="*", metavar="KEY")
    ledger_parser = commands.add_parser("ledger", parents=[shared], help="what a run cost")
    ledger_parser.add_argument("run")
    ledger_parser.add_argument("--csv", action="store_true", help="one row per artifact, for a spreadsheet")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command of the module's docstring and return its exit code."""
    options = _parser().parse_args(arguments)
    store = Store(getattr(options, "store", None))
    try:
        if options.command == "ls":
            ls(store, options.kind)
        elif options.command == "show":
            show(store, options.key)
        elif options.command == "explain":
            explain(store, options.key)
        elif options.command == "verify":
            verify(store, options.keys)
        else:
            ledger(store, options.run, options.csv)
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))
