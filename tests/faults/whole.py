"""Faults of whole runs: `python -m flows run` with its Prefect server and MLflow, struck from outside, then typed again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from data_contracts.store import Store
from stages.running.supervise import processes_with
from tests.faults.deployed import Cluster, cluster, wait_for
from tests.faults.harness import (
    REMAINS_SECONDS,
    ROOT,
    Command,
    Ended,
    Fault,
    Scene,
    Verdict,
    damage_in,
    repeated,
    untidy,
)

WHOLE = "whole run"
OUTAGE_SECONDS = 60.0
LIMIT_SECONDS = 420
"""Or three times the undisturbed run, on a machine that is busy."""


def fresh_environment() -> dict[str, str]:
    """As of a new shell: nobody's Prefect, nobody's MLflow, nobody's store."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "SELFPLAY_", "FAULT"))
    }
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | quiet | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class Play(Command):
    """`python -m flows run RUN --store STORE`, and every process that came from it."""

    def __init__(self, config: Path, store: Path, work: Path, **environment: str):
        import uuid

        self.mark = uuid.uuid4().hex
        self.log = work / f"{self.mark}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows", "run", str(config), "--store", str(store)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=fresh_environment() | {"FAULT_MARK": self.mark} | environment, start_new_session=True,
            )  # fmt: skip

    def of(self, *words: str) -> list[int]:
        """Its processes that have all these words in their command."""
        found = []
        for pid in self.tree():
            with suppress(OSError):
                if set(words) <= set(Path(f"/proc/{pid}/cmdline").read_text().split("\0")):
                    found.append(pid)
        return found

    def wait_for(self, condition: Callable[[], Any], seconds: float = 240) -> bool:
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.05)
        return False


def write_config(root: Path, model: Path, rows: list[dict], heldout: list[dict]) -> Path:
    """One small iteration around the canned sampler."""
    for name, lines in (("train", rows), ("heldout", heldout)):
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps(row | {"checks": json.loads(row["checks"])}) + "\n" for row in lines)
        )
    run = {
        "name": "tiny",
        "policy": {"path": str(model)},
        "iterations": 1,
        "prompts": {"train": str(root / "train.jsonl"), "heldout": str(root / "heldout.jsonl")},
        "method": {"name": "sppo", "eta": 20},
        "sampling": {"backend": {"name": "canned"}, "num_candidates": 3, "max_prompt_tokens": 64, "max_new_tokens": 8, "runtime": {"prompts_per_shard": 2}},
        "scoring": {"scorer": {"name": "length", "target_tokens": 4}, "runtime": {"prompts_per_shard": 2}},
        "weighting": {"runtime": {"pairs_per_shard": 2}},
        "training": {"learning_rate": 1e-3, "batch_size": 2, "dtype": "float32", "runtime": {"batch_tokens": 512, "save_every_steps": 1}},
        "evaluation": {"scorer": {"name": "length", "target_tokens": 4}},
    }  # fmt: skip
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def prepare(root: Path, model: Path, rows: list[dict], heldout: list[dict]) -> Scene:
    """The undisturbed run."""
    root.mkdir(parents=True, exist_ok=True)
    config, store = write_config(root, model, rows, heldout), root / "calm"
    began = time.monotonic()
    ended = Play(config, store, root).end(LIMIT_SECONDS)
    assert ended.code == 0, ended.out
    return Scene(WHOLE, [str(config)], root, store, "", _contents(store), [], time.monotonic() - began)


def _contents(store: Path) -> dict[str, str]:
    return {f"{record.kind}/{record.key}": record.content for record in Store(store).records()}


def _table(store: Path) -> list[list[str]]:
    """The report's first table, a row per iteration, without its seconds."""
    text = (store / "runs" / "tiny" / "report.md").read_text()
    first = next(part for part in text.split("\n\n") if part.startswith("| "))
    lines = [line.strip("|").split("|") for line in first.splitlines()]
    keep = [number for number, name in enumerate(lines[0]) if not name.strip().endswith(" s")]
    return [[line[number].strip() for number in keep] for line in lines[2:]]


# --- what happens to it: each takes the run and says what it did


def _signal(number: int) -> Callable[[Play, random.Random, Scene, Path], str]:
    def strike(play: Play, chance: random.Random, scene: Scene, store: Path) -> str:
        after = chance.uniform(0.1, 0.9) * scene.seconds
        play.wait_for(lambda: False, after)
        with suppress(ProcessLookupError):
            os.kill(play.process.pid, number)
        return f"{signal.Signals(number).name} after {after:.1f} s"

    return strike


def _in_a_stage(play: Play) -> bool:
    return bool([pid for pid in play.of("-m", "stages") if pid not in play.of("stages.running.supervise")])


def _kill_server(play: Play, chance: random.Random, scene: Scene, store: Path) -> str:
    play.wait_for(lambda: _in_a_stage(play))
    servers = [pid for pid in play.of("uvicorn") if pid not in play.of("stages.running.supervise")]
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    return f"server killed ({len(servers)})" if servers else ""


def _server_away(play: Play, chance: random.Random, scene: Scene, store: Path) -> str:
    play.wait_for(lambda: _in_a_stage(play))
    servers = play.of("uvicorn")
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    try:
        play.wait_for(lambda: False, OUTAGE_SECONDS)
    finally:
        for pid in servers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return f"{len(servers)} processes of the server stood still for {OUTAGE_SECONDS:.0f} s" if servers else ""


def _database_locked(play: Play, chance: random.Random, scene: Scene, store: Path) -> str:
    play.wait_for(lambda: _in_a_stage(play))
    database = sqlite3.connect(store / "prefect" / "prefect.db", timeout=30, isolation_level=None)
    try:
        database.execute("BEGIN EXCLUSIVE")
        play.wait_for(lambda: False, 30)
        database.execute("ROLLBACK")
    finally:
        database.close()
    return "database locked for 30 s"


def _nothing(play: Play, chance: random.Random, scene: Scene, store: Path) -> str:
    return "from the start"


@contextmanager
def _deaf_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        taken: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for one in taken:
            one.close()


KINDS: dict[str, Callable[[Play, random.Random, Scene, Path], str]] = {
    "kill flow": _signal(signal.SIGKILL),
    "term flow": _signal(signal.SIGTERM),
    "int flow": _signal(signal.SIGINT),
    "kill Prefect server": _kill_server,
    "Prefect server away 60 s": _server_away,
    "Prefect database locked": _database_locked,
    "MLflow away": _nothing,
    "MLflow slow": _nothing,
}


# --- a run that a worker has started


def _kill_worker(cluster: Cluster, worker: subprocess.Popen, run: dict[str, Any]) -> None:
    worker.kill()


def _kill_worker_and_run(cluster: Cluster, worker: subprocess.Popen, run: dict[str, Any]) -> None:
    """As an orchestrator of containers does, or a power cut: the flow too, and nobody is left to say so. Stages end by themselves."""
    worker.kill()
    for pid in processes_with(f"PREFECT__FLOW_RUN_ID={run['id']}"):
        with suppress(OSError, ProcessLookupError):
            if "prefect" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)


DEPLOYED: dict[str, Callable[[Cluster, subprocess.Popen, dict[str, Any]], None]] = {
    "kill Prefect worker": _kill_worker,
    "kill Prefect worker and run": _kill_worker_and_run,
}


def strike_deployed(scene: Scene, fault: Fault, work: Path) -> Verdict:
    """`prefect deployment run`, its worker struck in mid-stage; then another worker and the same command again."""
    began, chance, limit = time.monotonic(), random.Random(fault.seed), max(LIMIT_SECONDS, 3 * scene.seconds)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    problems: list[str] = []
    with cluster(work, fresh_environment() | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}) as one:
        worker = one.worker(supervised=False)
        assert (said := one.run("-p", f"config={scene.steps[0]}")).returncode == 0, said.stdout
        run = one.last_run()
        tree = f"PREFECT__FLOW_RUN_ID={run['id']}"
        wait_for(lambda: any(_is_stage(pid) for pid in processes_with(tree)), 300, one.log)
        time.sleep(after := chance.uniform(0.1, 0.7) * scene.seconds)
        DEPLOYED[fault.kind](one, worker, run)
        worker.wait()
        end = time.monotonic() + (limit if fault.kind == "kill Prefect worker" else REMAINS_SECONDS)
        while processes_with(tree) and time.monotonic() < end:
            time.sleep(0.2)
        problems += [f"left running: {Path(f'/proc/{pid}/cmdline').read_text()}" for pid in processes_with(tree)]
        if (state := one.state(run)) == "RUNNING":  # for ever, and for minutes in the deployment's only slot
            cure = wait_for(lambda: _cure(one, run), 200, one.log)
            if (mended := one.prefect(*cure)).returncode:
                problems.append(f"zombie: {cure} ended with {mended.returncode}: {mended.stdout}")
        one.worker()
        again = one.run("--watch", "--watch-interval", "1", "-p", f"config={scene.steps[0]}", timeout=limit)
        problems += _judge(scene, one.store, Ended(again.returncode, again.stdout))
    how = f"{after:.1f} s into the stages; the run was {state} when its last process had gone"
    outcome = problems[0].split(":")[0] if problems else "unaffected" if state == "COMPLETED" else "resumed"
    if problems:
        how += f"\n--- again ({again.returncode})\n{again.stdout[-2000:]}\n--- server and workers\n{one.log.read_text()[-6000:]}"
    return Verdict(fault, how, outcome, problems, time.monotonic() - began)


def _cure(one: Cluster, run: dict[str, Any]) -> list[str]:
    """What the doctor says is to be done about a run; nothing, if it finds nothing wrong with it."""
    said = subprocess.run(
        [sys.executable, "-m", "flows.cli.doctor", "--store", str(one.store), "--api", one.url], cwd=ROOT, env=one.environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(rf"-> prefect (flow-run delete {run['id']}) ", said.stdout)
    return found[1].split() if found else []


def _is_stage(pid: int) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return {"-m", "stages"} <= set(words) and "stages.running.supervise" not in words
    return False


def strike(scene: Scene, fault: Fault, work: Path) -> Verdict:
    if fault.kind in DEPLOYED:
        return strike_deployed(scene, fault, work)
    began, chance, limit = time.monotonic(), random.Random(fault.seed), max(LIMIT_SECONDS, 3 * scene.seconds)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config, store = Path(scene.steps[0]), work / "store"
    with _deaf_port() as port:
        environment = {}
        if fault.kind.startswith("MLflow"):
            environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port if fault.kind == 'MLflow slow' else 9}"
        play = Play(config, store, work, **environment)
        how = KINDS[fault.kind](play, chance, scene, store)
        disturbed = play.end(limit)
    problems = ["hang: the disturbed run does not end"] if disturbed.code is None else []
    problems += [f"left running: {command}" for command in play.remains()]
    again = disturbed
    if disturbed.code != 0:
        play = Play(config, store, work)
        again = play.end(limit)
        problems += [f"left running after the second try: {command}" for command in play.remains()]
    problems += _judge(scene, store, again)
    outcome = problems[0].split(":")[0] if problems else "unaffected" if disturbed.code == 0 else "resumed"
    if problems:
        how += f"\n--- disturbed ({disturbed.code})\n{disturbed.out[-4000:]}\n--- again ({again.code})\n{again.out[-4000:]}"
    return Verdict(fault, how, outcome if how or problems else "not reached", problems, time.monotonic() - began)


def _judge(scene: Scene, store: Path, ended: Ended) -> list[str]:
    if ended.code is None:
        return ["hang: the same command again does not end"]
    if ended.code:
        return [f"lost: the same command again ended with {ended.code}"]
    if not (store / "runs" / "tiny" / "report.md").is_file():
        return ["lost: the run says that it is done, and has no report"]
    problems = (
        []
        if _contents(store) == scene.wanted
        else ["other content: the artifacts are not those of the undisturbed run"]
    )
    problems += [] if _table(store) == _table(scene.after) else ["other content: the report's table differs"]
    return (
        problems
        + [f"other content: {problem}" for problem in damage_in(Store(store))]
        + repeated(Store(store))
        + untidy(store)
    )
