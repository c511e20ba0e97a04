"""A stage of another package: a filter between sampling and scoring, added in three places (its module, one line, its settings)."""

import importlib
import json
import shutil

import pytest
import yaml

from data_contracts.errors import ConfigError
from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.config import load_run
from flows.forecast.rehearsal import rehearse
from stages.stage import STAGES

FILTER = '''"""Stage - generations -> generations: without the longest candidates of each prompt."""

from data_contracts.config import Config as BaseConfig
from data_contracts.shards import read_shards
from stages.stage import StageRuntime, Stage


class Config(BaseConfig):
    drop_longest: int
    """Candidates of each prompt that go."""
    runtime: StageRuntime = StageRuntime()


def run(job):
    candidates = {}
    for row in read_shards(job.path("generations"), "generations").to_pylist():
        candidates.setdefault(row["prompt_id"], []).append(row)
    for index, prompt_ids in job.missing_shards(sorted(candidates), 64, "generations"):
        rows = []
        for prompt_id in prompt_ids:
            by_length = sorted(candidates[prompt_id], key=lambda row: len(row["token_ids"]))
            rows += by_length[: len(by_length) - job.config.drop_longest]
        job.write(index, sorted(rows, key=lambda row: (row["prompt_id"], row["candidate"])))


STAGE = Stage(
    "filter", "1", "generations", {"generations": "generations"}, "selfplay_filter",
    section="filter", phase="scoring", unit="candidates", after="sample",
)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution with the module and its entry point, for this process and those it starts."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "selfplay_filter.py").write_text(FILTER)  # place 1: the module
    info = site / "selfplay_filter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: selfplay-filter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[selfplay.stages]\nfilter = selfplay_filter:STAGE\n")  # place 2: one line
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


def test_a_filter_stage_of_another_package_runs_in_the_loop(tmp_path, package, undisturbed, tools, monkeypatch):
    """What comes before the filter is found in a copy of the undisturbed run's store."""
    shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True)
    added = {"name": "filtered", "iterations": 1, "refine": {"filter": {"drop_longest": 1}}}  # place 3: its settings
    config = tmp_path / "filtered.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(undisturbed.config.read_text()) | added))
    monkeypatch.setenv("PYTHONPATH", str(package))
    finished = tools.play(config, tmp_path / "store", PYTHONPATH=str(package))
    assert finished.code == 0, finished.out
    run, store = load_run(config), Store(tmp_path / "store")
    steps = {(step.name, step.iteration): step for step in rehearse(run, store).steps}
    assert all(step.record is not None for step in steps.values())
    sampled, filtered, scored = (steps[name, 1].record for name in ("sample", "filter", "score"))
    assert scored.inputs["generations"].key == filtered.key and filtered.inputs["generations"].key == sampled.key
    counts = [
        len(read_shards(store.directory("generations", record.key), "generations")) for record in (sampled, filtered)
    ]
    assert 0 < counts[1] < counts[0]
    assert "filter" in (store.root / "runs" / "filtered" / "report.md").read_text()
    ledger = [json.loads(line) for line in (store.root / "runs" / "filtered" / "ledger.jsonl").read_text().splitlines()]
    assert "filter" in {line.get("stage") for line in ledger}


@pytest.mark.parametrize(
    ("refine", "message"),
    [
        ({"no_such": {}}, "no stage is called 'no_such'"),
        ({"filter": {"drop": 1}}, "drop: unknown key"),
        ({"train": {}}, "the stage train comes after none of sample, score, weigh"),
    ],
)
def test_a_refinement_that_cannot_run_is_refused(package, make_run, refine, message):
    with pytest.raises(ConfigError, match=message):
        load_run(make_run("refused", refine=refine))


def test_the_five_stages_are_what_a_run_lists():
    assert list(STAGES) == ["sample", "score", "weigh", "train", "evaluate"]
