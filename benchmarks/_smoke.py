"""Shared by all benchmarks: the option `--smoke`, and the tiny inputs that it stands for.

A smoke run takes the benchmark's real code path with tiny sizes and a random model. It shows that the benchmark still
works; its figures mean nothing. tests/test_benchmarks.py runs them all.

Environment: SMOKE_STORE names a store that benchmarks of whole runs share, so that the tiny run is built once for all
of them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


def add_smoke(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark's parser the option `--smoke`."""
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and a random model; the figures mean nothing")


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, required: tuple[str, ...]
) -> argparse.Namespace:
    """The parsed options. Exits with a usage error if one of `required` is missing.

    `--smoke` provides them all, and a process that a benchmark starts for one of its sides (`--side`) reads them from a
    file.
    """
    options = parser.parse_args(arguments)
    missing = [f"--{name}" for name in required if getattr(options, name) is None]
    if missing and not options.smoke and not getattr(options, "side", None):
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return options


def tiny_model(directory: Path, seed: int = 0) -> str:
    """Write a random Llama of 0.1 M weights with its tokenizer into `directory`; returns its path.

    The seed alone decides the weights, so artifacts of one tiny model serve another in the same store.
    """
    from tests.conftest import build_model

    return str(build_model(directory, seed))


def write_stories(path: Path, count: int) -> str:
    """Write `count` stories of six sentences, one JSON string per line; returns the path."""
    animals, landmarks = ("fox", "dog", "hen", "cat", "frog"), ("pond", "barn", "hill", "road")
    lines = []
    for number in range(count):
        animal, landmark = animals[number % len(animals)], landmarks[number % len(landmarks)]
        sentences = [
            f"A {animal} lived by the {landmark}.",
            f"It had {number} friends.",
            "One day it rained.",
            f"The {animal} ran home.",
            "It was warm.",
            "They all slept.",
        ]
        lines.append(json.dumps(" ".join(sentences)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class Run(NamedTuple):
    config: str
    settings: list[str]
    """For `--set`."""
    store: Path


def tiny_run(directory: Path) -> Run:
    """The smallest whole run: one iteration on four prompts, answers from the canned sampler, a random model."""
    model = tiny_model(directory / "model")
    prompts = (ROOT / "deploy" / "prompts" / "quickstart_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    heldout = directory / "heldout.jsonl"
    heldout.write_text("\n".join(prompts[:4]) + "\n", encoding="utf-8")
    settings = [
        f"policy.path={model}",
        f"prompts.heldout={heldout}",
        "prompts.per_iteration=4",
        "iterations=1",
        "sampling.backend.name=canned",
        "sampling.max_new_tokens=8",
    ]
    store = Path(os.environ.get("SMOKE_STORE") or directory / "store")
    return Run("deploy/runs/tiny/sppo.yaml", settings, store)
