"""Flows - what is wrong on a Prefect server: zombie runs and leaked slots, from the server's own API."""

from __future__ import annotations

import datetime
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_contracts.files import process_state
from flows.cli.diagnosis import Finding

HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
"""Environment variable with the seconds between two heartbeats; Prefect's default is 180."""
MISSED_HEARTBEATS = 3
"""A run that has missed so many, and has no process on this machine, is a zombie."""

Post = Callable[[str, dict[str, Any]], Any]
"""(path, body) -> the API's answer."""


def server(api: str | None, post: Post | None = None) -> Iterator[Finding]:
    """Runs that Prefect calls running and that are gone, and slots that nobody holds. api None: nothing is asked."""
    if not api:
        return
    post = post or _post_to(api)
    states = {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}}
    try:
        runs = post("flow_runs/filter", {"flow_runs": states, "limit": 200})
        limits = post("v2/concurrency_limits/filter", {"limit": 200})
    except (OSError, ValueError) as error:
        message = f"the Prefect server at {api} does not answer ({error})"
        yield Finding("bad", message, "prefect server start, or unset PREFECT_API_URL")
        return
    is_any_alive = False
    for run in runs:
        reason = _death(run, post)
        if reason is None:
            is_any_alive = True
            continue
        yield Finding(
            "bad",
            f"the flow run {run['name']} ({run['id']}) is {run['state']['type'].title()} for Prefect, and {reason}",
            f"prefect flow-run delete {run['id']} (or let deploy/prefect/crash_zombie_runs.yaml mark it Crashed), then "
            "start it again: what is built is found",
        )
    for limit in limits:
        held = float(limit.get("active_slots") or 0)
        if held and not is_any_alive:
            yield Finding(
                "bad",
                f"the concurrency limit {limit['name']} has {held:g} of its slots in use, and no flow run is alive: "
                "they leaked",
                f"prefect gcl update {limit['name']} --active-slots 0; in deploy/env.example: lease storage on disk "
                "keeps it from happening",
            )


def _death(run: Mapping[str, Any], post: Post) -> str | None:
    """Why a run that Prefect calls running is dead; None: it is alive."""
    pid, host = _infrastructure(run)
    if host == socket.gethostname() and pid and not process_state(int(pid)):
        return f"its process {pid} on this machine is gone"
    now = datetime.datetime.now(datetime.UTC)
    last_sign = _time(run["updated"])
    if heartbeat := _last_heartbeat(run["id"], now, post):
        last_sign = max(last_sign, heartbeat)
    silence = (now - last_sign).total_seconds()
    if silence > MISSED_HEARTBEATS * float(os.environ.get(HEARTBEAT) or 180) and not is_running_here(run["id"]):
        return f"it has been silent for {silence:.0f} s, and no process of this machine runs it"
    return None


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


def _last_heartbeat(flow_run: str, now: datetime.datetime, post: Post) -> datetime.datetime | None:
    """The time of a run's last heartbeat within the last hour."""
    hour_ago = now - datetime.timedelta(hours=1)
    query = {
        "occurred": {"since": hour_ago.isoformat(), "until": now.isoformat()},
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "any_resource": {"id": [f"prefect.flow-run.{flow_run}"]},
        "order": "DESC",
    }
    try:
        events = post("events/filter", {"filter": query, "limit": 1})["events"]
    except (OSError, ValueError, KeyError):
        return None
    if events:
        return _time(events[0]["occurred"])
    return None


def _infrastructure(run: Mapping[str, Any]) -> tuple[str, str]:
    """(pid, host) of a process worker's run, or two empty texts.

    Prefect writes host:pid; 3.7 writes the pid alone, which says nothing about this machine.
    """
    host, _, pid = str(run.get("infrastructure_pid") or "").rpartition(":")
    if pid.isdigit():
        return (pid, host)
    return ("", "")


def is_running_here(flow_run: str) -> bool:
    """Whether a process of this machine has the run's id in its environment, where Prefect puts it."""
    entry = f"PREFECT__FLOW_RUN_ID={flow_run}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if entry in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def _post_to(api: str) -> Post:
    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{api.rstrip('/')}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    return post
