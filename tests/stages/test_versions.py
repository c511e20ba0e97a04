"""VERSION of a plug-in is part of the key of what it made; the first version is not written, so that older artifacts stay found.

And which plug-ins there are: the packages of the machine are read once, and again when there are others.
"""

import sys

import pytest

from flows.config import EvaluationConfig, SamplingConfig, ScoringConfig, TrainingConfig
from stages import registry
from stages.methods import METHODS
from stages.sampling import SAMPLERS
from stages.scoring import SCORERS
from stages.stage import STAGES
from stages.weighting.stage import WeightingConfig
from stages.weighting.weights import WEIGHTS

CASES = [
    ("sample", SAMPLERS, "vllm", lambda: SamplingConfig(backend={"name": "vllm"})),
    ("score", SCORERS, "length", lambda: ScoringConfig(scorer={"name": "length"}, pairing="best_vs_worst")),
    (
        "score",
        SCORERS,
        "length",
        lambda: ScoringConfig(scorer={"name": "combination", "parts": [{"scorer": {"name": "length"}}]}),
    ),
    ("weigh", WEIGHTS, "swift", lambda: WeightingConfig(weights={"name": "swift"})),
    ("train", METHODS, "dpo", lambda: TrainingConfig(method={"name": "dpo"})),
    ("train", METHODS, "swift", lambda: TrainingConfig(method={"name": "swift"})),
    ("evaluate", SCORERS, "length", lambda: EvaluationConfig(scorer={"name": "length"})),
]


@pytest.mark.parametrize(("stage", "family", "name", "settings"), CASES)
def test_another_version_of_a_plug_in_is_another_key(stage, family, name, settings, monkeypatch):
    before = STAGES[stage].key(settings(), {})
    monkeypatch.setattr(family.get(name), "VERSION", "1", raising=False)
    assert STAGES[stage].key(settings(), {}) == before
    monkeypatch.setattr(family.get(name), "VERSION", "2", raising=False)
    after = STAGES[stage].key(settings(), {})
    assert after != before
    monkeypatch.setattr(family.get(name), "VERSION", "3", raising=False)
    assert STAGES[stage].key(settings(), {}) not in (before, after)


def test_a_version_counts_in_its_own_family_only(monkeypatch):
    """`swift` is a method and a weight provider."""
    training, weighting = TrainingConfig(method={"name": "swift"}), WeightingConfig(weights={"name": "swift"})
    keys = STAGES["train"].key(training, {}), STAGES["weigh"].key(weighting, {})
    monkeypatch.setattr(METHODS.get("swift"), "VERSION", "2")
    assert STAGES["train"].key(training, {}) != keys[0] and STAGES["weigh"].key(weighting, {}) == keys[1]


def test_packages_are_read_once_and_again_when_another_is_installed(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(registry, "entry_points", lambda read=registry.entry_points: reads.append(1) or read())
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert not any("later" in names for names in (METHODS.names(), WEIGHTS.names(), METHODS.names()))
    assert "later" not in METHODS and len(reads) == 1
    metadata = tmp_path / "later-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[selfplay.methods]\nlater = later:Later\n")
    assert "later" in METHODS and "later" in METHODS.names() and len(reads) == 2
