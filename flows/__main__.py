"""python -m flows RUN.yaml [--set section.field=value ...] [--store DIR]: one self-play run, here and now.

Run it again after anything - a finish, a kill, a power cut - and it goes on from what is built. Exit codes: 0 done, 2 the request is wrong
and nothing was written, else see data_contracts/errors.py.
"""

from __future__ import annotations

import argparse
import sys

from data_contracts.errors import PipelineError
from data_contracts.store import Store
from flows.server import prefect_server


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows", description="One self-play run, here and now; run again to go on.")
    parser.add_argument("config", help="run config, e.g. deploy/runs/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value", dest="overrides")
    parser.add_argument("--store", help="artifact store; default: $SELFPLAY_STORE or ./store")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from flows.config import load_run, parse_assignment
    from flows.preflight import preflight

    store = Store(options.store)
    overrides = dict(parse_assignment(text) for text in options.overrides)
    config = load_run(options.config, overrides)
    preflight(config, store)
    with prefect_server(store.root / "prefect") as url:
        # Prefect reads its settings when it is imported: after the server is known.
        from rich.console import Console
        from rich.table import Table

        from flows.self_play import self_play

        print(f"watch it at {url.removesuffix('/api')}", flush=True)
        history = self_play(config=options.config, overrides=overrides, store=str(store.root))
    table = Table(title=f"self-play run {config.name}")
    rows = history["rows"]
    for name in rows[-1]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in rows[-1]))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print(history["headline"])
    print(f"report: {history['report']} (and .html beside it, with curves)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
