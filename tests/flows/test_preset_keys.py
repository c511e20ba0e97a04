"""Artifact keys of the presets: what a key is made of may only change together with a VERSION, or every finished artifact is lost.

Strategy: the keys that each preset's settings gave on 2026-11-27 (train: 2026-11-28, the rule of the warm-up), with inputs of made-up content, so that no model is read.
`python tests/flows/test_preset_keys.py` prints the table again.
"""

import json
from pathlib import Path

import pytest

from data_contracts.artifact import ArtifactRef
from flows.config import load_run
from stages.stage import EARLIER, STAGES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("preset_keys.json")
PRESETS = (
    "quickstart", "sppo", "spin", "swift", "swift-qwen1.5-1.8b-2x24", "tdpo", "tidpo", "tis_dpo_d", "tgdpo", "swift-kd-gpt2-1.5b",
    "tiny/sppo", "tiny/swift", "inpo", "comal", "mnpo", "opd", "iw_opd", "gkd", "tidpo_v3",
    "spin_code", "swift_released", "sppo-mistral-7b",
)  # fmt: skip


def keys(preset: str) -> dict[str, str]:
    """Stage -> key in the first iteration, every input a model or artifact whose content is its role's name."""
    run = load_run(ROOT / "deploy" / "runs" / f"{preset}.yaml")
    settings = {
        "sample": run.sampling_for_training(),
        "score": run.scoring_for_pairs(),
        "weigh": run.weighting_for_pairs(),
        "train": run.training_for(0),
        "evaluate": run.evaluation,
    }
    found = {}
    for name, config in settings.items():
        absent = EARLIER[run.policies_compared - 1 :]  # a run gives as many earlier policies as its `history` says
        if name == "train" and run.training.adapter is None:
            absent = (*absent, "start")  # the base of an adapter
        inputs = {
            role.rstrip("?"): ArtifactRef(kind=kind, key="external", path="/nowhere", content=role.rstrip("?"))
            for role, kind in STAGES[name].consumes.items()
            if role.rstrip("?") not in absent
        }
        found[name] = STAGES[name].key(config, inputs)
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_the_keys_of_a_preset_are_what_they_were(preset):
    assert keys(preset) == json.loads(GOLDEN.read_text())[preset]


if __name__ == "__main__":
    print(json.dumps({preset: keys(preset) for preset in PRESETS}, indent=1))
