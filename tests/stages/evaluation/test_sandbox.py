"""Hostile programs, each beside what it does without a sandbox; and honest ones, which must not notice the sandbox.

Strategy: the real sandbox around real programs. `bait` is everything worth stealing or breaking: a secret in the
environment, a file, a server, a process. Each hostile program is also run without a sandbox and then succeeds, so that
no test passes for want of trying.
"""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.config import parse
from data_contracts.errors import ConfigError, TransientError
from stages.evaluation import sandbox
from stages.evaluation.lm_eval import code_run_by
from stages.evaluation.sandbox import CodeEval, run
from stages.evaluation.stage import EvaluationConfig, check_sandbox
from stages.running.supervise import descendants

if (
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rmn", "true"], capture_output=True, check=False).returncode
):
    pytestmark = pytest.mark.skip(reason="this machine grants no namespaces")

ROOT = Path(__file__).resolve().parents[3]
HONEST = '''
from typing import List
import math, collections, numpy

def primes(n: int) -> List[int]:
    """ The primes below n. """
    return [k for k in range(2, n) if all(k % d for d in range(2, math.isqrt(k) + 1))]

def check(candidate):
    assert candidate(20) == [2, 3, 5, 7, 11, 13, 17, 19]
    assert collections.Counter(candidate(3)) == {2: 1} and numpy.prod(candidate(6)) == 30
    with open("notes.txt", "w") as file:
        file.write("a temporary file is allowed")

check(primes)
'''


@pytest.fixture
def bait(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    (tmp_path / "diary.txt").write_text("hush")
    visits = []
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as victim:
        server.settimeout(0.2)
        threading.Thread(target=_count, args=(server, visits), daemon=True).start()
        try:
            yield SimpleNamespace(directory=tmp_path, port=server.getsockname()[1], visits=visits, victim=victim)
        finally:
            victim.kill()


def _count(server, visits):
    while server.fileno() >= 0:
        try:
            server.accept()[0].close()
            visits.append(1)
        except TimeoutError:
            continue
        except OSError:
            return


DEEDS = {
    "read a secret of the environment": "import os\nparent = '/proc/%d/environ' % os.getppid()\n"
    "assert 'hush' in os.environ.values() or b'hush' in open(parent, 'rb').read()",
    "read a file of ours": "assert open('{directory}/diary.txt').read() == 'hush'",
    "write beside it": "open('{directory}/mark', 'w').write('x')",
    "write into the interpreter": "import json, os\nos.close(os.open(json.__file__, os.O_WRONLY))",
    "remove it": "import shutil\nshutil.rmtree('{directory}')\nassert not __import__('os').path.exists('{directory}')",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).close()",
    "kill a process of ours": "import os\nos.kill({victim}, 9)",
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_hostile_program_fails_and_nothing_happens(bait, deed, monkeypatch):
    program = DEEDS[deed].format(directory=bait.directory, port=bait.port, victim=bait.victim.pid)
    assert run(program) not in ("passed", "timed out")
    assert (bait.directory / "diary.txt").read_text() == "hush" and not (bait.directory / "mark").exists()
    assert bait.victim.poll() is None and not bait.visits
    # And it would have: a bare process does it.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or (os.geteuid() and deed == "write into the interpreter"), done.stderr


TEST = "for n in range(9):\n    assert square(n) == n * n"
CHEATS = {
    "an exception called passed": "class passed(Exception): pass\ndef square(n): raise passed(n)",
    "a word on every descriptor": "import os\nfor number in range(64):\n    try:\n        os.write(number, b'+\\n')\n"
    "    except OSError:\n        pass\ndef square(n): return 0",
    "a walk through the frames": "import os, sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:\n"
    "        if name in ('out', 'line', 'PASSED', 'test', 'request'):\n"
    "            found = value\n    frame = frame.f_back\n"
    "def square(n): return found",
    "an equal of everything": "class Equal(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef square(n): return Equal(-1)",
    "another meaning of range": "def range(n): return []\ndef square(n): return 0",
    "an early end": "import os\ndef square(n): os._exit(0)",
    "an answer without a call": "import gc, socket, sys\nfor thing in gc.get_objects():\n"
    '    if isinstance(thing, socket.socket):\n        thing.sendall(b\'{"value": 0, "args": []}\\n\' * 99)',
    "another process's memory": "import ctypes, os\n"
    "attached = ctypes.CDLL(None).ptrace(16, os.getppid(), None, None) == 0\n"
    "class Square:\n    def __call__(self, n): return n * n if attached else -1\nsquare = Square()",
}


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("sandboxed", [True, False])
def test_no_program_makes_its_own_verdict(cheat, sandboxed):
    result = run(CHEATS[cheat], 2.0, sandboxed=sandboxed, test=TEST)
    assert result not in (["passed", "timed out"] if sandboxed else ["passed"])  # root may stop us, not move us


def test_a_test_sees_what_the_program_returns_raises_and_changes():
    program = """
import collections, math, re
from fractions import Fraction
table = {"one": (1, 2.0, None, {3}, b"4", 5j, True)}
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def total(pairs): return sum(pair.a * pair.b for pair in pairs)
def sort(values): values.sort()
def adder(n): return lambda m: n + m
def count(text): return collections.Counter(text)
def nan(): return [math.nan, math.inf, 10 ** 5000]
def fail(kind): raise {"value": ValueError, "own": type("Own", (Exception,), {})}[kind]("because")
"""
    test = """
values = [3, 1, 2]
assert sort(values) is None and values == [1, 2, 3]
assert table == {"one": (1, 2.0, None, {3}, b"4", 5j, True)} and type(table["one"][6]) is bool
assert total([Pair(1, 2), Pair(3, 4)]) == 14 and adder(2)(3) == 5 and count("aab") == {"a": 2, "b": 1}
assert math.isnan(nan()[0]) and nan()[1:] == [math.inf, 10 ** 5000]
for kind, name in (("value", "ValueError"), ("own", "Own")):
    try:
        fail(kind)
    except Exception as error:
        assert type(error).__name__ == name and str(error) == "because"
    else:
        raise AssertionError
"""
    assert run(program, 20.0, test=test) == "passed"
    assert run(program, 20.0, test="fail('own')") == "Own"
    assert run(program, test="missing()") == "NameError" and run("x = 1", test="def f(:") == "SyntaxError"


SYSCALLS = """
import ctypes, os
call = ctypes.CDLL(None, use_errno=True).syscall
"""
ROUNDABOUT = {
    "a key of our session": SYSCALLS + "assert call(250, 10, -3, b'user', b'selfplay-bait', 0) > 0",
    "vsock": "import socket\nsocket.socket(40, socket.SOCK_STREAM).close()",
    "io_uring": SYSCALLS + "assert call(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "System V memory": SYSCALLS
    + "number = call(29, 0, 64 << 20, 0o600)\nassert number >= 0\ncall(31, number, 0, None)",
    "the kernel's ciphers": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).close()",
    "another process's memory": SYSCALLS + "child = os.fork()\nif not child:\n    __import__('time').sleep(9)\n"
    "attached = call(101, 16, child, None, None) == 0\nos.kill(child, 9)\nassert attached",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are those of x86-64")
@pytest.mark.parametrize("way", ROUNDABOUT)
def test_ways_around_the_namespaces_are_closed(way):
    outside = (
        SYSCALLS + "assert call(248, b'user', b'selfplay-bait', b'hush', 4, -3) > 0\n" if "key" in way else ""
    ) + ROUNDABOUT[way]
    done = subprocess.run([sys.executable, "-c", outside], capture_output=True, text=True, check=False)
    assert run(ROUNDABOUT[way]) in ("AssertionError", "PermissionError", "OSError")
    if done.returncode:
        pytest.skip(f"this kernel has none of it: {done.stderr.strip().splitlines()[-1]}")


def test_an_interpreter_below_tmp_is_seen(tmp_path, monkeypatch):
    """A clone in the system's temporary directory: its .venv is bound below the sandbox's own /tmp."""
    (tmp_path / "lib").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "lib" / "below.py").write_text("value = 3")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "lib")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert str(tmp_path).startswith("/tmp/")
    writes = "try:\n    open(below.__file__, 'w')\nexcept OSError:\n    pass\nelse:\n    raise AssertionError"
    assert run(f"import below\nassert below.value == 3\nopen('notes', 'w').write('x')\n{writes}") == "passed"


CAPABLE = """
import ctypes
sets = (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) == 0
assert any(sets), "effective, permitted, inheritable"
"""
WRITABLE = (
    "import json, os\nassert not all(os.statvfs(path).f_flag & os.ST_RDONLY for path in ('/', '/usr', json.__file__))"
)
DESCRIPTORS = """
import os
descriptors = 0
for number in range(3, 64):
    try:
        os.fstat(number)
        descriptors += 1
    except OSError:
        pass
assert descriptors > 1, "beside the one it answers on"
"""


def test_no_second_way_out():
    for program in (
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",  # a user namespace: rights again
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
        "import os\nos.setuid(0)",
        "import os\nos.chroot('/tmp')",
        "import os\nos.chdir('../../../..')\n"
        "assert len(set(os.listdir()) - {'usr', 'bin', 'lib', 'lib64', 'etc', 'dev', 'tmp'}) > 5",
        DESCRIPTORS,
        CAPABLE,
        WRITABLE,
    ):
        assert run(program) in ("AssertionError", "PermissionError", "OSError"), program


DEAF = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 60))
os.setsid()
time.sleep(600)
"""
COUNTED_BOMB = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError:
    assert made < 10
"""
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
FULL_DISK = """
number = 0
while True:
    number += 1
    with open(str(number), "wb") as file:
        file.write(bytes(1 << 20))
"""


def test_an_endless_loop_a_fork_bomb_and_a_hog_end_and_leave_nothing():
    before, began = set(descendants()), time.monotonic()
    for endless in ("while True: pass", DEAF, BOMB, "import sys\nwhile True: sys.stdout.write('x' * 1000)"):
        assert run(endless, 1.0) == "timed out", endless
    assert run(COUNTED_BOMB) == "passed"
    assert run("x = bytearray(2 << 30)") == "MemoryError"
    assert run("with open('hog.bin', 'wb') as file:\n    while True: file.write(bytes(1 << 20))") == "OSError"
    assert run(FULL_DISK) == "OSError"
    assert time.monotonic() - began < 30
    end = time.monotonic() + 5
    while (left := set(descendants()) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


ENDS_EARLY = (
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "exit()",
    "import ctypes\nctypes.string_at(0)",
    "def f(:",
    "import os\nwhile True: os.write(3, b'+' * 99)",
)


@pytest.mark.parametrize("program", ENDS_EARLY)
def test_only_a_program_that_comes_to_its_end_has_passed(program):
    assert run(program) != "passed"


def test_an_honest_program_does_not_notice():
    assert run(HONEST) == "passed"
    assert run(HONEST, sandboxed=False) == "passed"
    assert run(HONEST.replace("[2, 3, 5", "[3, 5")) == "AssertionError"


ORDINARY = """
import json, os, socket, subprocess, sys, tempfile
from stages.evaluation.sandbox import check, run
check()
with (
    tempfile.TemporaryDirectory() as directory,
    subprocess.Popen(["sleep", "60"]) as victim,
    socket.create_server(("127.0.0.1", 0)) as server,
):
    with open(f"{directory}/diary.txt", "w") as file:
        file.write("hush")
    names = {"directory": directory, "port": server.getsockname()[1], "victim": victim.pid}
    results = {deed: run(program.format(**names)) for deed, program in json.load(sys.stdin).items()}
    assert victim.poll() is None and os.listdir(directory) == ["diary.txt"]
    victim.kill()
print(json.dumps(results))
"""


def test_an_ordinary_user_is_as_safe_as_root():
    """An ordinary user owns the files and processes that the program attacks. Root plays one, in a user namespace."""
    if os.geteuid():
        pytest.skip("the tests are run by an ordinary user already")
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") is None or subprocess.run([*user, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare(1) cannot make a user here")
    programs = DEEDS | {
        "capable": CAPABLE,
        "writable": WRITABLE,
        "honest": "import numpy\nassert numpy.prod([2, 3]) == 6",
    }
    done = subprocess.run(
        [*user, sys.executable, "-c", ORDINARY],
        cwd=ROOT,
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.pop("honest") == "passed"
    assert not {"passed", "timed out"} & set(results.values()), results


def test_without_a_sandbox_there_are_still_limits_and_no_secrets(bait):
    assert run("import os\nassert 'hush' in os.environ.values()", sandboxed=False) == "AssertionError"
    assert run("x = bytearray(2 << 30)", sandboxed=False) == "MemoryError"
    assert run("open('hog.bin', 'wb').write(bytes(2 << 20))", sandboxed=False) == "OSError"
    assert run("import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(600)", 1.0, sandboxed=False) == "timed out"


def test_the_program_dies_with_us(tmp_path):
    code = "from stages.evaluation.sandbox import run\nrun('import time\\ntime.sleep(600)', 600)"
    us = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    while len(tree := descendants(us.pid)) < 4:  # the supervisor, the set-up, the first process, the program
        time.sleep(0.02)
    us.send_signal(signal.SIGKILL)
    us.wait()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in tree) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in tree if os.path.exists(f"/proc/{pid}")]


def test_the_metric_that_humaneval_asks_for_is_ours_and_counts_as_the_paper_does():
    import evaluate

    add = "def add(a, b): return a + b"
    with code_run_by(CodeEval()):
        metric = evaluate.load("code_eval")
        rates, verdicts = metric.compute(
            references=["assert add(2, 3) == 5"] * 2,
            predictions=[[add, "def add(a, b): return a * b"], [add, add]],
            k=[1, 2, 5],
        )
    assert rates == {"pass@1": 0.75, "pass@2": 1.0}  # 1 - C(n - c, k) / C(n, k); no 5 of 2
    assert [verdict["passed"] for _, verdict in verdicts[0]] == [True, False] and verdicts[0][1][1][
        "result"
    ] == "AssertionError"


def test_a_machine_without_namespaces_is_refused_before_a_model_loads(monkeypatch):
    def refuse(*_):
        raise sandbox.NoSandbox("unshare (Operation not permitted)")

    settings = {"scorer": {"name": "length"}, "suites": [{"name": "tidpo", "only": ["humaneval"], "allow_code": True}]}
    config = parse(EvaluationConfig, settings, "x")
    check_sandbox(config)
    monkeypatch.setattr(sandbox, "run", refuse)
    with pytest.raises(
        ConfigError,
        match=r"on this machine: unshare \(Operation not permitted\)\. .* set evaluation.runtime.sandbox: false",
    ):
        check_sandbox(config)
    with pytest.raises(
        TransientError, match="could not be set up this time"
    ):  # in the middle of a run: not a wrong answer
        CodeEval().compute(["assert True"], [["x = 1"]], [1])
    only_numbers = parse(
        EvaluationConfig, {"scorer": {"name": "length"}, "suites": [{"name": "tidpo", "only": ["mmlu"]}]}, "x"
    )
    check_sandbox(only_numbers)


def test_whether_there_is_a_sandbox_is_no_part_of_the_key():
    settings = {"scorer": {"name": "length"}, "suites": [{"name": "tidpo", "only": ["humaneval"], "allow_code": True}]}
    config = parse(EvaluationConfig, settings, "x")
    bare = parse(EvaluationConfig, settings | {"runtime": {"sandbox": False}}, "x")
    assert config.identity() == bare.identity() and "sandbox" not in json.dumps(config.identity())


@pytest.mark.slow
def test_every_solution_of_humaneval_passes_in_the_sandbox_and_none_with_its_last_line_gone(shared):
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line in file]
    tests = [f"{task['test']}\ncheck({task['entry_point']})" for task in tasks]
    whole = [[task["prompt"] + task["canonical_solution"]] for task in tasks]
    cut = [[task["prompt"] + "    pass\n"] for task in tasks]
    assert CodeEval().compute(tests, whole, [1])[0] == {"pass@1": 1.0}
    assert CodeEval().compute(tests, cut, [1])[0] == {"pass@1": 0.0}
