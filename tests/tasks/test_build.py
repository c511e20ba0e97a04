"""Build: what is there is found without starting anything, what is half there is finished, what is damaged is made again.

Strategy: the real command with the canned sampler, one prompt per shard; `.events.jsonl` in the artifact is the history of who made
which shard when. "Not launched" is shown by a launcher that must not be called.
"""

import shutil
import threading

import pytest

import tasks.build
from data_contracts.artifact import RECORD, ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.errors import ArtifactError, ConfigError, ContractError
from data_contracts.mirror import Mirror
from data_contracts.shards import read_shards, seal_path, shard_path
from data_contracts.store import Store
from stages.sampling.stage import SamplingConfig
from stages.stage import STAGES
from tasks.build import build
from tests.conftest import tries_of

NUM_PROMPTS = 12


def sampling(**changes) -> SamplingConfig:
    settings = {"backend": {"name": "canned"}, "num_candidates": 2, "max_new_tokens": 6, "max_prompt_tokens": 64}
    runtime = {"prompts_per_shard": 1, "device": "cpu"} | changes.pop("runtime", {})
    return SamplingConfig.model_validate(settings | changes | {"runtime": runtime})


@pytest.fixture(scope="module")
def tiny(tiny_model) -> ArtifactRef:
    return external_model(tiny_model)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, make_prompts):
    """A store with one finished artifact, never to be changed, and what built it."""
    store = Store(tmp_path_factory.mktemp("built") / "store")
    inputs = {"prompts": make_prompts(store, NUM_PROMPTS), "policy": tiny}
    logged = []
    return store, inputs, build("sample", sampling(), inputs, store, logged.append), logged


@pytest.fixture
def copy(built, tmp_path):
    """A store of one's own with the same artifact: (store, inputs, directory)."""
    store, inputs, result, _ = built
    mine = Store(shutil.copytree(store.root, tmp_path / "store"))
    moved = inputs | {"prompts": mine.find("prompts", inputs["prompts"].key)}
    return mine, moved, mine.directory("generations", result.ref.key)


@pytest.fixture
def no_launch(monkeypatch):
    def launch(*_, **__):
        raise AssertionError("a stage was started")

    monkeypatch.setattr(tasks.build, "run_work", launch)


def shards_made(directory) -> list[list[int]]:
    """For each try, the shards it wrote."""
    return tries_of(directory, "shard")


def test_a_stage_builds_signs_and_describes_its_artifact(built, tiny):
    store, inputs, result, _ = built
    assert not result.cached
    assert result.ref == store.find("generations", result.ref.key)
    record = result.record
    assert record.rows == record.metrics["candidates"] == 2 * NUM_PROMPTS
    assert record.config == sampling().identity() and "runtime" not in record.config
    assert record.provenance["settings"]["runtime"]["prompts_per_shard"] == 1
    assert record.inputs == inputs and record.inputs["policy"] == tiny
    assert record.key == STAGES["sample"].key(sampling(), inputs)
    assert shards_made(store.directory("generations", record.key)) == [list(range(NUM_PROMPTS))]
    assert record.provenance["starts"] == 1 and 0 <= record.seconds["busy"] <= record.seconds["wall"]
    assert store.problems(record, deep=True) == []


def test_a_built_artifact_is_found_and_nothing_is_started(copy, built, no_launch):
    store, inputs, _ = copy
    found, wanted = build("sample", sampling(), inputs, store), built[2].record
    assert found.cached and found.record.model_copy(update={"inputs": wanted.inputs}) == wanted
    assert found.record.inputs["prompts"].path == str(store.directory("prompts", wanted.inputs["prompts"].key))


def test_what_was_killed_before_it_was_mirrored_is_mirrored_when_it_is_found(copy, no_launch, tmp_path, monkeypatch):
    (store, inputs, _), logged = copy, []
    monkeypatch.setenv("SELFPLAY_MIRROR", f"file://{tmp_path}/mirror")
    found = [build("sample", sampling(), inputs, store, logged.append) for _ in range(2)]
    mirrored = Mirror(f"file://{tmp_path}/mirror").load("generations", found[0].ref.key)
    assert all(result.cached for result in found)
    assert mirrored is not None and mirrored.content == found[0].ref.content
    assert [line for line in logged if "had not" in line] == logged and len(logged) == 1
    monkeypatch.setenv("SELFPLAY_MIRROR", "file:///proc/no/mirror")
    assert build("sample", sampling(), inputs, store, logged.append).cached
    assert "could not" in logged[-1]


def test_another_runtime_finds_the_same_artifact(copy, no_launch):
    store, inputs, _ = copy
    assert build("sample", sampling(runtime={"prompts_per_shard": 5, "timeout_seconds": 9}), inputs, store).cached


def test_another_setting_is_another_artifact(copy, no_launch):
    store, inputs, _ = copy
    with pytest.raises(AssertionError, match="a stage was started"):
        build("sample", sampling(temperature=0.5), inputs, store)


def test_a_crash_before_the_record_costs_the_missing_shards_only(copy, built):
    store, inputs, directory = copy
    before = read_shards(directory, "generations")
    # As kill -9 leaves it: no record, one shard missing, one cut by a full disk, a temporary file.
    (directory / RECORD).unlink()
    shard_path(directory, 4).unlink()
    path = shard_path(directory, 9)
    path.write_bytes(path.read_bytes()[:-30])
    (directory / ".part-00004.parquet.tmp-1").write_bytes(b"PAR1")
    logged = []
    again = build("sample", sampling(), inputs, store, logged.append)
    assert not again.cached
    assert shards_made(directory) == [list(range(NUM_PROMPTS)), [4, 9]]
    assert read_shards(directory, "generations").equals(before)
    assert again.ref.content == built[2].ref.content
    assert again.record.provenance["starts"] == 2
    assert not list(directory.glob(".*.tmp-*"))


def test_a_damaged_artifact_is_made_again_by_one_of_those_who_want_it(copy, built):
    store, inputs, directory = copy
    shard_path(directory, 3).write_bytes(b"PAR1")
    results, logged = [], []

    def want() -> None:
        results.append(build("sample", sampling(), inputs, store, logged.append))

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (again, found) = sorted(results, key=lambda result: result.cached)
    assert (again.cached, found.cached) == (False, True) and again.ref == found.ref
    damage = f"generations {directory.name} is damaged (part-00003.parquet has 4 bytes, not "
    assert [line for line in logged if line.startswith(damage) and line.endswith("building it again")]
    assert [
        line
        for line in logged
        if line.startswith(f"generations {directory.name} is being built by") and line.endswith(": waiting")
    ]
    assert shards_made(directory) == [list(range(NUM_PROMPTS)), [3]]  # what was whole is kept
    assert read_shards(directory, "generations").equals(read_shards(built[2].ref.path, "generations"))
    assert store.problems(again.record, deep=True) == []


def test_a_damaged_record_is_made_again_as_well(copy, monkeypatch):
    store, inputs, directory = copy
    (directory / RECORD).write_text("{")
    monkeypatch.setattr(tasks.build, "run_work", lambda *_, **__: None)
    logged = []
    with pytest.raises(ArtifactError, match="ended with exit code 0, but it has no record.json. See .*stage.log"):
        build("sample", sampling(), inputs, store, logged.append)
    assert "record.json is damaged" in logged[0] and logged[0].endswith("building it again")


def test_a_build_that_was_stopped_midway_goes_on_and_makes_no_shard_twice(store, tiny, make_prompts, built):
    inputs = {"prompts": make_prompts(store, 300), "policy": tiny}
    key = STAGES["sample"].key(sampling(), inputs)

    class Stopped(BaseException):
        pass

    def stop(progress) -> None:
        if progress.done:
            raise Stopped

    with pytest.raises(Stopped):
        build("sample", sampling(), inputs, store, on_progress=stop)
    assert store.find("generations", key) is None
    result = build("sample", sampling(), inputs, store)
    first, second = shards_made(store.directory("generations", key))
    assert 0 < len(first) < 300, "it was stopped too late to tell"
    # The shard being written at the kill may be whole on disk without its event.
    assert set(first).isdisjoint(second) and 0 <= 300 - len(first) - len(second) <= 1
    assert result.record.rows == 600 and result.record.provenance["starts"] == 2


def test_a_failed_stage_is_its_own_error_and_leaves_no_artifact(store, tiny, make_prompts):
    inputs = {"prompts": make_prompts(store, 1), "policy": tiny}
    with pytest.raises(
        ConfigError, match=r"the prompt 'p000' has 2\d tokens, allowed are 1 to 3 .*\[stage sample, log: .*stage\.log\]"
    ):
        build("sample", sampling(max_prompt_tokens=3), inputs, store)
    assert not list(store.root.glob("artifacts/generations/*/record.json"))


def test_an_input_that_is_gone_is_named(store, tiny, make_prompts, no_launch):
    prompts = make_prompts(store, 1)
    with pytest.raises(ConfigError, match="the stage sample got no input policy"):
        build("sample", sampling(), {"prompts": prompts}, store)
    with pytest.raises(ConfigError, match="the stage sample takes checkpoint as 'policy', got prompts"):
        build("sample", sampling(), {"prompts": prompts, "policy": prompts}, store)
    with pytest.raises(ConfigError, match="the stage sample knows no input 'teacher'"):
        build("sample", sampling(), {"prompts": prompts, "policy": tiny, "teacher": tiny}, store)


def test_a_shard_of_another_contract_is_not_taken_for_ones_own(copy, make_artifact):
    store, inputs, directory = copy
    shutil.copyfile(shard_path(store.directory("prompts", inputs["prompts"].key), 0), shard_path(directory, 0))
    with pytest.raises(ArtifactError, match="its content is not what was written"):
        read_shards(directory, "generations")
    seal_path(shard_path(directory, 0)).unlink()
    with pytest.raises(ContractError, match="do not fit the contract of generations"):
        read_shards(directory, "generations")
