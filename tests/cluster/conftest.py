"""What the cluster tests share: a sampler that fails where it is told to, installed like anybody's plug-in."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.store import Store
from stages.execute import execute, execute_share
from stages.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]
FLAKY = '''
import json, os, signal, time
from pathlib import Path
from typing import Literal
from stages.sampling.canned import Canned

class Flaky(Canned):
    """The canned sampler; FLAKY holds {prompt_id: its trouble}: kill, raise, once (killed the first time), slow."""
    class Config(Canned.Config):
        name: Literal["flaky"] = "flaky"

    def generate(self, prompts):
        with open(os.environ["FLAKY_LOG"], "a") as file:
            file.write(json.dumps({"worker": os.environ.get("SELFPLAY_WORKER"), "node": os.environ.get("FLAKY_NODE"), "prompts": [p.prompt_id for p in prompts]}) + "\\n")
        for prompt in prompts:
            what = json.loads(os.environ["FLAKY"]).get(prompt.prompt_id)
            mark = Path(os.environ["FLAKY_LOG"] + "." + prompt.prompt_id)
            if what == "kill" or (what == "once" and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise RuntimeError(f"no words for {prompt.prompt_id}")
            if what == "slow":
                mark.touch()
                time.sleep(float(os.environ.get("FLAKY_SECONDS", "0.3")))
        time.sleep(float(os.environ.get("FLAKY_PAUSE", "0")))
        return super().generate(prompts)
'''


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """flaky({"p003": "kill"}, ...) installs the plug-in's troubles; returns its log, a line per shard that was begun."""
    plugin = tmp_path / "plugin"
    (plugin / "flaky-1.0.dist-info").mkdir(parents=True)
    (plugin / "flaky_sampler.py").write_text(FLAKY)
    (plugin / "flaky-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: flaky\nVersion: 1.0\n")
    (plugin / "flaky-1.0.dist-info" / "entry_points.txt").write_text(
        "[selfplay.samplers]\nflaky = flaky_sampler:Flaky\n"
    )
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    log = tmp_path / "flaky.jsonl"
    monkeypatch.setenv("FLAKY_LOG", str(log))

    def trouble(what: dict[str, str], **more: str) -> Path:
        monkeypatch.setenv("FLAKY", json.dumps(what))
        for name, value in more.items():
            monkeypatch.setenv(f"FLAKY_{name.upper()}", value)
        return log

    trouble({})
    return trouble


def workers_in_threads(stage: str, config, inputs, store: Store, count: int) -> None:
    """Start `count` workers on one artifact, whose lock this process holds, at the same moment. flock also separates threads."""
    spec = STAGES[stage]
    key = spec.key(config, inputs)
    store.directory(spec.produces, key).mkdir(parents=True, exist_ok=True)
    together = threading.Barrier(max(1, count))

    def work(number: int) -> None:
        together.wait()
        execute_share(spec, config, inputs, store, f"{number}/{count}")

    with store.lock(spec.produces, key), ThreadPoolExecutor(max(1, count)) as pool:
        list(pool.map(work, range(count)))


@pytest.fixture(scope="session")
def shared_work():
    """In this process: workers(stage, config, inputs, store, count) and sign(stage, config, inputs, store)."""
    return SimpleNamespace(workers=workers_in_threads, sign=lambda stage, *rest: execute(STAGES[stage], *rest))


class Nodes:
    """Two "machines": network namespaces with an address each, one wire between them, one file system."""

    def __init__(self):
        tag = f"{os.getpid() % 10000:04d}"
        self.names = [f"sp{tag}a", f"sp{tag}b"]
        block = 100 + os.getpid() % 100
        self.addresses = [f"10.199.{block}.1", f"10.199.{block}.2"]
        self.started: list[subprocess.Popen] = []
        self.litter: list[Path] = []

    def __enter__(self):
        for name in self.names:
            self._ip("netns", "add", name)
        ends = [f"v{name}" for name in self.names]
        self._ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, self.addresses, strict=True):
            self._ip("link", "set", end, "netns", name)
            self._ip("-n", name, "link", "set", end, "name", "wire")
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("wire", "lo"):
                self._ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *error):
        for process in self.started:
            self.kill(process)
        for name in self.names:
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)
        for path in self.litter:
            shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def start(self, node: int, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """A command on a node, in a session of its own; its output goes to `log`."""
        variables = {
            "SELFPLAY_ADDRESS": self.addresses[node],
            "GLOO_SOCKET_IFNAME": "wire",
            "FLAKY_NODE": str(node),
            "HF_HUB_OFFLINE": "1",
        }
        with open(log, "ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *command], cwd=ROOT, env=os.environ | variables | environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_node(self, node: int) -> None:
        """Everything that runs there, at once: the plug is pulled."""
        for pid in subprocess.run(
            ["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=True
        ).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def nodes():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", f"spprobe{os.getpid()}"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", f"spprobe{os.getpid()}"], check=True)
    with Nodes() as two:
        yield two


@pytest.fixture(scope="session")
def make_pair():
    """make_pair(number) -> a row of scored_pairs."""

    def make(number: int) -> dict:
        row = {
            "pair_id": f"q{number}",
            "prompt_id": f"p{number}",
            "prompt_ids": [3, 20 + number],
            "chosen": "a",
            "rejected": "b",
            "scorer": "",
        }
        row |= {
            "chosen_ids": [30 + number, 31, 1],
            "rejected_ids": [40 + number, 1],
            "win_rate_chosen": 1.0,
            "win_rate_rejected": 0.0,
        }
        row |= {"score_chosen": None, "score_rejected": None, "chosen_candidate": 0, "rejected_candidate": 1}
        return row | {"group_scores": None, "group_win_rates": None}

    return make
