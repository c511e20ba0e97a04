"""The undisturbed builds that every fault is compared with, made once."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tasks.data.prompt_set import PromptSet
from tasks.prompts import publish
from tests.faults.harness import Scene, prepare


@pytest.fixture(scope="session")
def scenes(made_once, make_model, make_rows) -> dict[str, Scene]:
    prompts = PromptSet.of(make_rows(6))

    def make(directory: Path) -> dict[str, Scene]:
        return prepare(directory / "root", make_model, lambda store: publish(prompts, store))

    return made_once("scenes", make)


@pytest.fixture
def small_disk():
    """small_disk(kilobytes) -> a directory that is a filesystem of its own; small_disk.remount("ro") and so on. Needs the right to mount."""
    made: list[Path] = []

    def mount(options: str, place: Path) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            place.rmdir()
            pytest.skip(f"a filesystem cannot be mounted here: {done.stderr.strip()}")
        made.append(place)

    class Disk:
        def __call__(self, kilobytes: int) -> Path:
            if os.geteuid() != 0:
                pytest.skip("a filesystem of one's own needs root")
            place = Path(tempfile.mkdtemp(prefix="small-disk-"))
            mount(f"size={kilobytes}k", place)
            return place

        def remount(self, options: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{options}", str(made[-1])], check=True)

    yield Disk()
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
