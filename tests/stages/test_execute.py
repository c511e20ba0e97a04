"""What is signed was made of what the key says: a model that is overwritten while a stage reads it stops the signature.

Strategy: a stage of this test writes one shard and, where it is told to, another model over the one it was given.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from data_contracts.checkpoint import external_model
from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ArtifactError
from data_contracts.set_aside import list_set_aside
from stages.execute import execute
from stages.scoring.models import NamedModel
from stages.stage import Stage

ROW = {
    "prompt_id": "p0", "candidate": 0, "prompt_ids": [5], "token_ids": [6, 1], "token_logps": [-1.0, -1.0], "finish_reason": "stop", "seed": 1,
    "completion": "x",
}  # fmt: skip
STAGE = Stage(
    "fake", "1", "generations", {"policy": "checkpoint"}, "tests_fake_stage", "sampling", "generation", "candidates"
)


class Config(BaseConfig):
    overwritten: str | None = None
    scorer: NamedModel | None = None


def run(job) -> None:
    job.write(0, [ROW])
    if job.config.overwritten:
        path = Path(job.config.overwritten)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("tests_fake_stage")
    module.Config, module.run = Config, run
    monkeypatch.setitem(sys.modules, "tests_fake_stage", module)


@pytest.mark.parametrize("which", ["the input", "a model that the settings name"])
def test_a_model_that_is_overwritten_meanwhile_is_not_signed_for(fake, store, tiny_model, tmp_path, which):
    policy, scorer = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("policy", "scorer"))
    inputs = {"policy": external_model(policy, store.root / "digests")}
    victim = policy if which == "the input" else scorer
    config = Config(scorer=NamedModel(path=str(scorer)), overwritten=str(victim / "model.safetensors"))
    key = STAGE.key(config, inputs)
    with pytest.raises(ArtifactError, match="overwritten: nothing is signed, what was made lies in"):
        execute(STAGE, config, inputs, store)
    assert store.load("generations", key) is None
    assert not list(store.directory("generations", key).glob("part-*"))
    (entry,) = list_set_aside(store.root)
    assert (entry.path / "part-00000.parquet").is_file() and "fake read it" in entry.reason["why"]
    assert (str(policy) if victim == policy else which) in entry.reason["why"]


def test_an_untouched_model_is_signed_for_and_the_record_says_what_may_change_numbers(
    fake, store, tiny_model, monkeypatch
):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    record = execute(STAGE, Config(), {"policy": external_model(tiny_model)}, store)
    assert store.find("generations", record.key) and list_set_aside(store.root) == []
    assert record.provenance["environment"]["NVIDIA_TF32_OVERRIDE"] == "1"
    assert json.loads((store.directory("generations", record.key) / "record.json").read_text())["key"] == record.key
