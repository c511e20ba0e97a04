"""A stage process: what it says is passed on, what it meant is raised, and nothing of its tree outlives it.

Strategy: the `python` that runs the stage is a script of ours that misbehaves as the test wishes; it leaves the ids of
its processes in a file, children in sessions of their own among them. The parent that is killed with -9 is a process
that called run_stage.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tasks.launch
from data_contracts.errors import ArtifactError, ConfigError, ContractError, StageError, TransientError
from stages.running.supervise import descendants, processes_with, supervisor_options
from tasks.launch import LINES_PER_SECOND, run_stage

ROOT = Path(__file__).resolve().parents[2]
TREE = """
import os, signal, subprocess, sys, time
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.{on_term}); time.sleep(120)"
signal.signal(signal.SIGTERM, signal.{on_term})
middle = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', %r], start_new_session=True); print(p.pid, flush=True); time.sleep(120)" % sleep
child = subprocess.Popen([sys.executable, "-c", middle], start_new_session=True, stdout=subprocess.PIPE, text=True)
grandchild = child.stdout.readline().strip()
with open({pids!r} + ".part", "w") as file:
    file.write("%d %d %s %d" % (os.getpid(), child.pid, grandchild, os.getppid()))
os.replace({pids!r} + ".part", {pids!r})
print("up", flush=True)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tasks.launch, "GRACE_SECONDS", 1.0)


@pytest.fixture
def stage(tmp_path):
    """stage(code, ...) runs `code` as a stage; what it said is in stage.logged, stage.progress and stage.log_file."""
    return Stage(tmp_path)


class Stage:
    def __init__(self, directory: Path):
        self.directory, self.log_file, self.pid_file = directory, directory / "stage.log", directory / "pids"
        self.logged: list[str] = []
        self.progress: list[tuple[int, int, str]] = []

    def script(self, code: str) -> str:
        path = self.directory / "python"
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o755)
        return str(path)

    def tree(self, then: str, on_term: str = "SIG_DFL") -> str:
        return TREE.format(pids=str(self.pid_file), on_term=on_term) + then

    def __call__(self, code: str, **options) -> None:
        def follow(progress) -> None:
            self.progress.append((progress.done, progress.total, progress.unit))

        options = {"log": self.logged.append, "on_progress": follow, "python": self.script(code)} | options
        run_stage(["sample", "spec.json"], log_file=self.log_file, **options)

    def pids(self) -> list[int]:
        """The processes of the tree: stage, child, grandchild, supervisor. Waits until it stands."""
        wait_until(self.pid_file.is_file, 20)
        return [int(pid) for pid in self.pid_file.read_text().split()]

    def is_gone(self, seconds: float = 8.0) -> bool:
        pids = self.pids()
        return wait_until(lambda: not any(map(alive, pids)), seconds)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- what it says


def test_a_stage_gets_its_arguments_and_its_lines_are_logged_and_kept(stage):
    stage("import sys; print(sys.argv[1:]); print('to stderr', file=sys.stderr)", log=stage.logged.append)
    assert sorted(stage.logged) == ["['-m', 'stages', 'sample', 'spec.json']", "to stderr"]
    assert sorted(stage.log_file.read_text().splitlines()) == sorted(stage.logged)


def test_a_stage_gets_the_environment_it_was_given_and_the_checkout_to_import_from(stage):
    stage("import os, stages; print(os.environ['MINE'], stages.__file__)", env={"MINE": "yes"})
    assert stage.logged == [f"yes {ROOT / 'stages' / '__init__.py'}"]


def test_progress_lines_become_numbers_and_are_not_logged(stage):
    code = """
import json, time
for done in (1, 2, 4):
    print("@progress " + json.dumps({"done": done, "total": 4, "unit": "shards"}), flush=True)
    time.sleep(0.3)
"""
    stage(code)
    assert stage.logged == []
    seen = [item for item in dict.fromkeys(stage.progress) if item[1]]
    assert seen == [(1, 4, "shards"), (2, 4, "shards"), (4, 4, "shards")]


def test_a_line_that_only_looks_like_a_message_to_us_ends_nothing(stage):
    # Two processes that write to one pipe cut each other's lines.
    stage(
        "print('@progress {\"done\": 1, \"tot'); print('@error'); print('@error {}{'); print('@progress 3'); print('fine')"
    )
    assert "fine" in stage.logged


def test_bars_and_library_noise_are_in_the_file_only(stage):
    stage(
        "print('Loading: 50%|#####     | 1/2'); print('x.py:3: UserWarning: old'); print('    old()'); print('loss 0.5')"
    )
    assert stage.logged == ["loss 0.5"]
    assert len(stage.log_file.read_text().splitlines()) == 4


def test_a_flood_of_lines_is_throttled_in_the_log_and_complete_in_the_file(stage):
    began = time.monotonic()
    stage("for number in range(20000): print('line', number)")
    seconds = time.monotonic() - began
    assert stage.log_file.read_text().splitlines() == [f"line {number}" for number in range(20000)]
    held = [line for line in stage.logged if "more lines in the log file" in line]
    assert held and len(stage.logged) - len(held) <= LINES_PER_SECOND * (seconds + 1)
    assert sum(int(line.split()[1]) for line in held) + len(stage.logged) - len(held) == 20000


def test_bytes_that_are_no_text_do_not_stop_the_log(stage):
    stage("import os; os.write(1, b'\\xff\\xfe raw\\n'); print('after')")
    assert "after" in stage.logged


def test_a_second_try_adds_to_the_log_file(stage):
    stage("print('one')")
    stage("print('two')")
    assert stage.log_file.read_text() == "one\ntwo\n"


# --- what it meant


@pytest.mark.parametrize(
    ("reported", "raised", "code"),
    [
        ("ConfigError", ConfigError, 2),
        ("ContractError", ContractError, 3),
        ("ArtifactError", ArtifactError, 4),
        ("TransientError", TransientError, 75),
        ("Mystery", StageError, 1),
    ],
)
def test_an_error_the_stage_reported_is_raised_again_as_what_it_was(stage, reported, raised, code):
    report = f"""print('@error {{"type": "{reported}", "message": "row 7 is bad"}}'); raise SystemExit({code})"""
    with pytest.raises(raised, match=r"row 7 is bad \[stage sample, log: .*stage\.log\]") as caught:
        stage(report)
    assert type(caught.value) is raised


@pytest.mark.parametrize("code", [1, 17, 128, 200, 247, 255])
def test_an_exit_code_without_a_report_is_a_stage_error_with_the_last_lines(stage, code):
    with pytest.raises(
        StageError,
        match=rf"the stage sample ended with exit code {code}; log: .*stage\.log; its last lines:\n(.*\n)*line 39",
    ):
        stage(f"for number in range(40): print('line', number)\nraise SystemExit({code})")


def test_a_python_traceback_is_among_the_last_lines(stage):
    with pytest.raises(StageError, match="ZeroDivisionError"):
        stage("1 / 0")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_stage_that_was_killed_is_worth_another_try(stage, number):
    with pytest.raises(TransientError, match=f"the stage sample was killed by signal {number:d} "):
        stage(f"import os; print('working', flush=True); os.kill(os.getpid(), {number:d})")


def test_an_interpreter_that_is_not_there_is_an_error(stage):
    with pytest.raises(StageError, match="No such file"):
        stage("", python="/no/such/python")


# --- nothing of it survives


def test_children_that_a_stage_leaves_behind_end_with_it(stage):
    stage(stage.tree("sys.exit(0)"))
    assert stage.is_gone(0.5)


def test_the_tree_ends_on_a_timeout(stage):
    began = time.monotonic()
    with pytest.raises(StageError, match=r"the stage sample ran longer than runtime.timeout_seconds = 1.5"):
        stage(stage.tree("time.sleep(120)"), timeout=1.5)
    assert time.monotonic() - began < 8
    assert stage.is_gone(0.5)


def test_the_tree_ends_when_whoever_watches_raises(stage):
    class Cancelled(BaseException):
        pass

    def cancel(progress) -> None:
        if stage.pid_file.is_file():
            raise Cancelled

    with pytest.raises(Cancelled):
        stage(stage.tree("time.sleep(120)"), on_progress=cancel)
    assert stage.is_gone(0.5)


def test_a_tree_that_will_not_listen_is_killed_after_the_grace(stage):
    def cancel(progress) -> None:
        if stage.pid_file.is_file():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stage(stage.tree("time.sleep(120)", on_term="SIG_IGN"), on_progress=cancel)
    assert time.monotonic() - began < 12
    assert stage.is_gone(0.5)


CALLER = """
import sys, tasks.launch
from pathlib import Path
tasks.launch.GRACE_SECONDS = 1.0
tasks.launch.run_stage(["sample", "spec.json"], log_file=Path(sys.argv[2]), log=print, python=sys.argv[1])
"""


def call(stage, code: str) -> subprocess.Popen:
    """A process that runs the stage."""
    command = [sys.executable, "-c", CALLER, stage.script(code), str(stage.log_file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("on_term", ["SIG_DFL", "SIG_IGN"])
def test_the_tree_ends_when_its_caller_is_killed_with_9(stage, on_term):
    caller = call(stage, stage.tree("time.sleep(120)", on_term))
    assert all(map(alive, stage.pids()))
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert stage.is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_tree_ends_when_its_caller_is_asked_to_end(stage, number):
    caller = call(stage, stage.tree("time.sleep(120)"))
    stage.pids()
    caller.send_signal(number)
    caller.wait()
    assert stage.is_gone()


def test_what_a_killed_supervisor_leaves_is_found_by_its_mark(stage):
    def kill_supervisor(progress) -> None:
        if stage.pid_file.is_file() and alive(stage.pids()[3]):
            os.kill(stage.pids()[3], signal.SIGKILL)

    with pytest.raises(TransientError, match="killed by signal 9"):
        stage(stage.tree("time.sleep(120)"), on_progress=kill_supervisor)
    assert stage.is_gone(2)


def test_a_killed_stage_process_takes_its_children_along(stage):
    def kill_stage(progress) -> None:
        if stage.pid_file.is_file() and alive(stage.pids()[0]):
            os.kill(stage.pids()[0], signal.SIGKILL)

    with pytest.raises(TransientError, match="killed by signal 9"):
        stage(stage.tree("time.sleep(120)"), on_progress=kill_stage)
    assert stage.is_gone(0.5)


def test_processes_are_found_by_what_they_inherited_and_by_their_parents():
    mark = f"SELFPLAY_TREE=test-{os.getpid()}"
    name, _, value = mark.partition("=")
    outer = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], env=os.environ | {name: value}, start_new_session=True)
    try:
        assert wait_until(lambda: len(processes_with(mark)) == 2, 5)
        assert set(processes_with(mark)) <= set(descendants()) and outer.pid in descendants()
        assert processes_with(mark[:-1]) == []
    finally:
        os.killpg(outer.pid, signal.SIGKILL)
        outer.wait()


def test_descriptors_are_inherited_by_the_stage_alone_if_asked(stage, tmp_path):
    with open(tmp_path / "lock", "w") as file:
        stage(f"import os; os.write({file.fileno()}, b'mine')", inherit=[file.fileno()])
        assert (tmp_path / "lock").read_text() == "mine"
        with pytest.raises(StageError, match="Bad file descriptor"):
            stage(f"import os; os.write({file.fileno()}, b'mine')")


def test_a_supervisor_whose_parent_died_before_it_began_starts_nothing(tmp_path):
    """The kernel cannot tell it of a death that lies behind: it knows whom it should have."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    late = [sys.executable, "-m", "stages.running.supervise", "--parent", str(gone.pid), "--", *command]
    assert subprocess.run(late, cwd=ROOT, check=False).returncode == 143
    assert not (tmp_path / "ran").exists()
    assert (
        subprocess.run(
            [sys.executable, "-m", "stages.running.supervise", *supervisor_options(), *command], cwd=ROOT, check=False
        ).returncode
        == 0
    )
    assert (tmp_path / "ran").exists()
