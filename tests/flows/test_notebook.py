"""notebooks/quickstart.ipynb: it is kept without outputs, and its cells run from top to bottom as a user would run them.

Strategy: the code cells, joined, are one program for a fresh interpreter, in a directory that has the model under the
notebook's name. No Jupyter is needed for that: no cell uses its magic.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs_and_every_cell_is_python():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


@pytest.mark.slow
def test_the_cells_run_in_their_order(tmp_path, tiny_model):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m-instruct").symlink_to(tiny_model)
    program = "\n\n".join("".join(cell["source"]) for cell in code_cells())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SELFPLAY_"))}
    quiet = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=kept | quiet, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "deploy/runs/tiny/sppo.yaml" in done.stdout and "self-play run notebook" in done.stdout
    assert "before: " in done.stdout and "after: " in done.stdout
    assert done.stdout.rstrip().endswith("tensor([72.])")
