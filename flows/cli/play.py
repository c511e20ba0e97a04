"""Flows - a run or a comparison from the command line: check it, play it with a Prefect server, print what came out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from data_contracts.errors import ConfigError
from data_contracts.ledger import Ledger
from data_contracts.store import Store
from flows.cli.finished import read_run
from flows.cli.server import prefect_server, server_errors_explained
from flows.comparison import load_comparison
from flows.config import RunConfig, load_run
from flows.preflight import preflight
from flows.tracked import is_noted_complete

# Prefect reads its settings when it is imported. So the flows are imported below, after the server's address is known.

WIDTH = 80
"""Columns of a terminal that a table fits into, whatever the terminal: logs are read anywhere."""
GAP = "  "
ITERATION = "iteration"
TITLES = {
    "heldout_score": "score",
    "mean_tokens": "tokens",
    "start_logp": "start logp",
}
"""Column of a run's rows -> its title, where that is another."""


def play(config: str, overrides: dict[str, Any], root: str | None) -> None:
    """Play the run of a config file, print its table and where the report is. `root`: of the store."""
    store = Store(root)
    settings = load_run(config, overrides)
    refuse_missing_server(settings)
    preflight(settings, store)
    if (found := found_whole(settings, store)) is not None:
        print(f"run {settings.name} is complete: nothing is built, and neither Prefect nor MLflow is started")
        show_outcome(settings.name, found, root)
        return
    os.environ["SELFPLAY_OWN_PROCESS"] = "1"
    with prefect_server(store.root / "prefect") as url:
        from flows.run import self_play

        print(f"watch it at {url.removesuffix('/api')}", flush=True)
        with server_errors_explained(url):
            history = self_play(config=config, overrides=overrides, store=str(store.root))
    show_outcome(settings.name, history, root)
    Ledger(store, settings.name, history["session"]).end()


def found_whole(settings: RunConfig, store: Store) -> dict[str, Any] | None:
    """Return what the flow returns, of a run that ended whole and whose artifacts are all there and intact; else None.

    The report is written again, and the store tidied up, as the flow does.
    """
    if not is_noted_complete(settings, store):
        return None
    try:
        played = read_run(settings, store)
    except ConfigError:  # its artifacts are gone
        return None
    if any(step.record is None for step in played.rehearsal.steps):
        return None
    store.sweep()
    history = played.history
    report = history.write_report(plots=True)
    return {
        "final": played.rehearsal.final.path,
        "report": str(report),
        "headline": history.headline(),
        "rows": history.rows,
    }


def show_outcome(name: str, history: dict[str, Any], root: str | None) -> None:
    """Print a run's tables, its headline and where to go from here. `root`: of the store, if named."""
    print("\n\n".join(tables_of(name, history["rows"])) + "\n")
    print(history["headline"])
    for line in last_lines(name, history, root):
        print(line)


def play_comparison(config: str, overrides: dict[str, Any], root: str | None, size: str | None = None) -> None:
    """Play all variants of a comparison's config file, print its tables and where the report is."""
    store = Store(root)
    comparison = load_comparison(config, overrides, size)
    comparison.check(store)
    for variant in comparison.variants:
        refuse_missing_server(variant.config)
    with prefect_server(store.root / "prefect") as url:
        from flows.compare import compare

        print(f"watch it at {url.removesuffix('/api')}", flush=True)
        with server_errors_explained(url):
            result = compare(config=config, overrides=overrides, store=str(store.root), size=size)
    print(result["text"])
    print(f"report: {result['report']}")


def refuse_missing_server(settings: RunConfig) -> None:
    """Refuse a run whose work waits for workers of a server that nobody named. Raises: ConfigError."""
    profile = settings.execution.profile
    if profile in ("process-pool", "kubernetes") and not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            f"execution.profile is {profile}, and no Prefect server is named: "
            "export PREFECT_API_URL=http://HOST:4200/api, the server of the workers (docs/cluster.md)"
        )


def last_lines(name: str, history: dict[str, Any], root: str | None) -> list[str]:
    """Where the report and the trained model are, and the commands to go on with. `root`: of the store, if named."""
    store = f" --store {shlex.quote(root)}" if root else ""
    return [
        f"report: {history['report']} (and .html beside it, with curves)",
        f"what it cost: selfplay ledger {name}{store}",
        f"trained model: {history['final']}",
        f"take it out:   selfplay export {name} --to DIR{store}",
        f"talk to it:    selfplay chat {name}{store}",
    ]


def tables_of(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """One row per iteration: what was measured, then the seconds of each stage.

    Columns that do not fit into WIDTH go into a further table, with the iteration again.
    """
    columns = _columns_of(rows)
    seconds = {title: cells for title, cells in columns.items() if title.endswith(" s")}
    measured = {title: cells for title, cells in columns.items() if title not in seconds and title != ITERATION}
    blocks = _blocks(measured, columns[ITERATION]) + _blocks(seconds, columns[ITERATION])
    tables = ["\n".join(_lines({ITERATION: columns[ITERATION]} | block)) for block in blocks]
    return [f"self-play run {name}\n{tables[0]}", *tables[1:]]


def _columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Title -> cells, of the columns that the last row has; the ends of an interval stand in one column."""
    columns: dict[str, list[str]] = {}
    for name in rows[-1]:
        if name == "low":
            columns["95 %"] = [_interval(row) for row in rows]
        elif name != "high":
            cells = ["unscored" if row.get(name, "") is None else str(row.get(name, "")) for row in rows]
            columns[TITLES.get(name, name)] = cells
    return columns


def _interval(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return ""
    return f"[{row['low']}, {row['high']}]"


def _blocks(columns: dict[str, list[str]], first: list[str]) -> list[dict[str, list[str]]]:
    """Split columns into tables that fit into WIDTH beside the `first` one."""
    blocks: list[dict[str, list[str]]] = []
    left = 0
    for title, cells in columns.items():
        width = _width(title, cells) + len(GAP)
        if not blocks or width > left:
            blocks.append({})
            left = WIDTH - _width(ITERATION, first)
        blocks[-1][title] = cells
        left -= width
    return blocks


def _width(title: str, cells: Sequence[str]) -> int:
    return max(map(len, [title, *cells]))


def _lines(columns: dict[str, list[str]]) -> list[str]:
    """The lines of a table, cells to the right."""
    widths = {title: _width(title, cells) for title, cells in columns.items()}
    head = GAP.join(title.rjust(width) for title, width in widths.items())
    rule = GAP.join("-" * width for width in widths.values())
    rows = zip(*columns.values(), strict=True)
    return [head, rule, *(GAP.join(map(str.rjust, row, widths.values())) for row in rows)]
