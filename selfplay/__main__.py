"""python -m selfplay COMMAND ...: the command `selfplay`, for this interpreter."""

from __future__ import annotations

from selfplay import run_command

if __name__ == "__main__":
    run_command()
