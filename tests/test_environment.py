"""The environment is what the locks say, the declared ranges agree with them, and the set-up is robust.

Strategy: the set-up scripts are plain files outside the packages, so they are loaded by path and their
decisions tested one by one on small directories; the installation itself is what every test stands on.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "deploy" / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODEL = ROOT / "models" / "smollm2-135m-instruct"


def load(name: str, monkeypatch: pytest.MonkeyPatch):
    """A script of deploy/setup as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "setup"))
    spec = importlib.util.spec_from_file_location(f"_setup_{name}", ROOT / "deploy" / "setup" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_venv(monkeypatch, tmp_path):
    """setup_venv with its .venv moved to an empty directory."""
    module = load("setup_venv", monkeypatch)
    venv = tmp_path / ".venv"
    for name in ("PYTHON", "WRITING", "DONE", "LOG"):
        monkeypatch.setattr(module, name, venv / getattr(module, name).relative_to(module.VENV))
    monkeypatch.setattr(module, "VENV", venv)
    return module


def pins(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (LOCKS / f"{name}.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# --- what is installed, and what is declared


def test_every_pin_of_the_lock_is_installed_at_its_version():
    which = "gpu" if _has("vllm") else "cpu"
    wrong = {n: v for n, v in pins(which, "dev").items() if not _has(n, v) and not _has(n, v.removesuffix("+cpu"))}
    assert not wrong, f"run `make venv`; these differ from the lock: {wrong}"


def _has(name: str, version: str | None = None) -> bool:
    try:
        return importlib.metadata.version(name) == (version or importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("lock", ["cpu", "gpu", "dev"])
def test_a_lock_is_sorted_pins_and_nothing_else(lock):
    lines = [line for line in (LOCKS / f"{lock}.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.+]*", line) for line in lines)
    assert lines == sorted(lines) and len(pins(lock)) == len(lines)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_lock_satisfies_what_pyproject_declares(extra):
    project, locked = PROJECT["project"], pins(extra, "dev")
    declared = [project["dependencies"], *(project["optional-dependencies"][name] for name in (extra, "dev"))]
    for requirement in map(Requirement, itertools.chain(*declared)):
        version = locked[requirement.name].removesuffix("+cpu")
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_a_cpu_environment_has_no_cuda_build():
    unwanted = {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"}
    assert not unwanted & pins("cpu").keys() and not any(name.startswith("nvidia-") for name in pins("cpu"))


def test_every_module_is_in_a_package_that_would_be_shipped():
    """As setup.py looks for them; tests/test_installed.py looks into the wheel."""
    rooms = ("data_contracts", "stages", "tasks", "flows")
    shipped = set(find_packages(str(ROOT), include=[f"{room}*" for room in rooms]))
    wanted = {".".join(path.parent.relative_to(ROOT).parts) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert set(rooms) <= wanted <= shipped


# --- the set-up


def test_a_finished_set_up_is_recognised_until_its_recipe_changes(setup_venv, monkeypatch, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    setup_venv.PYTHON.touch()
    assert not setup_venv.is_done("abc")
    setup_venv.DONE.write_text("abc cpu\n")
    assert setup_venv.is_done("abc") and not setup_venv.is_done("other")
    setup_venv.WRITING.touch()  # killed while it brought a later lock in
    assert not setup_venv.is_done("abc")


def test_the_recipe_covers_the_lock_and_the_place(setup_venv, monkeypatch, tmp_path):
    first = setup_venv.recipe_digest("cpu")
    assert first == setup_venv.recipe_digest("cpu") != setup_venv.recipe_digest("gpu")
    monkeypatch.setattr(setup_venv, "VENV", tmp_path / "elsewhere" / ".venv")
    assert setup_venv.recipe_digest("cpu") != first


def test_only_pins_that_differ_are_installed(setup_venv, tmp_path):
    wanted = {"absl-py": "2.5.1", "torch": "2.13.0+cpu", "numpy": "2.3.5"}
    assert setup_venv.differing(wanted) == wanted
    for name, version in {"absl_py": "2.5.1", "torch": "2.13.0", "numpy": "2.3.4"}.items():
        info = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert setup_venv.differing(wanted) == {"numpy": "2.3.5"}


def test_what_pip_leaves_uncompiled_is_compiled_for_the_interpreter_of_the_environment(setup_venv, tmp_path):
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "tests").mkdir(parents=True)
    setup_venv.PYTHON.parent.mkdir()
    setup_venv.PYTHON.symlink_to(sys.executable)
    (packages / "module.py").write_text("x = 1\n")
    (packages / "tests" / "broken.py").write_text("print 'as Python 2 had it'\n")
    setup_venv.byte_compile()
    assert [path.name.split(".")[0] for path in packages.rglob("*.pyc")] == ["module"]


def test_a_stopped_set_up_leaves_no_compiler_at_work(tmp_path):
    """compileall's workers do not end with it: they went on for minutes, as orphans."""
    worker = tmp_path / "worker"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {worker}.new; mv {worker}.new {worker}; wait\n")
    python.chmod(0o755)
    (tmp_path / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    code = (
        "import setup_venv as s, pathlib, signal; signal.signal(signal.SIGTERM, s.stop);"
        f"s.VENV = pathlib.Path({str(tmp_path)!r}); s.PYTHON, s.LOG = s.VENV / 'python', s.VENV / 'log'; s.byte_compile()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "deploy" / "setup")}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as process:
        while not worker.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert "run make again" in process.communicate(timeout=30)[1]
    assert not psutil.pid_exists(pid := int(worker.read_text())) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_python_that_is_there_but_does_not_run_is_passed_over(tmp_path):
    shims, real = tmp_path / "shims", tmp_path / "real"
    for folder in (shims, real):
        folder.mkdir()
    (shims / "python3").write_text("#!/bin/sh\necho 'command not found' >&2; exit 127\n")
    (shims / "python3").chmod(0o755)
    (real / "python3.11").symlink_to(sys.executable)
    env = {"PATH": f"{shims}:{real}:/usr/bin:/bin", "HOME": str(tmp_path)}
    find = ["/bin/sh", str(ROOT / "deploy" / "setup" / "find_python.sh")]
    assert subprocess.run(find, env=env, capture_output=True, text=True).stdout.strip() == "python3.11"
    refused = subprocess.run(find, env=env | {"PYTHON": str(shims / "python3")}, capture_output=True, text=True)
    assert refused.returncode == 1 and "does not run as Python 3.11 or 3.12" in refused.stderr


def test_a_missing_libnuma_is_taken_from_the_distribution_or_its_command_is_named(monkeypatch, tmp_path):
    libnuma = load("libnuma", monkeypatch)

    def apt(command, cwd, **_):
        if command[0] == "apt-get":
            (Path(cwd) / "libnuma1_2_amd64.deb").touch()
        else:
            (Path(cwd) / "usr").mkdir()
            (Path(cwd) / "usr" / "libnuma.so.1.0.0").write_bytes(b"library")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(libnuma.subprocess, "run", apt)
    libnuma.fetch(tmp_path / "libnuma.so.1")
    assert (tmp_path / "libnuma.so.1").read_bytes() == b"library"

    monkeypatch.setattr(libnuma.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=100))
    with pytest.raises(SystemExit, match="apt-get install libnuma1"):
        libnuma.fetch(tmp_path / "libnuma.so.1")


# --- the audit


@pytest.fixture
def audit(monkeypatch, tmp_path):
    """audit(answer, code) -> exit code of the audit when pip-audit prints that answer, with the real way of calling it; two locks."""
    module = load("audit", monkeypatch)
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "cpu.txt").write_text("# pins\ntorch==2.13.0+cpu\nrequests==2.0\n")
    (locks / "gpu.txt").write_text("torch==2.13.0\nrequests==2.1\n")
    monkeypatch.setattr(module, "LOCKS", locks)
    monkeypatch.setattr(module, "provide", lambda deadline: Path(sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def play(answer: str, code: int) -> int:
        (tmp_path / "pip_audit.py").write_text(
            f"import sys\nasked = open(sys.argv[-1]).read().splitlines()\n{answer}\nsys.exit({code})"
        )
        return module.main()

    play.module = module
    return play


def test_the_audit_names_what_is_known_what_mends_it_and_what_nobody_knows(audit, capsys):
    hole = {"id": "PYSEC-1", "aliases": ["CVE-2"], "fix_versions": ["2.2", "3.0"]}
    known = {"requests==2.0": [hole, hole | {"id": "GHSA-3", "aliases": [], "fix_versions": []}], "requests==2.1": []}
    answer = f"""import json
known = {known!r}
def told(line):
    name, version = line.split("==")
    return {{"name": name, "version": version, "vulns": known[line]}} if line in known else {{"name": name, "skip_reason": "not found"}}
print(json.dumps({{"dependencies": [told(line) for line in asked]}}))"""
    assert audit(answer, 1) == 1
    assert capsys.readouterr().out.splitlines() == [
        "audit: 3 pinned versions, 2 known vulnerabilities; nothing is known of 1",
        "  requests 2.0: PYSEC-1 CVE-2, fixed in 2.2, 3.0",
        "  requests 2.0: GHSA-3, no version mends it",
    ]
    assert audit(answer.replace("PYSEC", "").replace("known[line]", "[]"), 0) == 0
    assert capsys.readouterr().out == "audit: 3 pinned versions, 0 known vulnerabilities; nothing is known of 1\n"


def test_an_audit_that_nobody_answers_says_so_in_a_line_and_is_bounded(audit, capsys, monkeypatch):
    skipped = {"dependencies": [{"name": "torch", "skip_reason": "Dependency not found on PyPI"}]}
    assert audit(f"print({json.dumps(skipped)!r})", 0) == 75
    assert audit("print('ERROR: connection refused', file=sys.stderr)", 1) == 75
    assert audit("print('not JSON')", 0) == 75
    monkeypatch.setattr(audit.module, "SECONDS", 1.0)
    assert audit("__import__('time').sleep(60)", 0) == 75
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("audit: not done: ") for line in lines)
    assert (
        "of none of 2 pinned versions" in lines[0]
        and "connection refused" in lines[1]
        and "no answer within 1 s" in lines[3]
    )


# --- the model


def test_a_model_directory_is_intact_only_as_it_was_made(monkeypatch, tmp_path):
    get = load("get_smollm2", monkeypatch)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not get.is_intact(tmp_path)
    digest = get.sha256(tmp_path / "model.safetensors")
    (tmp_path / get.RECORD).write_text(
        f'{{"gguf_sha256": "{get.GGUF_SHA256}", "files": {{"model.safetensors": "{digest}"}}}}'
    )
    assert get.is_intact(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weight")
    assert not get.is_intact(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert not get.is_intact(tmp_path)


@pytest.mark.slow
def test_the_converted_model_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not MODEL.is_dir():
        pytest.fail("no model: run `make model`")
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
