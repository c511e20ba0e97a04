"""Tasks - run one stage as a process tree of its own: stream its output, follow its progress, leave nothing behind."""

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import stages
from data_contracts.errors import BY_NAME, StageError, TransientError
from stages.running.supervise import processes_with, signal_all, supervisor_options

CHECKOUT = Path(stages.__file__).resolve().parent.parent
LINES_PER_SECOND = 10
"""What a log server gets at most; the file gets everything (20,000 lines cost Prefect's server 50 s)."""
NOISE = re.compile(r"\d+%\||it/s\]|s/it\]|^@|^\s*$|Warning: |^\S*W\d{4} |^  ")
"""Progress bars, warnings of libraries and their quoted source lines: in the file, not in the UI."""
GRACE_SECONDS = 10.0


class Progress:
    """The last `@progress` line of a stage."""

    def __init__(self) -> None:
        self.done, self.total, self.unit = 0, 0, ""

    @property
    def percent(self) -> float:
        return 100.0 * self.done / self.total if self.total else 0.0


class StageProcess:
    """`python -m stages ARGUMENTS` and its tree, started; the caller looks at it until it has ended, and always calls `end`.

    `inherit`: file descriptors (a lock) that the tree keeps open.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        log_file: Path,
        log: Callable[[str], None],
        python: str | None = None,
        env: dict[str, str] | None = None,
        inherit: Sequence[int] = (),
        timeout: float | None = None,
    ):
        self.stage, self.log_file, self.log, self.timeout = arguments[0], log_file, log, timeout
        self.marker = f"SELFPLAY_TREE={uuid.uuid4().hex}"
        command = [
            sys.executable,
            "-m",
            "stages.running.supervise",
            *supervisor_options(GRACE_SECONDS),
            python or sys.executable,
            "-m",
            "stages",
            *arguments,
        ]
        environment = (
            os.environ
            | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path(), "SELFPLAY_TREE": self.marker.partition("=")[2]}
            | (env or {})
        )
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True, env=environment, pass_fds=tuple(inherit),
        )  # fmt: skip
        self.tail: deque[str] = deque(maxlen=30)
        self.reported: dict[str, Any] = {}
        self.progress = Progress()
        self.pump = threading.Thread(target=_pump, args=(self.process.stdout, log_file, self.lines), daemon=True)
        self.pump.start()

    def look(self, patience: float) -> bool:
        """Wait so many seconds for the end, hand on what was said; whether it has ended. Raises: StageError if it ran too long."""
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            ended = False
        else:
            ended = True
            self.pump.join(5)
        _drain(self.lines, self.tail, self.reported, self.progress, self.log)
        if not ended and self.timeout is not None and time.monotonic() - self.began > self.timeout:
            raise StageError(
                f"the stage {self.stage} ran longer than runtime.timeout_seconds = {self.timeout:g}; log: {self.log_file}"
            )
        return ended

    def end(self) -> None:
        """Nothing of the tree is left."""
        _end(self.process, self.marker)

    def check(self) -> None:
        """Raises: what `run_stage` raises, if it has failed."""
        if code := self.process.returncode:
            _raise(code, self.reported, self.tail, self.stage, self.log_file)


def run_stage(
    arguments: Sequence[str],
    *,
    log_file: Path,
    log: Callable[[str], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> None:
    """`python -m stages ARGUMENTS`, blocking; options as of StageProcess. The whole tree ends with it: on success, on any exception raised
    here (a cancel, Ctrl-C, a timeout), and when this process itself is killed.

    Raises: the pipeline error that the stage reported; TransientError if it was killed; StageError if it died otherwise or ran too long.
    """
    stage = StageProcess(arguments, log_file=log_file, log=log, **options)
    try:
        while not stage.look(0.2):
            on_progress(stage.progress)
        on_progress(stage.progress)
    finally:
        stage.end()
    stage.check()


def python_path() -> str:
    """This checkout first: the packages are the same in whatever interpreter runs the stage."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


def _pump(stream: Any, log_file: Path, lines: SimpleQueue[str]) -> None:
    # A full disk costs the file, never the reading: a stage whose pipe nobody empties stands still for ever.
    file = None
    with stream:
        for line in stream:
            lines.put(line.rstrip("\n"))
            with suppress(OSError):
                file = file or open(log_file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
                file.write(line)
        with suppress(OSError):
            if file:
                file.close()


def _drain(
    lines: SimpleQueue[str], tail: deque[str], reported: dict[str, Any], progress: Progress, log: Callable[[str], None]
) -> None:
    """Hand on what the stage said since the last look; Prefect is only ever called from the thread that runs the task."""
    allowed, held = max(1, int(LINES_PER_SECOND * 0.2)), 0
    while True:
        try:
            line = lines.get_nowait()
        except Empty:
            break
        if line.startswith("@progress "):
            progress.__dict__.update(_message(line, {"done", "total", "unit"}))
        elif line.startswith("@error "):
            reported.update(_message(line, {"type", "message"}))
        elif not NOISE.search(line):
            tail.append(line)
            if allowed > 0:
                log(line)
                allowed -= 1
            else:
                held += 1
    if held:
        log(f"... {held} more lines in the log file")


def _message(line: str, fields: set[str]) -> dict[str, Any]:
    """What a stage tells us in a line of JSON; nothing, if another process of its tree wrote into the middle of it."""
    try:
        message = json.loads(line.partition(" ")[2])
    except ValueError:
        return {}
    return message if isinstance(message, dict) and message.keys() == fields else {}


def _end(process: subprocess.Popen, marker: str) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # the supervisor ends its whole tree
        try:
            process.wait(GRACE_SECONDS + 7)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Only a supervisor that was itself killed leaves anything: found by what every process of the tree inherited.
    signal_all(processes_with(marker), signal.SIGKILL)


def _raise(code: int, reported: dict[str, Any], tail: deque[str], stage: str, log_file: Path) -> None:
    if reported:
        raise BY_NAME.get(reported["type"], StageError)(f"{reported['message']} [stage {stage}, log: {log_file}]")
    last = "\n".join(tail)
    number = code - 128 if code > 0 else -code
    if 0 < number < signal.NSIG:  # 255, or 247 of the deepspeed launcher, is no signal
        raise TransientError(
            f"the stage {stage} was killed by signal {number} ({signal.strsignal(number)}; 9 is often the out-of-memory killer); log: {log_file}\n{last}"
        )
    raise StageError(f"the stage {stage} ended with exit code {code}; log: {log_file}; its last lines:\n{last}")
