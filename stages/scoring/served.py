"""Stages - a judge of one's own: `vllm serve` of a model directory, for as long as the stage wants it. Standard library only.

It listens on 127.0.0.1 at a free port and is started by the first request that is not in the cache. It runs under stages/running/supervise.py, so that
it ends with this process, however that ends. vLLM itself stays out of this process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import Field

from data_contracts.config import Runtime
from data_contracts.errors import ConfigError, TransientError
from stages.running.supervise import supervisor_options

ROOT = Path(__file__).resolve().parents[2]


class ServerRuntime(Runtime):
    """How the judge's server is started."""

    python: str | None = None
    """Interpreter that has vLLM; None: the stage's own."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """More of `vllm serve`, e.g. {max_model_len: 8192, tensor_parallel_size: 2, gpu_memory_utilization: 0.6}; true for a switch."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU."""
    start_seconds: float = Field(900.0, gt=0)
    """Longest wait until it answers."""


class Served:
    def __init__(self, runtime: ServerRuntime, model: Path, name: str, device: str):
        self.runtime, self.model, self.name, self.device = runtime, model, name, device
        self.process: subprocess.Popen[bytes] | None = None
        self.log: Any = None
        self.url = ""

    def start(self) -> str:
        """The address up to /v1, once it answers. Raises: ConfigError if it ends by itself, TransientError if it takes too long."""
        if self.process is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url, self.log = f"http://127.0.0.1:{port}/v1", tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stages.running.supervise", *supervisor_options(), *self.command(port)],
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
            )  # fmt: skip
            self._wait(f"http://127.0.0.1:{port}/health")
        return self.url

    def command(self, port: int) -> list[str]:
        options: dict[str, Any] = {
            "model": self.model,
            "served-model-name": self.name,
            "host": "127.0.0.1",
            "port": port,
        }
        if self.device == "cpu":
            # A seeded request in a chunked prefill kills vLLM's CPU engine ("CPU Generator does not use offset").
            options |= {"enforce-eager": True, "no-enable-chunked-prefill": True}
        options |= {name.replace("_", "-"): value for name, value in self.runtime.arguments.items()}
        command = [self.runtime.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in options.items():
            command += [] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return command

    def _environment(self) -> dict[str, str]:
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.device == "cpu":
            settings |= {"VLLM_CPU_KVCACHE_SPACE": f"{self.runtime.kv_cache_gib:g}", "TORCHDYNAMO_DISABLE": "1"}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return settings | os.environ | {"PYTHONPATH": path}

    def _wait(self, health: str) -> None:
        end, opener = (
            time.monotonic() + self.runtime.start_seconds,
            urllib.request.build_opener(urllib.request.ProxyHandler({})),
        )
        while True:
            self.check(ConfigError)
            try:
                opener.open(health, timeout=2).close()
                return
            except OSError:
                time.sleep(0.5)
            if time.monotonic() > end:
                self.close()
                raise TransientError(
                    f"the judge {self.name} did not answer within {self.runtime.start_seconds:g} s: scorer.server.start_seconds"
                )

    def check(self, error: type[Exception] = TransientError, patience: float = 0.0) -> None:
        """Raises: the error, with the last words of a server that ended by itself; `patience`: seconds in which it may still be ending."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(patience)
            self.log.seek(0)
            told = self.log.read().decode(errors="replace").strip()[-1500:]
            self.close()
            raise error(
                f"the judge's server (`vllm serve {self.model}`) ended with code {code}. Its last words:\n{told}"
            )

    def close(self) -> None:
        """Ends it; the next request would start it again."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None
            self.log.close()
