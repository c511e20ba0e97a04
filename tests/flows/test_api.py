"""docs/api.md: every Python block runs, in order, and prints what the page says; the package re-exports and adds nothing.

Strategy: one process in a directory that has what the page names: a store with a finished run, a tiny model and a tiny
PairRM under the names of the page.
"""

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import selfplay

ROOT = Path(__file__).resolve().parents[2]
PRINT = re.compile(r"^print\(.*\)  # (.*)$", re.M)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def workplace(tmp_path, tiny_model, undisturbed) -> Path:
    spec = importlib.util.spec_from_file_location("pairrm_tiny", ROOT / "tests" / "assets" / "pairrm_tiny.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    (tmp_path / "models").mkdir()
    layouts = tiny.build(tmp_path / "pairrm")
    (tmp_path / "models" / "smollm2-135m-instruct").symlink_to(tiny_model)
    (tmp_path / "models" / "pairrm").symlink_to(layouts["hf"])
    (tmp_path / "store").symlink_to(undisturbed.store)
    return tmp_path


def test_the_examples_of_the_page_print_what_it_says(workplace):
    blocks = python_blocks("docs/api.md")
    assert len(blocks) >= 8
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [text for block in blocks for text in PRINT.findall(block)]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout
    for line, text in zip(lines, expected, strict=True):
        assert re.fullmatch(re.escape(text).replace(re.escape("..."), ".*"), line), (line, text)


def test_every_module_of_the_package_exports_what_it_says_and_defines_nothing():
    modules = [f"selfplay.{info.name}" for info in pkgutil.iter_modules(selfplay.__path__) if info.name != "__main__"]
    assert {"selfplay.methods", "selfplay.weights", "selfplay.scoring", "selfplay.store"} <= set(modules)
    for name in modules:
        module = importlib.import_module(name)
        assert module.__doc__ and all(hasattr(module, exported) for exported in module.__all__), name
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
        assert own == [], name
