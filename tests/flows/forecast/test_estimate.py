"""Estimates: what is built costs nothing, records tell rates, a calibration measures the rest, money and disk are arithmetic."""

import shutil

import pytest

from data_contracts.errors import ConfigError
from data_contracts.ledger import ESTIMATE
from data_contracts.store import Store
from flows.config import load_run
from flows.forecast.estimate import OTHER_SECONDS, estimate, show
from flows.forecast.rates import CALIBRATION_PROMPTS, LOOKING_SECONDS


def test_a_run_that_is_built_costs_only_what_lies_outside_its_stages(undisturbed):
    found = estimate(load_run(undisturbed.config), Store(undisturbed.store), use_calibration=False)
    assert {one.source for one in found.steps} == {"built"} and sum(one.seconds for one in found.steps) == 0
    assert found.seconds == found.other > 0


def test_another_seed_is_predicted_from_the_records_of_this_one(undisturbed):
    run = load_run(undisturbed.config, {"seed": 9, "name": "nine"})
    found = estimate(run, Store(undisturbed.store), price_per_hour=36.0, use_calibration=False)
    sources = {one.step.name: one.source for one in found.steps}
    assert set(sources.values()) == {"records"}, sources
    records = [record for record in Store(undisturbed.store).records() if record.kind != "prompts"]
    measured = {}
    for record in records:
        measured.setdefault(record.stage, []).append(record.seconds["wall"] + LOOKING_SECONDS)
    for step in found.steps:  # each from one of these records, whatever the machine was doing then
        assert 0.6 * min(measured[step.step.stage]) < step.seconds < 1.7 * max(measured[step.step.stage])
    assert found.spread > 0
    shown = show(found)
    assert f"money: {found.seconds / 100:.2f} +- " in shown and "TFLOP" in shown
    tokens = sum(one.cost.get("tokens_out", 0) for one in found.steps)
    assert tokens == pytest.approx(sum(record.cost.get("tokens_out", 0) for record in records), rel=0.4)


def test_twice_the_prompts_are_twice_the_units(undisturbed):
    store = Store(undisturbed.store)
    seconds = {}
    for count in (6, 12):
        found = estimate(
            load_run(undisturbed.config, {"seed": 9, "prompts.per_iteration": count}), store, use_calibration=False
        )
        seconds[count] = {one.step.name: one.cost.get("flops", 0) for one in found.steps if one.step.iteration == 1}
    assert seconds[12]["train"] == pytest.approx(2 * seconds[6]["train"])
    assert seconds[12]["sample"] == pytest.approx(2 * seconds[6]["sample"])


def test_what_nothing_is_known_of_is_said_to_be_unknown(tmp_path, undisturbed):
    found = estimate(load_run(undisturbed.config), Store(tmp_path), use_calibration=False)
    assert {one.source for one in found.steps} == {"unknown"}
    shown = show(found)
    assert "unknown, and in no sum: evaluate, heldout_generations, sample" in shown
    assert "total: at least " in shown and "at least 0.00 GB of disk" in shown
    line = next(line for line in shown.splitlines() if line.startswith("iter_01  train"))
    assert line.split() == ["iter_01", "train", "unknown"]
    assert not (tmp_path / "runs").exists()  # a lower bound is no prediction


def test_a_prediction_is_kept_once_everything_is_known(tmp_path, undisturbed):
    store = Store(shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True))
    found = estimate(load_run(undisturbed.config), store, use_calibration=False)
    assert not found.unknown and "at least" not in show(found)
    assert (store.run_directory("tiny") / ESTIMATE).is_file()


def test_a_run_killed_as_it_began_is_no_obstacle_to_the_others_estimates(tmp_path, undisturbed):
    killed = tmp_path / "store" / "runs" / "killed" / "ledger.jsonl"
    killed.parent.mkdir(parents=True)
    killed.write_text('{"event": "beg')
    assert (
        estimate(load_run(undisturbed.config), Store(tmp_path / "store"), use_calibration=False).other == OTHER_SECONDS
    )


@pytest.mark.slow
def test_a_calibration_measures_each_kind_of_step_once_in_a_store_of_its_own(tmp_path, undisturbed):
    store = Store(tmp_path)
    run = load_run(undisturbed.config, {"prompts.per_iteration": None})
    found = estimate(run, store)
    assert {one.source for one in found.steps} == {"calibration"} and all(one.seconds > 0 for one in found.steps)
    assert not list(store.records()) and not (tmp_path / "prefect").exists()
    inside = [record for record in Store(tmp_path / "calibration").records() if record.kind != "prompts"]
    assert (
        len(inside) == 2 + 4 + 1
    )  # the start's answers and report, one iteration, the weights of a policy that has moved
    assert max(record.metrics.get("candidates", 0) for record in inside) == min(CALIBRATION_PROMPTS, 24) * 5
    again = estimate(run, store)
    assert again.seconds == pytest.approx(found.seconds, rel=0.2)  # found, not measured again


def test_a_model_larger_than_memory_is_refused_with_what_would_help(tmp_path, undisturbed):
    run = load_run(
        undisturbed.config, {"execution": {"host_memory_gib": 0.002}, "training.runtime.batch_tokens": 100_000}
    )
    advice = (
        r"stages without enough memory\n  sample: .* of host memory on a node, .*Try sampling\.backend\.runtime\.batch_size=\d+\n"
        r".*\n  train: .* of host memory on a node, which has 0\.0; no setting here makes it fit: take "
    )
    with pytest.raises(ConfigError, match=advice):
        estimate(run, Store(tmp_path))
    assert not list(tmp_path.iterdir())
