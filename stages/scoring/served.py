"""Stages - a judge's own server: `vllm serve` of a model directory while the stage needs it. Standard library only.

It listens on 127.0.0.1 at a free port; the first request that is not in the cache starts it. It runs under
stages/running/supervise.py, so it ends with this process, however that ends. vLLM itself stays out of this process.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from data_contracts.config import Runtime
from data_contracts.errors import ConfigError, TransientError
from data_contracts.installation import import_paths
from stages.running.cost import parameters
from stages.running.gpus import engine_share
from stages.running.supervise import supervisor_options

DEFAULT_SHARE = 0.92
"""Of a GPU's memory, vLLM's server."""


class ServerRuntime(Runtime):
    """How the judge's server is started."""

    python: str | None = None
    """Interpreter that has vLLM; None: the stage's own."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `vllm serve`, e.g. {max_model_len: 8192, tensor_parallel_size: 2, gpu_memory_utilization: 0.6};
    true for a switch."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU."""
    start_seconds: float = Field(900.0, gt=0)
    """Longest wait until it answers."""


class Served:
    """The server of one judge: not started, or running in a process of its own."""

    def __init__(self, runtime: ServerRuntime, model: Path, name: str, device: str):
        self.runtime, self.model, self.name, self.device = runtime, model, name, device
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None
        """What the process writes."""
        self.url = ""

    def start(self) -> str:
        """Start the server unless it runs; returns its address up to /v1 once it answers.

        Raises: ConfigError if its process ends by itself, TransientError if it does not answer in time.
        """
        if self.process is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}/v1"
            self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stages.running.supervise", *supervisor_options(), *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            self._wait(f"http://127.0.0.1:{port}/health")
        return self.url

    def command(self, port: int) -> list[str]:
        """The command line of vLLM's server."""
        options: dict[str, Any] = {
            "model": self.model,
            "served-model-name": self.name,
            "host": "127.0.0.1",
            "port": port,
        }
        if self.device == "cpu":
            # A seeded request in a chunked prefill kills vLLM's CPU engine ("CPU Generator does not use offset").
            options |= {"enforce-eager": True, "no-enable-chunked-prefill": True}
        arguments = self.runtime.arguments | self._smaller_share()
        options |= {name.replace("_", "-"): value for name, value in arguments.items()}
        command = [self.runtime.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in options.items():
            if value is True:
                command.append(f"--{name}")
            elif value is not False:
                command += [f"--{name}", str(value)]
        return command

    def _smaller_share(self) -> dict[str, Any]:
        """The argument that leaves others what they hold of the GPU; {} if all that the server would take is free."""
        if self.device == "cpu":
            return {}
        most = float(self.runtime.arguments.get("gpu_memory_utilization", DEFAULT_SHARE))
        count = int(self.runtime.arguments.get("tensor_parallel_size", 1))
        share = engine_share(most, 2 * parameters(str(self.model)), count)
        return {"gpu_memory_utilization": math.floor(share * 1000) / 1000} if share < most else {}

    def _environment(self) -> dict[str, str]:
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.device == "cpu":
            settings |= {"VLLM_CPU_KVCACHE_SPACE": f"{self.runtime.kv_cache_gib:g}", "TORCHDYNAMO_DISABLE": "1"}
        return settings | os.environ | import_paths()

    def _wait(self, health: str) -> None:
        """Wait until the server answers at this address."""
        end = time.monotonic() + self.runtime.start_seconds
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
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
                    f"the judge {self.name} did not answer within {self.runtime.start_seconds:g} s: "
                    "raise scorer.server.start_seconds"
                )

    def check(self, error: type[Exception] = TransientError, patience: float = 0.0) -> None:
        """Raise `error`, with the end of its output, if the server has ended by itself. `patience`: seconds in which it
        may still end."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(patience)
            output = self._read_output()
            self.close()
            raise error(
                f"the judge's server (`vllm serve {self.model}`) ended with code {code}. "
                f"Its last words:\n{output[-1500:]}"
            )

    def _read_output(self) -> str:
        if self.output is None:
            return ""
        self.output.seek(0)
        return self.output.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End the server; the next `start` makes another one."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None
        if self.output is not None:
            self.output.close()
            self.output = None
