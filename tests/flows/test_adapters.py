"""Adapters through whole runs: every preset's CPU twin with `--set training.adapter.name=lora`, and what is refused before a model loads.

Strategy: as in test_methods.py, in one process. The default suite plays three twins, with adapters alone in the artifacts: a held reference
that follows the policy, models that the run trains itself, a pass under three policies. The slow one plays all, merged.
"""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest

from data_contracts.adapter import ADAPTER, BASE, is_adapter_only
from data_contracts.checkpoint import ModelRef, external_model
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import load_run
from flows.forecast.estimate import estimate
from flows.preflight import check_adapter
from tasks.models import locate, resolve
from tests.flows.test_methods import ROOT, TWINS, small_settings, twin_case

BITSANDBYTES = importlib.util.find_spec("bitsandbytes")
ALONE = ("tdpo", "tis_dpo_d", "mnpo")
LORA = {"training.adapter.name": "lora", "training.adapter.rank": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model):
    work = tmp_path_factory.mktemp("models")
    return make_model(work / "same_tokens", seed=1), make_model(work / "teacher", seed=2, vocabulary=300)


@pytest.fixture(scope="module")
def cases_alone(tmp_path_factory, models, tiny_model):
    """Twin -> case, with adapters alone in the artifacts."""
    work = tmp_path_factory.mktemp("alone")
    cases = {name: twin_case(name, small_settings(work, tiny_model), *models) for name in ALONE}
    for case in cases.values():
        case["set"] |= LORA | {"training.adapter.save_merged": False, "evaluation.lm_eval": []}
    return cases


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cases_alone, tools):
    """Twin -> result of these cases, played on one store."""
    return tools.play_cases(list(cases_alone.values()), tmp_path_factory.mktemp("store_alone"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory, models, tiny_model, tools):
    """Twin -> result, with merged weights."""
    work = tmp_path_factory.mktemp("merged")
    cases = [twin_case(name, small_settings(work, tiny_model), *models) for name in TWINS]
    for case in cases:
        case["set"] |= LORA
    return tools.play_cases(cases, work)


def check(result: dict, tiny_model: Path) -> Path:
    """Two iterations came out, of one adapter of the start model. Returns the final checkpoint."""
    assert "error" not in result, result["error"]
    assert len(result["iterations"]) == 2
    for iteration in result["iterations"]:
        assert math.isfinite(iteration["train"]["loss"]) and iteration["train"]["adapter_parameters"] > 0
    final = Path(result["final"])
    assert json.loads((final / ADAPTER / BASE).read_text()) == {"content": external_model(tiny_model).content}
    record = Store(final.parents[2]).load("checkpoint", final.name)
    assert record.inputs["start"].path == str(tiny_model) and record.inputs["policy"].path != str(tiny_model)
    return final


@pytest.mark.parametrize("name", ALONE)
def test_a_run_of_adapters_alone(alone, tiny_model, name):
    final = check(alone[f"twin {name}"], tiny_model)
    assert is_adapter_only(final)


def test_an_estimate_takes_the_rates_of_adapters_from_their_records(alone, cases_alone):
    case, store = cases_alone["tdpo"], Store(Path(alone["twin tdpo"]["final"]).parents[2])
    prediction = estimate(load_run(case["config"], case["set"] | {"seed": 9}), store, use_calibration=False)
    assert {step.source for step in prediction.steps if step.step.stage == "train"} == {"records"}
    assert {step.source for step in prediction.steps} <= {"records", "built"}
    trained = [step.cost["bytes"] for step in prediction.steps if step.step.stage == "train"]
    sizes = [sum(file.size for file in record.files) for record in store.records("checkpoint")]
    assert len(trained) == 2 and set(trained) <= set(sizes)  # adapters alone, not a model


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_the_cpu_twin_of_every_preset_plays_with_an_adapter(merged, tiny_model, name):
    final = check(merged[f"twin {name}"], tiny_model)
    assert (final / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed: pip install --no-deps bitsandbytes")
def test_a_run_whose_frozen_weights_have_4_bits(tmp_path, models, tiny_model, tools):
    cases = [twin_case(name, small_settings(tmp_path, tiny_model), *models) for name in ("tdpo", "swift")]
    for case in cases:
        case["set"] |= LORA | {"training.adapter.name": "qlora"}
    results = tools.play_cases(cases, tmp_path, Path(BITSANDBYTES.origin).parents[1])
    for result in results.values():
        final = check(result, tiny_model)
        assert (final / "model.safetensors").is_file()  # the float32 start model with the adapter
        store = Store(final.parents[2])
        pairs = store.load("checkpoint", final.name).inputs["pairs"]
        assert store.load("weighted_pairs", pairs.key).config["quantised"] is True


def run_with(**settings):
    return load_run(ROOT / "deploy/runs/tiny/tdpo.yaml", {"training.adapter.name": "lora"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.adapter.rank": 0}, "training.adapter.rank"),
        ({"training.runtime.zero_stage": 3}, "ZeRO 3 cuts it up"),
        ({"reference": {"path": "elsewhere"}}, "tdpo holds its reference while it trains"),
        ({"training.adapter.continue": False, "reference": "start"}, "set reference: iterate"),
        (
            {
                "training.adapter.save_merged": False,
                "training.adapter.use_dora": True,
                "sampling.backend": {"name": "vllm"},
            },
            "vLLM serves no adapter",
        ),
        ({"training.adapter.save_merged": False, "auxiliary": {"adapter": {"rank": 2}}}, "remove auxiliary.adapter"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        run_with(**settings)


def test_a_target_that_the_policy_does_not_have_is_refused_before_it_loads(tiny_model):
    check_adapter(run_with(**{"training.adapter.targets": ["q_proj", "mlp.down_proj"]}), tiny_model)
    with pytest.raises(ConfigError, match="no layer 'c_attn'; it has down_proj, gate_proj, k_proj"):
        check_adapter(run_with(**{"training.adapter.targets": ["q_proj", "c_attn"]}), tiny_model)


# --- an adapter as the policy


@pytest.fixture(scope="module")
def brought(tmp_path_factory, tiny_model):
    """An adapter as peft leaves it, in a directory of its own."""
    from stages.models.adapters import save_adapter
    from tests.stages.models.test_adapters import with_adapter

    adapter = tmp_path_factory.mktemp("brought") / "my-adapter"
    save_adapter(with_adapter(tiny_model), adapter)
    name_base(adapter, str(tiny_model))
    return adapter


def name_base(adapter: Path, base: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_an_adapter_is_merged_on_entry_once(store, brought, tiny_model):
    from stages.models.policy import load_causal_lm
    from tests.stages.models.test_adapters import logits, with_adapter

    ref = resolve(ModelRef(path=str(brought)), True, store)
    assert Path(ref.path).parent == store.root / "merged"
    expected = logits(with_adapter(tiny_model))
    merged_logits = logits(load_causal_lm(ref.path, "float32", "cpu").eval())
    assert (merged_logits - expected).abs().max() < 1e-5
    before = (Path(ref.path) / "model.safetensors").stat().st_mtime_ns
    assert resolve(ModelRef(path=str(brought)), True, store) == ref
    assert (Path(ref.path) / "model.safetensors").stat().st_mtime_ns == before
    assert locate(ModelRef(path=str(brought)), True) == tiny_model, "checks read the base model"


def test_a_checkpoint_of_an_adapter_alone_may_be_the_next_runs_policy(tmp_path, store, tiny_model):
    from tests.stages.models.test_adapters import checkpoint_of_an_adapter

    checkpoint = Path(checkpoint_of_an_adapter(tmp_path / "made", tiny_model).path)
    for path in (checkpoint, checkpoint / ADAPTER):
        assert locate(ModelRef(path=str(path)), True) == tiny_model
        ref = resolve(ModelRef(path=str(path)), True, store)
        assert (Path(ref.path) / "model.safetensors").is_file() and Path(ref.path).parent == store.root / "merged"


def test_an_adapter_that_names_no_base_or_a_wrong_one_is_refused(tmp_path, store, brought, tiny_model, make_model):
    copy = Path(shutil.copytree(brought, tmp_path / "copy"))
    model = ModelRef(path=str(copy))
    for base, message in ((None, "names no base model"), ("/nowhere/model", "is no directory here")):
        name_base(copy, base)
        with pytest.raises(ConfigError, match=message):
            locate(model, True)
    name_base(copy, str(tiny_model))
    (copy / BASE).write_text('{"content": "of another model"}')
    with pytest.raises(ConfigError, match="belongs to another model"):
        resolve(model, True, store)
    settings = json.loads((copy / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "only LORA can be merged"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ):
        (copy / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ConfigError, match=message):
            locate(model, True)
    assert not (store.root / "merged").exists()
