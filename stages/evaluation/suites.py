"""Stages - benchmark suites by name: their lm-eval tasks, examples per question and the metrics that count. Plain data.

No task data is in lm-eval's package: without a hub, `data_root` holds a mirror (see docs/evaluation.md).
"""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """One task of a suite."""

    task: str
    """lm-eval's name of a task or of a group."""
    num_fewshot: int | None
    """Solved examples before each question. None: as the task's own file sets it."""
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
        Member("arc_challenge", 25, ("acc_norm",)),
        Member("hellaswag", 10, ("acc_norm",)),
        Member("truthfulqa_mc2", 0, ("acc",)),
        Member("winogrande", 5, ("acc",)),
        Member("gsm8k", 5, ("exact_match,strict-match",)),
        Member("mmlu", 5, ("acc",)),
    ),
    "open_llm_v2": (
        Member("leaderboard_bbh", None, ("acc_norm",)),
        Member("leaderboard_gpqa", None, ("acc_norm",)),
        Member(
            "leaderboard_ifeval",
            None,
            ("inst_level_strict_acc", "prompt_level_strict_acc"),
            packages=(*IFEVAL_PACKAGES, "pkg_resources"),
        ),
        Member("leaderboard_math_hard", None, ("exact_match",), packages=("math_verify", "sympy", "antlr4")),
        Member("leaderboard_mmlu_pro", None, ("acc",)),
        Member("leaderboard_musr", None, ("acc_norm",)),
    ),
    # TI-DPO's table of results. The paper does not say how many examples: these are the usual numbers.
    "tidpo": (
        Member("mmlu", 5, ("acc",)),
        Member("gsm8k", 5, ("exact_match,strict-match",)),
        Member("gpqa_main_zeroshot", 0, ("acc_norm",)),
        Member("humaneval", 0, ("pass@1",), unsafe=True),
        Member("truthfulqa_mc2", 0, ("acc",)),
        Member("ifeval", 0, ("prompt_level_strict_acc", "inst_level_strict_acc"), packages=IFEVAL_PACKAGES),
    ),
}
