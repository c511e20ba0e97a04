"""Stages - benchmark suites by name: their lm-eval tasks, examples per question and the metrics that count. Plain data.

No task data is in lm-eval's package: without a hub, `data_root` holds a mirror (see docs/evaluation.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_contracts.errors import ConfigError


class Member(NamedTuple):
    """One task of a suite."""

    task: str
    """lm-eval's name of a task or of a group."""
    num_fewshot: int | None
    """Solved examples before each question. None: as the task's own file sets it."""
    data: str
    """The data set on the hub that its questions are read from."""
    metrics: tuple[str, ...]
    """As lm-eval keys them: "acc_norm", or "exact_match,strict-match" where a filter is named."""
    unsafe: bool = False
    """Runs code that the model wrote."""
    packages: tuple[str, ...] = ()
    """Modules beyond lm-eval's own that the task imports."""


IFEVAL_PACKAGES = ("langdetect", "immutabledict", "nltk")

SUITES: dict[str, tuple[Member, ...]] = {
    # The Open LLM Leaderboard of 2023. lm-eval's own group lists the tag `truthfulqa`, which also generates text: the
    # leaderboard counted mc2 alone, so mc2 is named here.
    "open_llm_v1": (
        Member("arc_challenge", 25, "allenai/ai2_arc", ("acc_norm",)),
        Member("hellaswag", 10, "Rowan/hellaswag", ("acc_norm",)),
        Member("truthfulqa_mc2", 0, "truthfulqa/truthful_qa", ("acc",)),
        Member("winogrande", 5, "allenai/winogrande", ("acc",)),
        Member("gsm8k", 5, "openai/gsm8k", ("exact_match,strict-match",)),
        Member("mmlu", 5, "cais/mmlu", ("acc",)),
    ),
    "open_llm_v2": (
        Member("leaderboard_bbh", None, "SaylorTwift/bbh", ("acc_norm",)),
        Member("leaderboard_gpqa", None, "Idavidrein/gpqa", ("acc_norm",)),
        Member(
            "leaderboard_ifeval",
            None,
            "wis-k/instruction-following-eval",
            ("inst_level_strict_acc", "prompt_level_strict_acc"),
            packages=(*IFEVAL_PACKAGES, "pkg_resources"),
        ),
        Member(
            "leaderboard_math_hard",
            None,
            "DigitalLearningGmbH/MATH-lighteval",
            ("exact_match",),
            packages=("math_verify", "sympy", "antlr4"),
        ),
        Member("leaderboard_mmlu_pro", None, "TIGER-Lab/MMLU-Pro", ("acc",)),
        Member("leaderboard_musr", None, "TAUR-Lab/MuSR", ("acc_norm",)),
    ),
    # TI-DPO's table of results. The paper does not say how many examples: these are the usual numbers.
    "tidpo": (
        Member("mmlu", 5, "cais/mmlu", ("acc",)),
        Member("gsm8k", 5, "openai/gsm8k", ("exact_match,strict-match",)),
        Member("gpqa_main_zeroshot", 0, "Idavidrein/gpqa", ("acc_norm",)),
        Member("humaneval", 0, "openai/openai_humaneval", ("pass@1",), unsafe=True),
        Member("truthfulqa_mc2", 0, "truthfulqa/truthful_qa", ("acc",)),
        Member(
            "ifeval", 0, "google/IFEval", ("prompt_level_strict_acc", "inst_level_strict_acc"), packages=IFEVAL_PACKAGES
        ),
    ),
}


WITHOUT_TEMPLATE = ("open_llm_v1",)
"""Suites whose published numbers are made without the model's chat template."""


def clones_of(data_root: Path, data: str) -> tuple[Path, Path]:
    """Return where a mirror may hold a data set of the hub: under owner and name, or under the name alone."""
    return data_root / data, data_root / data.rpartition("/")[2]


def check_data(suite: str, members: Sequence[Member], data_root: str | None, env: Mapping[str, str]) -> None:
    """Refuse members whose questions are not on this disk and cannot be fetched.

    env: environment of the stage. Raises: ConfigError naming the data sets.
    """
    if data_root is not None:
        missing = [member for member in members if not any(map(Path.is_dir, clones_of(Path(data_root), member.data)))]
        remedy = f"clone them there, as {data_root}/OWNER/NAME, or leave their tasks out by `only`"
    elif env.get("HF_HUB_OFFLINE", "1").lower() in ("0", "false", "no", "off"):
        return
    else:
        cached = _cached_data(env)
        missing = [member for member in members if _letters(member.data) not in cached]
        remedy = "set data_root to a directory of clones, or HF_HUB_OFFLINE to 0 in evaluation.runtime.env"
    if missing:
        names = ", ".join(f"{member.data} ({member.task})" for member in missing)
        raise ConfigError(f"the suite {suite} reads data sets that are not here: {names}; {remedy}")


def _cached_data(env: Mapping[str, str]) -> set[str]:
    """Return the names of data sets in the hub's local caches, their letters and digits only."""
    home = Path(env.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    caches = (env.get("HF_HUB_CACHE") or home / "hub", env.get("HF_DATASETS_CACHE") or home / "datasets")
    names = {path.name for cache in caches for path in Path(cache).glob("*")}
    return {_letters(name.removeprefix("datasets--")) for name in names}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
