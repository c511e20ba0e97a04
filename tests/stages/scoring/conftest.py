"""What the tests of scorers share: rows, the tiny PairRM, and a scorer made as the stage makes it."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Services, open_scorer

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def candidates_of(prompt: str, completions: list[str], finished: bool = True, checks: str = "[]") -> Candidates:
    """Rows as the contracts say; token ids only count words."""
    rows = [
        {
            "prompt_id": prompt,
            "candidate": number,
            "prompt_ids": [1, 2],
            "token_ids": list(range(len(text.split()))),
            "finish_reason": "stop" if finished else "length",
            "completion": text,
        }
        for number, text in enumerate(completions)
    ]
    return Candidates(
        {"prompt_id": prompt, "messages": [{"role": "user", "content": prompt}], "checks": checks}, rows, None
    )


@pytest.fixture(scope="session")
def pairrm_tiny():
    """The module tests/assets/pairrm_tiny.py."""
    spec = importlib.util.spec_from_file_location("pairrm_tiny", ASSETS / "pairrm_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoints(pairrm_tiny, tmp_path_factory) -> dict[str, Path]:
    """backbone, ranker and hf of the tiny PairRM. Never write into them."""
    return pairrm_tiny.build(tmp_path_factory.mktemp("pairrm") / "tiny")


@pytest.fixture(scope="session")
def scoring(tmp_path_factory):
    """candidates(prompt, texts) and scorer(settings, batch_tokens, root): what the stage does around a scorer."""
    counter = itertools.count()

    def scorer(settings: dict, batch_tokens: int = 4096, root: Path | None = None):
        root = root or tmp_path_factory.mktemp("scorer") / str(next(counter))
        return open_scorer(SCORERS.config(settings), "cpu", Services(root, batch_tokens))

    return SimpleNamespace(candidates=candidates_of, scorer=scorer, assets=ASSETS)
