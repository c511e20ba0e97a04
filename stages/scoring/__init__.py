"""Stages - scorers by name: what says how good a candidate is."""

from stages.registry import Registry

SCORERS = Registry(
    "scorers",
    {
        "checks": "stages.scoring.verifiable:Checks",
        "length": "stages.scoring.length:Length",
        "pairrm": "stages.scoring.pairrm:PairRM",
    },
)
