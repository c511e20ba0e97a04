"""Stages - per-token weight providers by name. One file each: settings, and a function over a batch of responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry

if TYPE_CHECKING:
    from stages.weighting.weights.base import WeightProvider

WEIGHTS: Registry[WeightProvider] = Registry(
    "weights",
    {
        "contrastive": "stages.weighting.weights.tis_dpo:ContrastiveWeights",
        "equal": "stages.weighting.weights.ablations:EqualWeights",
        "iw_opd": "stages.weighting.weights.iw_opd:IWOPDWeights",
        "noise": "stages.weighting.weights.ablations:NoiseWeights",
        "ones": "stages.weighting.weights.ablations:Ones",
        "opd": "stages.weighting.weights.opd:OPDWeights",
        "random": "stages.weighting.weights.ablations:RandomWeights",
        "reverse": "stages.weighting.weights.ablations:ReverseWeights",
        "swift": "stages.weighting.weights.swift:SwiftWeights",
        "swift_released": "stages.weighting.weights.swift_released:SwiftReleasedWeights",
        "tgdpo": "stages.weighting.weights.tgdpo:TGDPOWeights",
        "tidpo": "stages.weighting.weights.tidpo:TIDPOWeights",
        "tidpo_v3": "stages.weighting.weights.tidpo_v3:TIDPOv3Weights",
        "tis_dpo": "stages.weighting.weights.tis_dpo:TISWeights",
    },
)
