"""Stages - scorers by name: what says how good candidates are. Pairings by name are in pairing.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry

if TYPE_CHECKING:
    from stages.scoring.base import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorers",
    {
        "armorm": "stages.scoring.armorm:ArmoRM",
        "checks": "stages.scoring.verifiable:Checks",
        "combination": "stages.scoring.combination:Combination",
        "length": "stages.scoring.length:Length",
        "llm_judge": "stages.scoring.judge:LLMJudge",
        "pair_encoder": "stages.scoring.reward_model:PairEncoder",
        "pairrm": "stages.scoring.pairrm:PairRM",
        "reward_model": "stages.scoring.reward_model:RewardModel",
        "rouge_l": "stages.scoring.rouge:RougeL",
        "teacher_logp": "stages.scoring.teacher:TeacherLogp",
    },
)
