"""The profile process-pool: a Prefect server on PostgreSQL, two machines with a worker each, one of which dies.

Strategy: two network namespaces; the first holds PostgreSQL, the server and the run; each holds a worker. The run is
`build`, as every flow calls it. Refusals (no pool, no deployment, a store that is not shared, a clock that is wrong)
are asked of the same server.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from data_contracts.store import Store
from stages.running.history import events

ROOT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]
RUN = """
import json, sys
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.errors import PipelineError
from data_contracts.store import Store
from stages.sampling.stage import SamplingConfig
from tasks.build import build
from tasks.execution.config import ExecutionConfig

request = json.loads(sys.argv[1])
store = Store(request["store"])
inputs = {name: ArtifactRef.model_validate(request[name]) for name in ("prompts", "policy")}
try:
    built = build("sample", SamplingConfig.model_validate(request["config"]), inputs, store, lambda line: print(line, flush=True),
                  execution=ExecutionConfig.model_validate(request["execution"]))
except PipelineError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(error.exit_code)
print(json.dumps({"key": built.ref.key, "content": built.ref.content}), flush=True)
"""


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


class Cluster:
    """PostgreSQL, server and workers."""

    def __init__(self, nodes, home: Path):
        self.nodes, self.home = nodes, home
        self.url = f"http://{nodes.addresses[0]}:4200/api"
        self.environment = {
            "PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": self.url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false", "PREFECT_WORKER_QUERY_SECONDS": "1", "SELFPLAY_HOME": str(ROOT),
            "SELFPLAY_STORE": str(home / "store"), "PREFECT_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1", "TMPDIR": str(home),
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip

    def postgres(self) -> str:
        """A database of its own on the first node; the address for Prefect."""
        binaries = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
        if not binaries or shutil.which("runuser") is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
        data = Path(tempfile.mkdtemp(prefix="selfplay-pg-"))  # the database refuses root, and tmp_path is root's alone
        shutil.chown(data, "postgres", "postgres")
        self.nodes.litter.append(data)
        as_user = ["runuser", "-u", "postgres", "--"]
        subprocess.run(
            [*as_user, f"{binaries[-1]}/initdb", "-D", str(data / "db"), "-A", "trust", "-U", "prefect"],
            check=True,
            capture_output=True,
        )
        # A socket's path must be short; TCP on the node's own loopback is all that is used.
        self.nodes.start(
            0,
            [*as_user, f"{binaries[-1]}/postgres", "-D", str(data / "db"), "-k", "", "-h", "127.0.0.1", "-p", "5432"],
            self.home / "pg.log",
        )
        psql = ["psql", "-h", "127.0.0.1", "-U", "prefect", "-d", "postgres", "-c", "create database prefect"]
        wait_for(lambda: self.nodes.start(0, psql, self.home / "psql.log").wait() == 0, 60, "PostgreSQL")
        return "postgresql+asyncpg://prefect@127.0.0.1:5432/prefect"

    def prefect(self, *words: str, node: int = 0) -> subprocess.Popen:
        return self.nodes.start(node, [*PREFECT, *words], self.home / f"prefect-{node}.log", **self.environment)

    def start(self) -> None:
        settings = {"PREFECT_API_DATABASE_CONNECTION_URL": self.postgres(), "PREFECT_SERVER_UI_API_URL": self.url}
        server = [*PREFECT, "server", "start", "--host", self.nodes.addresses[0], "--port", "4200"]
        self.nodes.start(0, server, self.home / "server.log", **self.environment, **settings)
        ask = [sys.executable, "-c", f"import urllib.request as r; r.urlopen('{self.url}/health', timeout=5)"]
        wait_for(lambda: self.nodes.start(0, ask, self.home / "ask.log").wait() == 0, 240, "the server")
        assert self.prefect("work-pool", "create", "selfplay-work", "--type", "process").wait() == 0
        assert (
            self.prefect("--no-prompt", "deploy", "--prefect-file", "deploy/prefect/work.yaml", "--all").wait() == 0
        ), (self.home / "prefect-0.log").read_text()[-3000:]
        for node in (0, 1):
            self.prefect(
                "worker", "start", "--pool", "selfplay-work", "--limit", "1", "--name", f"node{node}", node=node
            )

    def run(self, request: dict, log: Path) -> subprocess.Popen:
        return self.nodes.start(0, [sys.executable, "-c", RUN, json.dumps(request)], log, **self.environment)


@pytest.fixture
def cluster(nodes, tmp_path, flaky):
    cluster = Cluster(nodes, tmp_path)
    cluster.start()
    return cluster


def request_for(store: Store, prompts, policy, name: str, **execution) -> dict:
    config = {"backend": {"name": name}, "num_candidates": 2, "max_new_tokens": 6, "max_prompt_tokens": 64}
    config["runtime"] = {"prompts_per_shard": 1, "device": "cpu"}
    return {
        "store": str(store.root), "prompts": prompts.model_dump(), "policy": policy.model_dump(), "config": config,
        "execution": {"profile": "process-pool", "workers": {"sample": 2}} | execution,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_machine_that_dies_in_the_middle_of_a_shard_costs_nothing(
    cluster, flaky, make_prompts, tiny_model, tmp_path, nodes, shared_work
):
    from data_contracts.checkpoint import external_model
    from stages.sampling.stage import SamplingConfig

    log = flaky({}, pause="1.0")
    variables = {name: os.environ[name] for name in ("FLAKY", "FLAKY_LOG", "FLAKY_PAUSE", "PYTHONPATH")}
    cluster.environment["PYTHONPATH"] = f"{ROOT}:{os.environ['PYTHONPATH']}"
    store, policy = Store(tmp_path / "store"), external_model(tiny_model)
    prompts = make_prompts(store, 16)
    request = request_for(store, prompts, policy, "flaky", env=variables)

    def lines() -> list[dict]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    refused = cluster.run(
        request | {"execution": {"profile": "process-pool", "pool": "nowhere"}}, tmp_path / "refused.log"
    )
    assert refused.wait(120) == 2
    assert (
        "there is no work pool 'nowhere': make it with `prefect work-pool create nowhere --type process`"
        in (tmp_path / "refused.log").read_text()
    )
    wrong = cluster.run(request | {"execution": {"profile": "kubernetes"}}, tmp_path / "wrong.log")
    assert wrong.wait(120) == 2
    assert "is of type process, and the profile kubernetes wants kubernetes" in (tmp_path / "wrong.log").read_text()

    run = cluster.run(request, tmp_path / "run.log")
    wait_for(lambda: {line["node"] for line in lines()} == {"0", "1"}, 240, "both nodes at work")
    nodes.kill_node(1)
    assert run.wait(400) == 0, (tmp_path / "run.log").read_text()[-3000:]
    made = json.loads((tmp_path / "run.log").read_text().splitlines()[-1])
    begun = Counter(prompt for line in lines() for prompt in line["prompts"])
    assert sum(begun.values()) == 17 and len(begun) == 16  # the shard in hand was made again, no other
    assert "was lost" in (tmp_path / "run.log").read_text()
    shards = Counter(
        event["index"] for event in events(store.directory("generations", made["key"])) if event["event"] == "shard"
    )
    assert shards == Counter(range(16))

    # The same artifact as one process makes; a run that was begun here can go on there.
    alone = Store(tmp_path / "alone")
    inputs = {"prompts": make_prompts(alone, 16), "policy": policy}
    record = shared_work.sign("sample", SamplingConfig.model_validate(request["config"]), inputs, alone)
    assert (record.key, record.content) == (made["key"], made["content"])
