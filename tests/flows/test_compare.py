"""Comparisons: what does not depend on a variant is built once; what may not differ is refused; the numbers are the records'."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.comparison import (
    load_comparison,
    outcomes,
    phase_of,
    ratios,
    seconds_table,
    sharing,
    table,
    text,
)
from flows.comparison_page import write_report
from flows.forecast.rehearsal import Step
from tasks.place import Place, Purpose

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("dpo", "ipo", "simpo", "sppo", "rdpo", "rebel")
PRESETS = sorted((ROOT / "deploy" / "runs" / "compare").glob("*.yaml"))


def write(directory, run, **more):
    path = directory / "comparison.yaml"
    body = {
        "name": "six",
        "base": str(run),
        "vary": ["method"],
        "variants": {name: {"method": {"name": name}} for name in METHODS},
    }
    path.write_text(yaml.safe_dump(body | more, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def six(tmp_path_factory, make_run):
    """Six methods, one iteration each, played in one process on one store (in_process.py); then once more."""
    work = tmp_path_factory.mktemp("six")
    base = make_run("base", iterations=1, prompts={"per_iteration": 8}, training={"dtype": "float32"})
    path, store = write(work, base), Store(work / "store")
    comparison = load_comparison(path)
    cases = []
    for one in comparison.variants:
        config = work / f"{one.config.name}.json"
        config.write_text(one.config.model_dump_json())
        cases.append({"id": one.name, "config": str(config), "set": {}})
    for out in ("first.jsonl", "again.jsonl"):
        (work / "request.json").write_text(json.dumps({"store": str(store.root), "cases": cases}))
        command = [
            sys.executable,
            str(Path(__file__).with_name("in_process.py")),
            str(work / "request.json"),
            str(work / out),
        ]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=900, capture_output=True)
    results = [json.loads(line) for line in (work / "first.jsonl").read_text().splitlines()]
    assert not [result["error"] for result in results if "error" in result]
    return comparison, store


def environment():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_what_six_methods_share_is_built_exactly_once(six):
    comparison, store = six
    found = outcomes(comparison, store)
    records = [record for record in store.records() if record.kind != "prompts"]
    assert {record.provenance["starts"] for record in records} == {1}  # twice played: still started once
    # Each of six asked for: held-out answers and report of the start; sample, score, weigh, train; answers and report of its own.
    assert sharing(found)["asked for"] == 6 * 8
    assert len(records) == sharing(found)["built"]
    for name in ("sample", "score"):
        assert len({step.key for one in found for step in one.steps if step.name == name}) == 1
    assert len({step.key for one in found for step in one.steps if step.name == "train"}) == 6
    weighed = {step.key for one in found for step in one.steps if step.name == "weigh"}
    assert len(weighed) == 3  # with a reference, without one (SimPO), and with equal pairs kept (REBEL)


def test_the_table_pools_prompts_and_compares_with_the_first_variant(six):
    comparison, store = six
    found = outcomes(comparison, store)
    rows = table(comparison, found)
    assert [row["variant"] for row in rows] == list(METHODS)
    assert len({row["start"] for row in rows}) == 1 and rows[0]["against dpo"] is None
    for row in rows[1:]:
        difference = row["against dpo"]
        assert difference.low <= difference.mean <= difference.high
        assert difference.mean == pytest.approx(row["final"] - rows[0]["final"])
        assert row["gain"].mean == pytest.approx(row["final"] - row["start"])


def test_seconds_are_the_records_whoever_paid(six):
    comparison, store = six
    found = outcomes(comparison, store)
    seconds = seconds_table(comparison, found)
    (sampled,) = [record for record in store.records("generations") if record.metrics["candidates"] == 8 * 5]
    assert {row["generation"] for row in seconds} == {sampled.seconds["wall"]}
    assert len(ratios(comparison, seconds)) == 3 * 6


def test_the_report_is_one_page_without_network(six):
    comparison, store = six
    page = write_report(comparison, outcomes(comparison, store), store)
    html = page.read_text()
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html
    assert {"gain", "duration", "score", "difference", "loss"} <= set(re.findall(r'id="fig-([^"]+)"', html))
    titles = ["The variants, their seeds pooled", "What they cost", "Did they get better?", "In numbers",
              "What differs in the settings", "Training", "The same prompts, run by run"]  # fmt: skip
    assert re.findall("<h2>(.*?)</h2>", html) == titles
    assert re.findall('<li><a href="(.*?)">', html) == [f"../six-{name}-s0/report.html" for name in METHODS]
    assert "<td>method.name</td>" + "".join(f"<td>{name}</td>" for name in METHODS) in html
    assert all(f"<h4>{name}, iteration 1 <b>" in html for name in METHODS)
    body = json.loads(page.with_suffix(".json").read_text())
    assert len(body["variants"]) == 6 and body["sharing"]["shared"] >= 4
    assert page.with_suffix(".md").read_text() == text(comparison, outcomes(comparison, store))


def test_an_incomplete_comparison_says_what_is_missing(six, tmp_path):
    comparison, _ = six
    with pytest.raises(
        ConfigError, match="six-dpo-s0 is not complete .heldout_generations is not built.: run the comparison again"
    ):
        outcomes(comparison, Store(tmp_path))


def test_variants_that_differ_in_more_than_they_say_are_refused_by_field(tmp_path, make_run):
    variants = {"a": {}, "b": {"training": {"batch_size": 7}, "sampling": {"top_p": 0.9}}}
    path = write(tmp_path, make_run("base"), variants=variants)
    with pytest.raises(
        ConfigError,
        match="variant b differs from a in sampling.top_p, training.batch_size, and `vary` names only method",
    ):
        load_comparison(path)
    path = write(tmp_path, make_run("base"), variants=variants, vary=["training", "sampling.top_p"])
    assert [one.config.name for one in load_comparison(path).variants] == ["six-a-s0", "six-b-s0"]


def test_seeds_multiply_the_variants_and_overrides_reach_all(tmp_path, make_run):
    path = write(tmp_path, make_run("base"), seeds=[3, 4])
    found = load_comparison(path, {"training.learning_rate": 0.5}).variants
    assert len(found) == 12 and {one.config.seed for one in found} == {3, 4}
    assert {one.config.training.learning_rate for one in found} == {0.5}


@pytest.mark.parametrize(
    "body", [{"variants": {}}, {"vary": []}, {"name": "Has Space"}, {"nonsense": 1}, {"base": "nowhere.yaml"}]
)
def test_a_comparison_that_says_nothing_is_refused(body, tmp_path, make_run):
    with pytest.raises(ConfigError):
        load_comparison(write(tmp_path, make_run("base"), **body))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_presets_are_comparisons_of_what_they_name(preset):
    comparison = load_comparison(preset)
    assert comparison.config.name == preset.stem.replace("_", "-") and len(comparison.variants) >= 2


def test_auxiliary_models_count_as_weights():
    def step(stage, purpose=Purpose.TRAINING, subject=""):
        return Step(stage, None, Place("store", "run", 1).serving(purpose, subject), {}, None, None)

    steps = [step("train", Purpose.AUXILIARY, "positive"), step("weigh", Purpose.AUXILIARY, "negative")]
    steps += [step("weigh"), step("weigh", Purpose.PREVIOUS)]
    assert [one.name for one in steps] == ["positive", "negative_pairs", "weigh", "weigh_previous"]
    assert {phase_of(one) for one in steps} == {"weights"}
    assert phase_of(step("train")) == "training"
    assert phase_of(step("sample", Purpose.HELDOUT)) == "evaluation"


@pytest.mark.slow
def test_the_flow_compares_and_goes_on(tmp_path, make_run, tools):
    """`selfplay compare` with Prefect and a process per stage; run again, nothing is built."""
    variants = {name: {"method": {"name": name}} for name in METHODS}
    path = write(tmp_path, make_run("base", iterations=1, prompts={"per_iteration": 8}), variants=variants)
    command = [sys.executable, "-m", "flows", "compare", str(path), "--store", str(tmp_path / "store")]
    first = tools.finish(command, timeout=900)
    assert first.code == 0, first.out
    assert "# Comparison six" in first.out and (tmp_path / "store/runs/six/comparison.html").is_file()
    records = [record for record in Store(tmp_path / "store").records() if record.kind != "prompts"]
    assert {record.provenance["starts"] for record in records} == {1}
    assert len(first.names("Completed()")) == len(records) + 6 * 2  # and two prompt sets each
    again = tools.finish(command, timeout=900)
    assert again.code == 0 and len(again.names("Cached")) == 6 * 8
