"""Tasks - run one stage as a process tree: stream its output, follow its progress, leave no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, Protocol

from data_contracts.errors import BY_NAME, StageError, TransientError
from data_contracts.installation import import_paths
from data_contracts.redaction import redact
from stages.running.request import TREE
from stages.running.supervise import processes_with, signal_all, supervisor_options
from tasks.forkserver import SWITCH, ForkedProcess

LINES_PER_SECOND = 10
"""At most this many reach Prefect (20,000 lines cost its server 50 s); the log file gets all."""
NOISE = re.compile(
    r"\d+%\||(it|examples)/s\]|s/it\]|^@|^\s*$|Warning: |^\S*W\d{4} |\bWARNING \d\d-\d\d |\[WARNING\]|^\[transformers\]|^  "
)
"""Progress bars, warnings of libraries and their quoted source lines: in the log file, not in the UI."""
OF_ALL_STAGES = {"PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1"}
"""Environment variables of every stage. DO_NOT_TRACK is one because a run sets it for its Prefect server, after its first
fork, and libraries read it when they are imported: stages before and after would need a fork server each."""
GRACE_SECONDS = 10.0
"""Time that a stage gets to end by itself after SIGTERM."""
POLL_SECONDS = 0.2


class Progress:
    """How far a stage is, as its last `@progress` line tells."""

    def __init__(self) -> None:
        self.done, self.total, self.unit = 0, 0, ""

    @property
    def percent(self) -> float:
        if self.total:
            return 100.0 * self.done / self.total
        return 0.0


class _Output:
    """A stage's output. A thread copies it to the log file; `forward` hands it to the run's log."""

    def __init__(self, stream: IO[str], log_file: Path, log: Callable[[str], None]):
        self.stream, self.log_file, self.log = stream, log_file, log
        self.lines: SimpleQueue[str] = SimpleQueue()
        """Not forwarded yet."""
        self.tail: deque[str] = deque(maxlen=30)
        """The last lines without noise."""
        self.error: dict[str, Any] = {}
        """`type` and `message` of the error that the stage reported."""
        self.progress = Progress()
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        # A full disk costs the file, never the reading: a stage whose pipe nobody empties stands still for ever.
        file = None
        with self.stream:
            for line in map(redact, self.stream):
                self.lines.put(line.rstrip("\n"))
                with suppress(OSError):
                    file = file or open(self.log_file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
                    file.write(line)
            with suppress(OSError):
                if file:
                    file.close()

    def forward(self, seconds: float) -> None:
        """Read the new lines and log some of them, as many as LINES_PER_SECOND allows in `seconds`."""
        budget, held_back = max(1, int(LINES_PER_SECOND * seconds)), 0
        while True:
            try:
                line = self.lines.get_nowait()
            except Empty:
                break
            if line.startswith("@progress "):
                vars(self.progress).update(_message(line, {"done", "total", "unit"}))
            elif line.startswith("@error "):
                self.error.update(_message(line, {"type", "message"}))
            elif not NOISE.search(line):
                self.tail.append(line)
                if budget > 0:
                    self.log(line)
                    budget -= 1
                else:
                    held_back += 1
        if held_back:
            self.log(f"... {held_back} more lines in the log file")


def _message(line: str, fields: set[str]) -> dict[str, Any]:
    """The JSON in a stage's `@` line; {} if another process of its tree wrote into the middle of it."""
    try:
        message = json.loads(line.partition(" ")[2])
    except ValueError:
        return {}
    if isinstance(message, dict) and message.keys() == fields:
        return message
    return {}


class Process(Protocol):
    """What this module needs of a process; subprocess.Popen has it."""

    returncode: Any
    stdout: Any
    """IO[str], or None."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


def _start_interpreter(
    python: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    inherit: Sequence[int],
    output: int,
) -> subprocess.Popen[str]:
    """Start `python -m MODULE ARGUMENTS` below a supervisor; its output goes to the file descriptor."""
    supervisor = [sys.executable, "-m", "stages.running.supervise", *supervisor_options(GRACE_SECONDS)]
    return subprocess.Popen(
        [*supervisor, python, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment,
        pass_fds=tuple(inherit),
    )


class StageProcess:
    """`python -m stages ARGUMENTS` and its process tree, started: a fork of a server that has imported its libraries,
    or an interpreter of its own where `python` is another one.

    Call `wait` until it returns True, and `end` in any case (leaving its `with` block does).
    inherit: file descriptors (a lock) that the tree keeps open; module: another one than `stages`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        log_file: Path,
        log: Callable[[str], None],
        module: str = "stages",
        python: str | None = None,
        env: dict[str, str] | None = None,
        inherit: Sequence[int] = (),
        timeout: float | None = None,
    ):
        self.stage, self.log_file, self.timeout = arguments[0], log_file, timeout
        tree = uuid.uuid4().hex
        self.marker = f"{TREE}={tree}"
        environment = os.environ | OF_ALL_STAGES | {TREE: tree} | import_paths()
        environment |= env or {}
        self.began = time.monotonic()
        start_plainly = partial(_start_interpreter, python or sys.executable, module, arguments, environment, inherit)
        self.process: Process
        if python in (None, sys.executable) and os.environ.get(SWITCH) != "off":
            self.process = ForkedProcess(module, arguments, environment, GRACE_SECONDS, inherit, start_plainly)
        else:
            self.process = start_plainly(subprocess.PIPE)
        assert self.process.stdout is not None
        self.output = _Output(self.process.stdout, log_file, log)

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def wait(self, patience: float) -> bool:
        """Wait up to `patience` seconds and forward new output. Returns True once the process has exited.

        Raises: StageError if it ran longer than its timeout.
        """
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            ended = False
        else:
            ended = True
            self.output.thread.join(5)
        self.output.forward(POLL_SECONDS)
        if not ended and self.timeout is not None and time.monotonic() - self.began > self.timeout:
            raise StageError(
                f"the stage {self.stage} ran longer than runtime.timeout_seconds = {self.timeout:g}; "
                f"log: {self.log_file}"
            )
        return ended

    def end(self) -> None:
        """End every process of the tree."""
        end_tree(self.process, self.marker)

    def check(self) -> None:
        """Raises: what `run_stage` raises, if the stage has failed."""
        code, error = self.process.returncode, self.output.error
        if not code:
            return
        if error:
            kind = BY_NAME.get(error["type"], StageError)
            raise kind(f"{error['message']} [stage {self.stage}, log: {self.log_file}]")
        last = "\n".join(self.output.tail)
        number = code - 128 if code > 0 else -code
        if 0 < number < signal.NSIG:  # 255, or 247 of the deepspeed launcher, is no signal
            raise TransientError(
                f"the stage {self.stage} was killed by signal {number} ({signal.strsignal(number)}; 9 is often the "
                f"out-of-memory killer); log: {self.log_file}\n{last}"
            )
        raise StageError(
            f"the stage {self.stage} ended with exit code {code}; log: {self.log_file}; its last lines:\n{last}"
        )


def end_tree(process: Process, marker: str) -> None:
    """End a supervisor and its tree, then other processes with the marker (NAME=value) in their environment."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS + 7)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Only a supervisor that was itself killed leaves processes.
    signal_all(processes_with(marker), signal.SIGKILL)


def run_stage(
    arguments: Sequence[str],
    *,
    log_file: Path,
    log: Callable[[str], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> None:
    """Run `python -m stages ARGUMENTS` to its end; options as of StageProcess.

    Its whole tree ends with it: on success, on an exception raised here (a cancel, Ctrl-C, a timeout), and when this
    process is killed.
    Raises: the pipeline error that the stage reported; TransientError if it was killed; StageError if it died otherwise
    or ran too long.
    """
    with StageProcess(arguments, log_file=log_file, log=log, **options) as stage:
        while not stage.wait(POLL_SECONDS):
            on_progress(stage.output.progress)
        on_progress(stage.output.progress)
    stage.check()
