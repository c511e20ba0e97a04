"""Flows - a run or a comparison from the command line: check it, play it with a Prefect server, print what came out."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from data_contracts.errors import ConfigError
from data_contracts.ledger import Ledger
from data_contracts.store import Store
from flows.cli.server import prefect_server, server_errors_explained
from flows.comparison import load_comparison
from flows.config import RunConfig, load_run
from flows.preflight import preflight

# Prefect reads its settings when it is imported. So the flows are imported below, after the server's address is known.


def play(config: str, overrides: dict[str, Any], root: str | None) -> None:
    """Play the run of a config file, print its table and where the report is. `root`: of the store."""
    store = Store(root)
    settings = load_run(config, overrides)
    refuse_missing_server(settings)
    preflight(settings, store)
    os.environ["SELFPLAY_OWN_PROCESS"] = "1"
    with prefect_server(store.root / "prefect") as url:
        from flows.run import self_play

        print(f"watch it at {url.removesuffix('/api')}", flush=True)
        with server_errors_explained(url):
            history = self_play(config=config, overrides=overrides, store=str(store.root))
    _print_rows(settings.name, history["rows"])
    print(history["headline"])
    print(f"report: {history['report']} (and .html beside it, with curves)")
    print(f"what it cost: selfplay ledger {settings.name}")
    Ledger(store, settings.name, history["session"]).end()


def play_comparison(config: str, overrides: dict[str, Any], root: str | None) -> None:
    """Play all variants of a comparison's config file, print its tables and where the report is."""
    store = Store(root)
    comparison = load_comparison(config, overrides)
    comparison.check(store)
    for variant in comparison.variants:
        refuse_missing_server(variant.config)
    with prefect_server(store.root / "prefect") as url:
        from flows.compare import compare

        print(f"watch it at {url.removesuffix('/api')}", flush=True)
        with server_errors_explained(url):
            result = compare(config=config, overrides=overrides, store=str(store.root))
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


def _print_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Print one row per iteration, in the columns of the last."""
    table = Table(title=f"self-play run {name}")
    for column in rows[-1]:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in rows[-1]))
    width = None
    if not sys.stdout.isatty():
        width = 200
    Console(width=width).print(table)
