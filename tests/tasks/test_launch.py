"""A stage process: what it says is passed on, what it meant is raised, and nothing of its tree outlives it.

Strategy: each test runs twice. As an interpreter: the `python` that runs the stage is a script of ours that misbehaves
as the test wishes. As a fork: the same lines are what a stage of another package does, below a fork server. They leave
the ids of their processes in a file, children in sessions of their own among them. The parent that is killed with -9 is
a process that called run_stage.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tasks.forkserver
import tasks.launch
from data_contracts.errors import ArtifactError, ConfigError, ContractError, StageError, TransientError
from flows.cli.server import _environment
from stages.running.supervise import descendants, processes_with, supervisor_options
from tasks.launch import LINES_PER_SECOND, OF_ALL_STAGES, run_stage

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


PROBE = """
import os, sys
from data_contracts.config import Config as Settings
from stages.stage import Stage

class Config(Settings):
    code: str
    before: str = ""

def preload(config):
    exec(config.before, {"__name__": "selfplay_probe"})

def run(job):
    exec(job.config.code, {"__name__": "__main__"})
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)

STAGE = Stage("probe", "1", "generations", {}, "selfplay_probe", section="probe", phase="scoring", unit="pairs")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An installed distribution with the stage `probe`, which does what its settings say."""
    site = tmp_path_factory.mktemp("site")
    (site / "selfplay_probe.py").write_text(PROBE)
    info = site / "selfplay_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: selfplay-probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[selfplay.stages]\nprobe = selfplay_probe:STAGE\n")
    return site


@pytest.fixture(params=["interpreter", "fork"])
def stage(request, tmp_path, site):
    """stage(code, ...) runs `code` as a stage; what it said is in stage.logged, stage.progress and stage.log_file."""
    return Stage(tmp_path, site if request.param == "fork" else None)


@pytest.fixture
def forked(tmp_path, site):
    """The same, as a fork only."""
    return Stage(tmp_path, site)


class Stage:
    def __init__(self, directory: Path, site: Path | None):
        self.directory, self.log_file, self.pid_file = directory, directory / "stage.log", directory / "pids"
        self.site = site
        self.name = "probe" if site else "sample"
        self.logged: list[str] = []
        self.progress: list[tuple[int, int, str]] = []

    def tree(self, then: str, on_term: str = "SIG_DFL") -> str:
        return TREE.format(pids=str(self.pid_file), on_term=on_term) + then

    def call(self, code: str, before: str = "") -> tuple[list[str], dict]:
        """The arguments and the options of run_stage that make it run the code."""
        if self.site is None:
            path = self.directory / "python"
            path.write_text(f"#!{sys.executable}\n{code}\n")
            path.chmod(0o755)
            return [self.name, "spec.json"], {"python": str(path)}
        spec = self.directory / "spec.json"
        config = {"code": code, "before": before}
        spec.write_text(json.dumps({"config": config, "inputs": {}, "store": str(self.directory / "store")}))
        return [self.name, str(spec)], {"env": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(self.site)])}}

    def __call__(self, code: str, before: str = "", env: dict | None = None, **options) -> None:
        def follow(progress) -> None:
            self.progress.append((progress.done, progress.total, progress.unit))

        arguments, start = self.call(code, before)
        env = start.pop("env", {}) | (env or {})
        options = {"log": self.logged.append, "on_progress": follow} | start | options
        run_stage(arguments, log_file=self.log_file, env=env, **options)

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
    arguments = ["-m", "stages", "sample", "spec.json"]
    if stage.site:
        arguments = ["probe", str(stage.directory / "spec.json")]
    assert sorted(stage.logged) == [str(arguments), "to stderr"]
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
    stage(
        "print('(EngineCore pid=7) WARNING 11-28 10:00:01 [cpu.py:9] slow'); "
        "print('[2026-11-28 09:46:58,496] [WARNING] [real_accelerator.py:213] no GPU'); "
        "print('[transformers] `x` is old'); print('Generating: 8 examples [00:00, 2841.19 examples/s]'); "
        "print('shard 0: WARNING of ours')"
    )
    assert stage.logged[1:] == ["shard 0: WARNING of ours"]


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
    with pytest.raises(raised, match=rf"row 7 is bad \[stage {stage.name}, log: .*stage\.log\]") as caught:
        stage(report)
    assert type(caught.value) is raised


@pytest.mark.parametrize("code", [1, 17, 128, 200, 247, 255])
def test_an_exit_code_without_a_report_is_a_stage_error_with_the_last_lines(stage, code):
    with pytest.raises(
        StageError,
        match=rf"the stage {stage.name} ended with exit code {code}; log: .*stage\.log; its last lines:\n(.*\n)*line 39",
    ):
        stage(f"for number in range(40): print('line', number)\nraise SystemExit({code})")


def test_a_python_traceback_is_among_the_last_lines(stage):
    with pytest.raises(StageError, match="ZeroDivisionError"):
        stage("1 / 0")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_stage_that_was_killed_is_worth_another_try(stage, number):
    with pytest.raises(TransientError, match=f"the stage {stage.name} was killed by signal {number:d} "):
        stage(f"import os; print('working', flush=True); os.kill(os.getpid(), {number:d})")


def test_an_interpreter_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StageError, match="No such file"):
        Stage(tmp_path, None)("", python="/no/such/python")


# --- nothing of it survives


def test_children_that_a_stage_leaves_behind_end_with_it(stage):
    stage(stage.tree("sys.exit(0)"))
    assert stage.is_gone(0.5)


def test_the_tree_ends_on_a_timeout(stage):
    began = time.monotonic()
    with pytest.raises(StageError, match=f"the stage {stage.name} ran longer than runtime.timeout_seconds = 1.5"):
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
import json, sys, tasks.launch
from pathlib import Path
tasks.launch.GRACE_SECONDS = 1.0
arguments, options = json.loads(sys.argv[1])
tasks.launch.run_stage(arguments, log_file=Path(sys.argv[2]), log=print, **options)
"""


def call(stage, code: str) -> subprocess.Popen:
    """A process that runs the stage."""
    command = [sys.executable, "-c", CALLER, json.dumps(stage.call(code)), str(stage.log_file)]
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
    write = f"""
import os
links = [number for number in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + number)]
(mine,) = [int(number) for number in links if os.readlink("/proc/self/fd/" + number) == {str(tmp_path / "lock")!r}]
os.write(mine, b"mine")
"""
    with open(tmp_path / "lock", "w") as file:
        stage(write, inherit=[file.fileno()])
        assert (tmp_path / "lock").read_text() == "mine"
        with pytest.raises(StageError, match="not enough values to unpack"):
            stage(write)


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


# --- the fork server


@pytest.fixture
def servers(monkeypatch):
    """The servers of this process, none of another test among them."""
    servers: dict = {}
    monkeypatch.setattr(tasks.forkserver, "_servers", servers)
    yield servers
    for server in servers.values():
        server.close()


WHO = """
import os
server = int(open(f"/proc/{os.getppid()}/stat").read().rsplit(")", 1)[1].split()[1])
print("server", server, "imported", os.environ.get("NUMBER"), *sys.modules.get("counted", []))
"""


def test_stages_are_forks_of_one_server_that_imports_once(forked, servers):
    before = "import sys\nsys.modules.setdefault('counted', []).append(len(sys.modules['counted']))"
    for number in ("1", "2"):
        forked("import sys\n" + WHO, before, env={"SELFPLAY_NUMBER": number})
    (server,) = servers.values()
    assert forked.logged == [
        f"server {server.process.pid} imported None 0",
        f"server {server.process.pid} imported None 0 1",
    ]
    forked("import sys\n" + WHO, env={"NUMBER": "3"})  # a library may read it when it is imported
    assert len(servers) == 2 and forked.logged[-1].endswith("imported 3")
    forked("import sys\n" + WHO, env={"NUMBER": "4"})
    assert len(servers) == 2
    assert wait_until(lambda: not alive(server.process.pid), 5)


def test_libraries_are_imported_in_the_environment_of_a_stage(forked, servers):
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK", "MINE")
    note = f"import os, sys; sys.imported_in = [os.environ.get(name) for name in {names}]"
    see = f"import os, sys; print(sys.imported_in == [os.environ.get(name) for name in {names}], *sys.imported_in)"
    forked(see, note, env={"MINE": "yes", "OMP_NUM_THREADS": "1"})
    assert forked.logged == ["True PASSIVE 1 1 yes"]


def test_whoever_asks_for_a_stage_keeps_its_own_environment():
    code = "import os; before = dict(os.environ); import tasks.launch; assert os.environ == before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_fork_is_shown_as_the_stage_that_it_is(forked):
    show = """
import os
for pid in (os.getpid(), os.getppid()):
    print(open(f"/proc/{pid}/cmdline").read().strip("\\0").split("\\0")[1:])
    print("SELFPLAY_TREE=" + os.environ["SELFPLAY_TREE"] in open(f"/proc/{pid}/environ").read().split("\\0"))
"""
    forked(show)
    stage = ["-m", "stages", "probe", str(forked.directory / "spec.json")]
    lines = forked.log_file.read_text().splitlines()
    assert lines == [str(stage), "True", str(["-m", "stages.running.supervise", "--", *stage]), "True"]


def test_a_fork_has_the_signals_the_session_and_the_chance_of_a_new_process(forked):
    code = """
import os, random, signal, sys
import numpy
print([signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGINT", "SIGHUP")])
print(os.getsid(0) == os.getpid(), os.getcwd() == sys.path[0], sys.stdin.read() == "")
print("drawn", random.random(), numpy.random.random())
"""
    for _ in range(2):
        forked(code, "import numpy")
    handlers = [signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL]
    lines = forked.log_file.read_text().splitlines()
    assert lines[:2] == [str(handlers), "True True True"]
    first, second = (line.split()[1:] for line in lines if line.startswith("drawn"))
    assert first[0] != second[0] and first[1] != second[1]


@pytest.mark.parametrize(
    "before",
    [
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import os; os._exit(3)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
    ids=["starts a thread", "exits", "is killed"],
)
def test_where_an_import_spoils_the_server_the_stage_is_an_interpreter_of_its_own(forked, servers, before):
    forked("import os; print(open(f'/proc/{os.getppid()}/cmdline').read().split(chr(0))[2])", before)
    assert forked.logged == ["stages.running.supervise"]


def test_a_copy_of_the_output_that_an_import_keeps_holds_nobody_up(forked):
    readers = {thread for thread in threading.enumerate() if "_copy" in thread.name}
    forked("print('the stage')", "import os; os.dup(2); print('the import')")
    assert forked.logged == ["the import", "the stage"]
    assert {thread for thread in threading.enumerate() if "_copy" in thread.name} <= readers


def test_a_server_of_our_own_sets_nothing_that_makes_another_environment():
    added = _environment("http://127.0.0.1:1/api", Path("home"))
    others = [name for name in added if not tasks.forkserver.VOLATILE.match(name)]
    assert all(OF_ALL_STAGES.get(name) == added[name] for name in others)


def test_an_import_that_fails_is_said_by_the_stage(forked):
    forked("print('as it would have been')", "import no_such_module")
    assert forked.logged == ["as it would have been"]


def test_an_import_that_never_ends_is_ended_with_its_timeout(forked, servers):
    began = time.monotonic()
    with pytest.raises(StageError, match="ran longer than"):
        forked("", "import time; time.sleep(120)", timeout=1.0)
    assert time.monotonic() - began < 8


def test_a_server_that_is_killed_costs_no_stage(forked, servers):
    def kill_server(progress) -> None:
        for server in servers.values():
            if forked.pid_file.is_file() and server.is_alive():
                server.process.kill()

    forked(forked.tree("time.sleep(1); print('went on')"), on_progress=kill_server)
    assert forked.logged[-1] == "went on"
    assert forked.is_gone(0.5)
    forked("print('and the next one')")
    assert forked.logged[-1] == "and the next one"


def test_the_server_ends_with_its_caller_killed_with_9(forked):
    caller = call(forked, forked.tree("time.sleep(120)"))
    server = int(Path(f"/proc/{forked.pids()[3]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert alive(server) and server in descendants(caller.pid)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert wait_until(lambda: not alive(server), 2)
    assert forked.is_gone()


def test_the_server_can_be_switched_off(forked, servers, monkeypatch):
    monkeypatch.setenv("SELFPLAY_FORK_SERVER", "off")
    forked("print('alone')")
    assert forked.logged == ["alone"] and not servers
