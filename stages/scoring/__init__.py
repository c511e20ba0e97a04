"""Stages - scorers by name: what says how good a candidate is."""

from stages.registry import Registry

SCORERS = Registry(
    "scorers",
    {
        "armorm": "stages.scoring.armorm:ArmoRM",
        "checks": "stages.scoring.verifiable:Checks",
        "combination": "stages.scoring.combination:Combination",
        "length": "stages.scoring.length:Length",
        "llm_blender": "stages.scoring.llm_blender_oracle:LLMBlender",
        "llm_judge": "stages.scoring.judge:LLMJudge",
        "pair_encoder": "stages.scoring.reward_model:PairEncoder",
        "pairrm": "stages.scoring.pairrm:PairRM",
        "reward_model": "stages.scoring.reward_model:RewardModel",
        "teacher_logp": "stages.scoring.teacher:TeacherLogp",
    },
)
