"""python -m flows COMMAND ...: the command line `selfplay` without its entry point. See flows/cli/commands.py."""

from __future__ import annotations

from flows.cli.commands import run_command

if __name__ == "__main__":
    run_command()
