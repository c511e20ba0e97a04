"""Stages - benchmark suites by name: which lm-eval tasks, with how many examples, and which number counts. Plain data.

No task data is in lm-eval's package: without a hub, `data_root` holds a mirror (see docs/evaluation.md).
"""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    task: str
    """lm-eval's name of a task or of a group."""
    num_fewshot: int | None
    """None: as the task says."""
    metrics: tuple[str, ...]
    """As lm-eval keys them: "acc_norm", or "exact_match,strict-match" where a filter is named."""
    unsafe: bool = False
    """Runs code that the model wrote."""
    packages: tuple[str, ...] = ()
    """Modules beyond lm-eval's own that the task imports."""


IFEVAL = ("langdetect", "immutabledict", "nltk")


SUITES: dict[str, tuple[Member, ...]] = {
    # The Open LLM Leaderboard of 2023. lm-eval's own group lists the tag `truthfulqa`, which also generates: mc2 is named instead.
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
            packages=(*IFEVAL, "pkg_resources"),
        ),
        Member("leaderboard_math_hard", None, ("exact_match",), packages=("math_verify", "sympy", "antlr4")),
        Member("leaderboard_mmlu_pro", None, ("acc",)),
        Member("leaderboard_musr", None, ("acc_norm",)),
    ),
    # TI-DPO's table. The paper names no shots: the usual ones.
    "tidpo": (
        Member("mmlu", 5, ("acc",)),
        Member("gsm8k", 5, ("exact_match,strict-match",)),
        Member("gpqa_main_zeroshot", 0, ("acc_norm",)),
        Member("humaneval", 0, ("pass@1",), unsafe=True),
        Member("truthfulqa_mc2", 0, ("acc",)),
        Member("ifeval", 0, ("prompt_level_strict_acc", "inst_level_strict_acc"), packages=IFEVAL),
    ),
}
