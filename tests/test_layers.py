"""Who may know whom: the import contracts of pyproject.toml, heavy engines in one file each, lean imports.

Strategy: import-linter decides on what the source says, at any depth; a fresh interpreter decides on what
really gets loaded.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_contracts", "stages", "tasks", "flows")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
BY_NAME = {"import_module", "LazyModule"}
"""Calls that import a module named in a string."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def modules_of(room: str) -> list[str]:
    """Every module of a room, without the ones that run when imported."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / room).rglob("*.py")))
    return [".".join(p.parts).removesuffix(".__init__") for p in paths if p.name != "__main__"]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(top-level package, inside a function?) of each import statement and each import by name in a file."""
    imports = []

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.Import):
            imports.extend((alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imports.append((node.module.split(".")[0], inside))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in BY_NAME and isinstance(node.args[0].value, str):
                imports.append((node.args[0].value.split(".")[0], inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return imports


def test_imports_go_downward_only():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


LOADED_BY_VLLM = "stages/sampling/vllm_mask.py"
"""A plug-in that vLLM's engine imports by name; no file of ours does."""


def test_what_the_engine_loads_by_name_is_imported_by_nothing_here():
    name = LOADED_BY_VLLM.removesuffix(".py").replace("/", ".")
    assert not [
        path for path in SOURCES if re.search(rf"^\s*(from|import) {re.escape(name)}\b", path.read_text(), re.M)
    ]


@pytest.mark.parametrize("engine", ["vllm", "deepspeed", "lm_eval"])
def test_a_heavy_engine_is_imported_in_one_file_and_at_use(engine):
    sources = [path for path in SOURCES if path.relative_to(ROOT).as_posix() != LOADED_BY_VLLM]
    homes = {path.relative_to(ROOT).as_posix() for path in sources if engine in dict(imports_of(path))}
    assert len(homes) == 1, f"{engine} must be imported in exactly one file, is in {sorted(homes)}"
    at_top = [path for path in sources if (engine, False) in imports_of(path)]
    assert not at_top, f"{engine} must be imported inside a function, is at the top of {at_top}"


def test_the_test_oracle_is_no_part_of_the_product():
    assert not [path for path in SOURCES if "llm_blender" in dict(imports_of(path))]


@pytest.mark.parametrize("room", ["data_contracts", "stages"])
def test_no_module_of_a_room_below_the_tasks_loads_prefect_or_mlflow(room):
    """All but what vLLM's engine loads: it imports vLLM, 8 s, and the import contracts forbid it the two as well."""
    modules = [name for name in modules_of(room) if name != LOADED_BY_VLLM.removesuffix(".py").replace("/", ".")]
    assert modules
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
    assert run(code + "print(sorted({'prefect', 'mlflow'} & sys.modules.keys()))") == "[]"


@pytest.mark.parametrize("module", ["flows.config", "flows.self_play", "stages.stage", "data_contracts"])
def test_describing_and_deploying_a_run_loads_no_model_library(module):
    heavy = {"torch", "transformers", "vllm", "deepspeed", "lm_eval", "datasets"}
    assert run(f"import sys, {module}\nprint(sorted({heavy} & sys.modules.keys()))") == "[]"


@pytest.mark.parametrize(
    "module",
    ["flows.self_play", "flows.cli.status", "flows.forecast.plan", "flows.forecast.estimate", "flows.comparison"],
)
def test_asking_about_a_run_imports_no_prefect_and_no_mlflow(module):
    assert run(f"import sys, {module}\nprint(sorted({{'prefect', 'mlflow'}} & sys.modules.keys()))") == "[]"


def test_there_is_no_package_under_tests():
    # With an __init__.py, tests/stages would shadow the package `stages`.
    assert not list((ROOT / "tests").rglob("__init__.py"))
