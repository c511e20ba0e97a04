"""Every shell line of README.md, CONTRIBUTING.md, docs and deploy/README.md is run in order, or skipped for a reason.

Strategy: a checkout made of links, in which deploy/runs/quickstart.yaml is the tests' tiny run and the store is a copy
of a finished one, so that what takes minutes is found built. The lines are typed into one shell per file. Lines that
need a GPU, a network, a cluster or minutes are in NOT_RUN with the reason and with what is checked instead: words,
flags and run configs must at least exist.
"""

import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from data_contracts.store import Store
from flows.comparison import load_comparison
from flows.config import load_run, parse_assignment
from stages.running.supervise import processes_with, signal_all, supervisor_options

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "deploy/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
PROGRAMS = (
    "make",
    "selfplay",
    "python",
    "prefect",
    "export",
    "set",
    "createdb",
    "docker",
    "kubectl",
    "cp",
    "srun",
    "pip",
    "ray",
)
"""First words of shell lines, after paths and assignments are taken off."""


class Line(NamedTuple):
    page: str
    number: int
    """Counted from 1."""
    text: str
    """Without its comment."""

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {self.text}"


def program_of(text: str) -> str:
    """The program that a shell line starts: make, selfplay, python, prefect, ..."""
    words = [word for word in text.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return words[0].rpartition("/")[2].rstrip(";") if words else ""


def shell_lines(page: str) -> list[Line]:
    """The shell lines in a page's indented and fenced blocks."""
    lines: list[Line] = []
    fenced, continued = False, False
    for number, text in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("```"):
            fenced = not fenced
        if not fenced and not text.startswith("    "):
            continue
        code = re.sub(r"(^|\s{2,})# .*", "", text).strip()
        if continued:
            lines[-1] = lines[-1]._replace(text=f"{lines[-1].text} {code}".strip())
        elif program_of(code) in PROGRAMS and not code.startswith(("set:", "python:")):
            lines.append(Line(page, number, code))
        else:
            continue
        quotes_open = lines[-1].text.count("'") % 2 == 1
        continued = lines[-1].text.endswith("\\") or quotes_open
        if continued:
            lines[-1] = lines[-1]._replace(text=lines[-1].text.removesuffix("\\").strip())
    return lines


NOT_RUN = {
    r"make ": "minutes, or the network; `make -n` finds the target and its recipe",
    r"selfplay run ": "minutes; the run config must load with these settings",
    r"selfplay compare ": "minutes; the comparison must load",
    r"selfplay estimate RUN.yaml": "a synopsis",
    r"selfplay (data|init) .*my_prompts": "a file of the reader's; tests/flows/cli/test_data.py and tests/flows/test_own_data.py have theirs",
    r"selfplay report --compare RUN": "needs a second run; tests/flows/cli/test_cli.py lays two over each other",
    r"pip install \.": "an index, or an environment to change; tests/test_installed.py installs the wheel into one of its own",
    r"selfplay replay-batch ": "needs a training that went wrong; tests/stages/training/test_replay.py has one",
    r"selfplay chat ": "waits for prompts; tests/flows/cli/test_chat.py types some",
    r"selfplay export .*--hub ": "needs an account of the hub; tests/flows/cli/test_export.py pushes to a stand-in",
    r"python -m benchmarks\.": "minutes, and models; tests/test_benchmarks.py runs each with --smoke",
    r"python -m pytest -m gpu": "needs a GPU",
    r"prefect deployment run self-play/sppo ": "needs a GPU; the deployment must exist",
    r"(createdb|docker|kubectl) ": "needs a database server, an image registry or a cluster",
    r"export PREFECT_.*(PASSWORD|SERVICE|LEASE)": "settings of a cluster's server",
    r"prefect .*(--host SERVICE|--pool selfplay-work|process; prefect|selfplay-kubernetes|kubernetes/prefect.yaml)": "needs a cluster",
    r"SELFPLAY_HOME=/(shared|app)\S* .*prefect ": "needs a cluster",
    r"prefect (worker start --pool selfplay|deployment run self-play/sppo-mistral-7b.*)$": "needs a cluster",
}
"""Pattern of a line -> why it is not run."""


def reason_against(line: Line) -> str | None:
    """Why a line is not run; None: it is."""
    text = re.sub(r"\S*\.venv/bin/", "", line.text)
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, text)), None)


# --- a checkout to type in


class Checkout:
    """A directory that looks like a checkout, with a shell in it."""

    def __init__(self, directory: Path, environment: dict[str, str]):
        self.directory = directory
        self.mark = f"DOCUMENTED={uuid.uuid4().hex}"
        programs = directory / ".venv" / "bin"
        environment = environment | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DOCUMENTED": self.mark.partition("=")[2],
        }
        command = [sys.executable, "-m", "stages.running.supervise", *supervisor_options(5), "bash"]
        self.log = directory / "shell.log"
        with open(self.log, "wb") as log:
            self.shell = subprocess.Popen(
                command, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )

    def type(self, text: str, timeout: float = 300) -> tuple[int, str]:
        """Run a line; returns its exit code and output."""
        end = f"--- {uuid.uuid4().hex}"
        start = self.log.stat().st_size
        self.write(f'{text}\necho "{end} $?"\n')
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            output = self.log.read_bytes()[start:].decode(errors="replace")
            if match := re.search(rf"{end} (\d+)", output):
                return int(match[1]), output[: match.start()]
            assert self.shell.poll() is None, f"the shell ended at {text!r}:\n{output}"
            time.sleep(0.1)
        raise AssertionError(f"{text!r} took longer than {timeout} s:\n{self.log.read_text()[-3000:]}")

    def write(self, text: str) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.write(text)
        self.shell.stdin.flush()

    def close(self) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.close()
        self.shell.terminate()
        self.shell.wait(30)
        signal_all(processes_with(self.mark), 9)


@pytest.fixture(scope="module")
def template(tmp_path_factory, undisturbed, tools) -> Path:
    """A checkout of links. Its quickstart is the tiny run, finished."""
    directory = tmp_path_factory.mktemp("documented")
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "deploy", "store", "models"):
            (directory / path.name).symlink_to(path)
    shutil.copytree(ROOT / "deploy", directory / "deploy", symlinks=True)
    run = yaml.safe_load(undisturbed.config.read_text()) | {"name": "quickstart"}
    (directory / "deploy" / "runs" / "quickstart.yaml").write_text(yaml.safe_dump(run))
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "selfplay": "-m flows", "prefect": "-m prefect"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    shutil.copytree(undisturbed.store, directory / "store", symlinks=True)
    done = tools.play(directory / "deploy" / "runs" / "quickstart.yaml", directory / "store")
    assert done.code == 0, done.out
    return directory


@pytest.fixture
def checkout(template, tools) -> Iterator[Checkout]:
    opened = Checkout(template, tools.environment())
    yield opened
    opened.close()


PAGES_WITH_SERVER = ("README.md", "deploy/README.md")


def needs_server(line: Line) -> bool:
    return program_of(line.text) in ("prefect", "export", "set")


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_of_a_page_work_in_their_order(page, checkout):
    """KEY and RUN stand for an artifact and a run. `doctor` and `plan` judge the machine: they may say no."""
    key = next(Store(checkout.directory / "store").records("checkpoint")).key
    for line in shell_lines(page):
        if reason_against(line) or (needs_server(line) and page in PAGES_WITH_SERVER):
            continue
        text = re.sub(r"\bKEY\b", key, re.sub(r"\bRUN\b", "quickstart", line.text))
        code, output = checkout.type(text)
        answers = {"doctor": (0, 1), "plan": (0, 2)}
        expected = next((codes for name, codes in answers.items() if f"selfplay {name}" in text), (0,))
        assert code in expected, f"{line}\nended with {code}:\n{output[-3000:]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [PAGES_WITH_SERVER[0], *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES_WITH_SERVER[1:])]
)
def test_the_lines_of_a_page_with_a_server_work_in_their_order(page, checkout):
    """A server and a worker keep running, as in terminals of their own. Port 4200 may be taken: another is written."""
    port = free_port()
    settings = checkout.directory / "deploy" / "env.example"
    settings.write_text(re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", settings.read_text()))
    for variable, value in {
        "PREFECT_HOME": checkout.directory / "prefect-home",
        "PREFECT_SERVER_API_PORT": port,
    }.items():
        checkout.type(f"export {variable}={value}")
    for line in shell_lines(page):
        if not needs_server(line):
            continue
        if re.search(r"prefect (server|worker) start", line.text):
            checkout.write(f"{line.text} &\n")
            if "server" in line.text:
                wait_for_server(port, checkout)
            continue
        text = line.text
        if reason := reason_against(line):
            assert "the deployment must exist" in reason
            text = "prefect deployment inspect " + text.split()[3]
        code, output = checkout.type(text)
        assert code == 0, f"{line}\nended with {code}:\n{output[-3000:]}\n{checkout.log.read_text()[-3000:]}"
    names = set(re.findall(r"^  - name: (\S+)", (ROOT / "prefect.yaml").read_text(), re.MULTILINE))
    code, listing = checkout.type("COLUMNS=300 prefect deployment ls")
    assert code == 0 and {name for name in names if f"/{name} " not in listing} == set(), listing


def free_port() -> int:
    """A port below those that the kernel hands to clients: some seconds pass until the server takes it."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for_server(port: int, checkout: Checkout) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no server on port {port}:\n{checkout.log.read_text()[-3000:]}")


# --- lines that are not run


SKIPPED = [line for page in PAGES for line in shell_lines(page) if reason_against(line)]


def flags_of(words: list[str]) -> set[str]:
    return {word.strip("[]").partition("=")[0] for word in words if re.match(r"\[?--[a-z]", word)}


def help_of(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", *words, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("line", [line for line in SKIPPED if program_of(line.text) == "make"], ids=str)
def test_the_targets_of_make_exist(line):
    words = shlex.split(line.text.partition("&&")[0])
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    for path in re.findall(r"deploy/runs/\S+\.yaml", done.stdout):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("line", [line for line in SKIPPED if program_of(line.text) == "selfplay"], ids=str)
def test_a_line_of_selfplay_that_is_not_run_can_be_read(line):
    words = shlex.split(line.text)
    text = help_of("flows", words[1])
    assert flags_of(words) - set(re.findall(r"--[a-z-]+", text)) == set(), text
    if not words[2].startswith("deploy/runs/"):
        return
    settings = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
    load = load_comparison if words[1] == "compare" else load_run
    load(words[2], dict(parse_assignment(text) for text in settings))


@pytest.mark.parametrize("line", [line for line in SKIPPED if "-m benchmarks." in line.text], ids=str)
def test_the_options_of_a_benchmark_exist(line):
    words = shlex.split(line.text)
    text = help_of(words[2])
    assert flags_of(words) - set(re.findall(r"--[a-z-]+", text)) == set(), text


def test_every_reason_against_a_line_is_needed():
    """A pattern that no line has is a leftover."""
    lines = [re.sub(r"\S*\.venv/bin/", "", line.text) for line in SKIPPED]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []


def test_the_parser_sees_shell_lines_and_nothing_else():
    found = {(line.page, program_of(line.text)) for page in PAGES for line in shell_lines(page)}
    assert {
        ("README.md", "make"),
        ("README.md", "selfplay"),
        ("deploy/README.md", "set"),
        ("docs/cluster.md", "kubectl"),
    } <= found
    assert not [page for page, _ in found if page == "docs/evaluation.md"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_inside_sentences_exist(page):
    """`make T`, `selfplay C`, `python -m M` and paths of the checkout, between backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"^ {1,4}([a-z-]+) {2}", help_of("flows"), re.MULTILINE))
    for command in re.findall(r"`([^`\n]+)`", text):
        words = re.sub(r"\S*\.venv/bin/", "", command).split()
        if len(words) > 1 and words[0] == "make" and "=" not in words[1]:
            assert words[1] in targets, command
        if len(words) > 1 and words[0] == "selfplay" and not words[1].startswith("-"):
            assert words[1] in commands, command
        if words[:2] == ["python", "-m"] and (ROOT / words[2].partition(".")[0]).is_dir():
            path = ROOT / words[2].replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), command
