"""python -m flows COMMAND ...: the command line `selfplay` without its entry point. See flows/cli/commands.py."""

from __future__ import annotations

import sys

from flows.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
