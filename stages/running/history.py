"""Stages - the history of a build: events that its processes wrote, over all tries, and the seconds they tell.

<artifact>/.events.jsonl, .events-<worker>.jsonl     one JSON object per line: start, shard, step, used, seconds, end
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVENTS = ".events.jsonl"


def events(directory: Path) -> list[dict[str, Any]]:
    """Every event of a build, of all its tries and workers; a line that is cut by a kill, or damaged, is left out."""
    history = []
    for path in sorted(directory.glob(".events*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), float):
                history.append(event)
    if any("worker" in event for event in history):
        return sorted(history, key=lambda event: event["time"])
    return history  # one process's lines stay in their order, whatever its clock did


def seconds_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return seconds by name, of all tries together.

    wall: each try from the launch of its process to its last event
    start_up: importing libraries and loading models (of tries that were killed: until the stage began)
    waiting: for others, e.g. a judge's server
    busy: wall less start_up and waiting
    last_try: the wall of the last try
    others: what the stage timed under a name of its own; workers/NAME: the same of several workers, added up
    """
    tries: list[list[float]] = []
    named: dict[str, float] = {}
    imports = 0.0
    for event in history:
        if event["event"] in ("start", "share"):
            tries.append([event.get("launched", event["time"]), event["time"]])
            imports += max(0.0, event["time"] - tries[-1][0])
        elif tries:
            tries[-1][1] = event["time"]
        if event["event"] == "seconds" and {"what", "seconds"} <= event.keys():
            name = "workers/" * ("worker" in event) + event["what"]
            named[name] = named.get(name, 0.0) + event["seconds"]
    walls = [max(0.0, last - began) for began, last in tries] or [0.0]  # a clock that was set back takes no time away
    start_up, waiting = imports + named.pop("load", 0.0), named.pop("waiting", 0.0)
    busy = max(0.0, sum(walls) - start_up - waiting)
    return {"wall": sum(walls), "last_try": walls[-1], "start_up": start_up, "waiting": waiting, "busy": busy, **named}
