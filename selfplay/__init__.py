"""selfplay: the pipeline as one importable package, for notebooks and for other trainers.

    from selfplay.methods import METHODS, Pairs, Responses    losses of 28 methods on tensors of log-probs
    from selfplay.weights import WEIGHTS                      per-token weights
    from selfplay.scoring import SCORERS, PairRM              scorers, PairRM among them
    from selfplay.models import score_responses               log-probs of responses under a model
    from selfplay.store import Store, read_shards                 what runs have made
    from selfplay.runs import load_run, preset_paths              run configs

docs/api.md has an example of each. The code lies in four rooms that import each other as data_contracts, stages, tasks
and flows; importing this package makes them importable under these names: from the checkout, or from selfplay/rooms of
an installed package, so that site-packages itself holds no other name than `selfplay`.
"""

from __future__ import annotations

import importlib.util
import os
import sys

ROOMS = ("data_contracts", "stages", "tasks", "flows")


def _find_rooms() -> str:
    """Return the directory that holds the rooms: beside this file in an installed package, above it in a checkout."""
    here = os.path.dirname(os.path.realpath(__file__))
    installed = os.path.join(here, "rooms")
    if os.path.isdir(installed):
        return installed
    return os.path.dirname(here)


def _make_importable(directory: str) -> None:
    """Append the rooms' directory to sys.path. Raises: ImportError where another module hides a room."""
    if directory not in sys.path:
        sys.path.append(directory)
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        origin = os.path.realpath(spec.origin or "") if spec else ""
        if origin != os.path.join(directory, room, "__init__.py"):
            raise ImportError(
                f"selfplay imports its own module {room!r} from {directory}, and {origin or 'another module'} has that name "
                "too and comes first. Start Python in another directory, rename that module, or install selfplay "
                "into an environment of its own",
                name=room,
            )


_make_importable(_find_rooms())


def run_command() -> None:
    """The command `selfplay`, as a process of its own."""
    from flows.cli.commands import run_command as run

    run()
