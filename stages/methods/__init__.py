"""Stages - preference methods by name. One file each: settings, loss, in the order of the paper's equations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry

if TYPE_CHECKING:
    from stages.methods.base import Method

METHODS: Registry[Method] = Registry(
    "methods",
    {
        "cpo": "stages.methods.cpo:CPO",
        "d2po": "stages.methods.d2po:D2PO",
        "dpo": "stages.methods.dpo:DPO",
        "grpo": "stages.methods.grpo:GRPO",
        "inpo": "stages.methods.inpo:INPO",
        "ipo": "stages.methods.ipo:IPO",
        "kd": "stages.methods.kd:KD",
        "kto": "stages.methods.kto:KTO",
        "kto_pair": "stages.methods.kto_pair:KTOPair",
        "mnpo": "stages.methods.mnpo:MNPO",
        "opd": "stages.methods.opd:OPD",
        "orpo": "stages.methods.orpo:ORPO",
        "rdpo": "stages.methods.rdpo:RDPO",
        "rebel": "stages.methods.rebel:REBEL",
        "seqkd": "stages.methods.seqkd:SeqKD",
        "sft": "stages.methods.sft:SFT",
        "simpo": "stages.methods.simpo:SimPO",
        "spin": "stages.methods.spin:SPIN",
        "spin_lengthnorm": "stages.methods.spin_lengthnorm:SPINLengthNorm",
        "sppo": "stages.methods.sppo:SPPO",
        "swift": "stages.methods.swift:SWIFT",
        "swift_released": "stages.methods.swift_released:SWIFTReleased",
        "tdpo": "stages.methods.tdpo:TDPO",
        "tgdpo": "stages.methods.tgdpo:TGDPO",
        "tidpo": "stages.methods.tidpo:TIDPO",
        "tis_dpo": "stages.methods.tis_dpo:TISDPO",
        "tpo": "stages.methods.tpo:TPO",
        "uld": "stages.methods.uld:ULD",
    },
)
