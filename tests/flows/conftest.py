"""What the tests of whole runs share: a run config around the tiny model, the command that a user types, and one run that nothing disturbed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Finished(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    """stdout and stderr, as a terminal shows them."""
    seconds: float

    @property
    def table(self) -> str:
        """What the run printed at its end: the table, the headline, the report's path."""
        return self.out[self.out.index("self-play run ") :]

    def names(self, state: str) -> list[str]:
        """The task runs that ended in a state, in their order."""
        ends = (re.search(r"Task run '([^']+)' - Finished in state (\S+)", line) for line in self.out.splitlines())
        return [end[1] for end in ends if end and end[2].startswith(state)]


def table_of(store: Path, run: str) -> list[dict[str, str]]:
    """The table of a run's report, without the seconds: they are measured, all else must repeat."""
    text = (store / "runs" / run / "report.md").read_text()
    lines = text[text.index("\n| iteration |") + 1 :].partition("\n\n")[0].splitlines()  # the first table of several
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = cells[0]
    return [
        {name: value for name, value in zip(names, row, strict=True) if not name.endswith(" s")} for row in cells[2:]
    ]


def environment(**more: str) -> dict[str, str]:
    """Like a fresh shell: nobody's Prefect, nobody's MLflow, nobody's store."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SELFPLAY_"))
    }
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    return kept | quiet | {"MLFLOW_DISABLE_TELEMETRY": "true", "COLUMNS": "200"} | more


def finish(command: list[str], timeout: float = 900, **more: str) -> Finished:
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, time.monotonic() - began)


def play(config: Path, store: Path, *settings: str, **more: str) -> Finished:
    """`selfplay run CONFIG --store STORE --set ...`"""
    command = [sys.executable, "-m", "flows", "run", str(config), "--store", str(store)]
    return finish(command + [word for setting in settings for word in ("--set", setting)], **more)


def play_cases(cases: list[dict[str, Any]], work: Path, *site: Path, timeout: float = 500) -> dict[str, dict]:
    """id -> result of every run, played by in_process.py in one process on one store. site: more directories to import from."""
    request, out = work / "request.json", work / "out.jsonl"
    request.write_text(json.dumps({"store": str(work / "store"), "cases": cases}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("in_process.py")), str(request), str(out)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *site]))}, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert out.is_file(), done.stderr[-3000:]
    results = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert len(results) == len(cases), done.stderr[-3000:]
    return results


def processes_of(marker: str) -> list[psutil.Process]:
    """Every living process that inherited the environment entry NAME=value, wherever it hangs now."""
    name, _, value = marker.partition("=")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """Functions for tests: with `--import-mode=importlib` a test cannot import its conftest."""
    return SimpleNamespace(
        play=play,
        play_cases=play_cases,
        finish=finish,
        environment=environment,
        table_of=table_of,
        processes_of=processes_of,
        root=ROOT,
    )


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory, make_rows) -> dict[str, str]:
    """24 prompts that train, 8 that measure, as JSONL; each with checks and a ground truth."""
    directory, paths = tmp_path_factory.mktemp("prompts"), {}
    for name, rows in (("train", make_rows(24)), ("heldout", make_rows(8, first=100))):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row | {"checks": json.loads(row["checks"])}) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, tiny_model, prompt_files):
    """make_run(name, section={...}, ...) -> Path of a run config: two small iterations; a section given here is merged into the default one."""

    def make(name: str, **sections: Any) -> Path:
        run: dict[str, Any] = {
            "name": name,
            "policy": {"path": str(tiny_model)},
            "iterations": 2,
            "prompts": prompt_files | {"per_iteration": 12},
            "method": {"name": "sppo", "eta": 20},
            "sampling": {
                "backend": {"name": "transformers"},
                "num_candidates": 5,
                "max_prompt_tokens": 64,
                "max_new_tokens": 24,
                "runtime": {"prompts_per_shard": 3},
            },
            "scoring": {"scorer": {"name": "length", "target_tokens": 8}, "runtime": {"prompts_per_shard": 3}},
            "weighting": {"runtime": {"pairs_per_shard": 3}},
            "training": {
                "learning_rate": 1e-3,
                "batch_size": 2,
                "runtime": {"batch_tokens": 512, "save_every_steps": 1},
            },
            "evaluation": {"scorer": {"name": "length", "target_tokens": 8}},
        }
        for section, values in sections.items():
            run[section] = run.get(section, {}) | values if isinstance(values, dict) and section != "method" else values
        path = tmp_path_factory.mktemp("runs") / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    return make


class Undisturbed(NamedTuple):
    config: Path
    store: Path
    first: Finished


PLANTED = {
    name: f"planted-{number}-{name.lower()}-value"
    for number, name in enumerate(("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"))
}
"""Secrets in the environment of the undisturbed run: test_secrets.py looks for them in everything it wrote."""


COMPANY_PROXY = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://me:planted-password%2F3@127.0.0.1:9")
"""A proxy as every company network sets it, at which nobody answers: a run asks it for nothing on 127.0.0.1."""


@pytest.fixture(scope="session")
def planted() -> dict[str, str]:
    return PLANTED | {"password of the proxy": "planted-password"}


@pytest.fixture(scope="session")
def undisturbed(made_once, make_run) -> Undisturbed:
    """Two iterations with the transformers sampler and DeepSpeed, start to end, played once for all pytest workers.

    Read it, go on from a copy, never write into it.
    """

    def make(directory: Path) -> tuple[Path, Path, tuple[Any, ...]]:
        config, store = make_run("tiny"), directory / "store"
        first = play(config, store, **PLANTED, **COMPANY_PROXY)
        assert first.code == 0, first.out
        return config, store, tuple(first)

    config, store, first = made_once("undisturbed", make)
    return Undisturbed(config, store, Finished(*first))
