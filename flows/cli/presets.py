"""Flows - `selfplay presets`: the run configs that come with the pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_contracts.config import read_yaml
from data_contracts.installation import BROUGHT, ROOT
from data_contracts.words import plural
from flows.config import read_run

DIRECTORY = ROOT / BROUGHT / "runs"


def preset_paths() -> list[str]:
    """Return the paths of all presets and comparisons as commands take them, e.g. deploy/runs/tiny/sppo.yaml."""
    paths = sorted(DIRECTORY.rglob("*.yaml"), key=lambda path: (path.parent, path.name))
    return [path.relative_to(ROOT).as_posix() for path in paths if not _is_part(path)]


def list_presets() -> Iterator[str]:
    """Yield a line per preset: its path, and its method and start model, or the variants that it compares."""
    paths = preset_paths()
    width = max(map(len, paths))
    for path in paths:
        data = read_yaml(ROOT / path)
        if "variants" in data:
            words = f"compares {', '.join(map(str, data['variants']))}"
        else:
            words = _words(read_run(ROOT / path))
        yield f"{path:{width}}  {words}"


def _words(run: dict[str, Any]) -> str:
    """The method of a run, its iterations and its start model."""
    policy = run.get("policy", {})
    model = policy.get("path") or policy.get("hub_id")
    if model and os.path.isabs(model):
        model = os.path.relpath(model, ROOT)
    return f"{run['method']['name']}, {plural(run.get('iterations', 3), 'iteration')}, {model}"


def _is_part(path: Path) -> bool:
    """Whether a file is only extended by others: it has no method and extends nothing that may have one."""
    return not {"method", "extends", "variants"} & read_yaml(path).keys()
