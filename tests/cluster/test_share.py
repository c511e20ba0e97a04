"""Stages shared by several workers: equal artifacts, failed shards made elsewhere, poison named, GPUs handed out.

Strategy: `build` under the profile local with real processes; a plug-in sampler dies where it is told to. Weigh runs
with a real (tiny) model, so that the log-prob store is filled by several at once.
"""

import json
import threading
import time
from collections import Counter

import pytest

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.config import parse
from data_contracts.errors import ConfigError, StageError
from data_contracts.store import Store
from stages.running.history import events
from stages.sampling.stage import SamplingConfig
from stages.stage import STAGES
from tasks.build import build
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.gpus import gpu_uuids, some_gpus, visible_gpus
from tasks.execution.local import Local

NUM_PROMPTS = 10


def sampling(name: str = "canned", **runtime) -> SamplingConfig:
    settings = {"backend": {"name": name}, "num_candidates": 2, "max_new_tokens": 6, "max_prompt_tokens": 64}
    return SamplingConfig.model_validate(settings | {"runtime": {"prompts_per_shard": 1, "device": "cpu"} | runtime})


def workers(count: int, **more) -> ExecutionConfig:
    return ExecutionConfig(workers={"sample": count, "score": count, "weigh": count}, **more)


@pytest.fixture(scope="module")
def tiny(tiny_model) -> ArtifactRef:
    return external_model(tiny_model)


@pytest.fixture
def inputs(store, tiny, make_prompts):
    return {"prompts": make_prompts(store, NUM_PROMPTS), "policy": tiny}


def shards_by_maker(directory) -> Counter:
    return Counter(event["worker"] for event in events(directory) if event["event"] == "shard")


def test_three_workers_make_what_one_makes(store, inputs, tmp_path, make_prompts, tiny, flaky, shared_work):
    flaky({}, pause="0.05")
    shared_work.workers("sample", sampling("flaky"), inputs, store, 3)
    shared = shared_work.sign("sample", sampling("flaky"), inputs, store)
    makers = shards_by_maker(store.directory("generations", shared.key))
    assert len(makers) == 3
    assert sum(makers.values()) == NUM_PROMPTS
    alone = Store(tmp_path / "alone")
    single = shared_work.sign(
        "sample", sampling("flaky"), {"prompts": make_prompts(alone, NUM_PROMPTS), "policy": tiny}, alone
    )
    assert (single.key, single.content) == (shared.key, shared.content)
    assert single.metrics == shared.metrics
    assert shared.seconds["workers/generate"] >= NUM_PROMPTS * 0.05  # what the workers spent, not what signing took
    assert not (store.directory("generations", shared.key) / ".claims").exists()


def test_a_shard_of_a_killed_worker_is_made_by_another(store, inputs, flaky):
    log = flaky({"p004": "once"}, pause="0.05")
    logged = []
    built = build("sample", sampling("flaky"), inputs, store, logged.append, execution=workers(3))
    begun = Counter(prompt for line in log.read_text().splitlines() for prompt in json.loads(line)["prompts"])
    assert begun == Counter({f"p{number:03d}": 1 + (number == 4) for number in range(NUM_PROMPTS)})
    assert built.record.rows == 2 * NUM_PROMPTS
    assert any("killed by signal 9" in line for line in logged)


@pytest.mark.slow
def test_a_poison_shard_is_named_and_all_others_are_kept(store, inputs, flaky):
    flaky({"p006": "raise"})
    with pytest.raises(
        StageError, match=r"sample: 1 shard\(s\) failed 2 times.*part-00006 \(p006\): RuntimeError: no words for p006"
    ):
        build("sample", sampling("flaky"), inputs, store, execution=workers(2))
    directory = store.directory("generations", STAGES["sample"].key(sampling("flaky"), inputs))
    assert len(list(directory.glob("part-*.parquet"))) == NUM_PROMPTS - 1
    log = flaky({})
    log.unlink()
    built = build("sample", sampling("flaky"), inputs, store)  # mended: one shard is made, under another profile
    assert [json.loads(line)["prompts"] for line in log.read_text().splitlines()] == [["p006"]]
    assert built.record.rows == 2 * NUM_PROMPTS


@pytest.mark.slow
def test_workers_that_cannot_start_are_not_started_for_ever(store, inputs):
    broken = sampling("canned", python="/nonexistent/python")
    with pytest.raises(StageError):
        build("sample", broken, inputs, store, execution=workers(2))


def test_weights_are_shared_by_model_pass_and_by_shard(
    make_artifact, make_pair, tiny, tmp_path, shared_work, monkeypatch
):
    import stages.models.logps
    from stages.weighting.stage import WeightingConfig

    one_at_a_time, load = threading.Lock(), stages.models.logps.load_causal_lm

    def load_alone(*arguments):  # transformers loads into the wrong model when two threads do it at once
        with one_at_a_time:
            return load(*arguments)

    monkeypatch.setattr(stages.models.logps, "load_causal_lm", load_alone)

    config = WeightingConfig(dtype="float32", runtime={"pairs_per_shard": 1, "device": "cpu"})
    made = []
    for name, count in (("alone", 0), ("shared", 2)):
        mine = Store(tmp_path / name)
        inputs = {
            "pairs": make_artifact(mine, "scored_pairs", [make_pair(number) for number in range(6)]),
            "reference": tiny,
        }
        shared_work.workers("weigh", config, inputs, mine, count)
        record = shared_work.sign("weigh", config, inputs, mine)
        made.append(
            (
                record.key,
                record.content,
                {name: value for name, value in record.metrics.items() if "logps/" not in name},
            )
        )
        passes = [event for event in events(mine.directory("weighted_pairs", record.key)) if event["event"] == "pass"]
        assert sorted(event["index"] for event in passes) == list(range(6))  # none was made twice
        assert len({event.get("worker") for event in passes}) == max(1, count)
    assert made[0] == made[1]


def test_a_stage_without_shards_has_one_worker():
    with pytest.raises(
        ConfigError, match=r"the stage train has no shards to share; set training.runtime.num_processes"
    ):
        parse(ExecutionConfig, {"workers": {"train": 2}}, "execution")


def test_an_unknown_profile_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError,
        match=r"profile: .*no engine is called 'mesos'; there are local, process-pool, kubernetes, ray, slurm",
    ):
        parse(ExecutionConfig, {"profile": "mesos"}, "execution")


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match=r"no stage is called 'sampling'; there are sample, score"):
        parse(ExecutionConfig, {"workers": {"sampling": 2}}, "execution")


def test_two_that_want_gpus_never_share_one(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-7f")
    monkeypatch.setattr("tasks.execution.gpus.lock_directory", lambda: tmp_path / "locks")
    assert visible_gpus() == ["0", "1", "GPU-7f"]
    with some_gpus(2, print) as first:
        assert first == {"CUDA_VISIBLE_DEVICES": "0,1"}
        with some_gpus(1, print) as second:
            assert second == {"CUDA_VISIBLE_DEVICES": "GPU-7f"}
    with some_gpus(3, print) as all_of_them:
        assert all_of_them == {"CUDA_VISIBLE_DEVICES": "0,1,GPU-7f"}


UUIDS = {"0": "GPU-7f00-aa", "1": "GPU-7f11-bb", "2": "GPU-8c22-cc"}


@pytest.fixture
def three_gpus(monkeypatch, tmp_path):
    """A machine with three GPUs, whose numbers and UUIDs nvidia-smi tells."""
    monkeypatch.setattr("tasks.execution.gpus.gpu_uuids", lambda: UUIDS)
    monkeypatch.setattr("tasks.execution.gpus.lock_directory", lambda: tmp_path / "locks")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("spelling", ["GPU-7f00-aa,GPU-8c22-cc", "GPU-7f0,2", "0,GPU-8c", "0,GPU-7f00-aa,2"])
def test_a_gpu_has_one_lock_however_it_is_named(monkeypatch, three_gpus, spelling):
    with some_gpus(1, print) as first:
        assert first == {"CUDA_VISIBLE_DEVICES": "0"}
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", spelling)  # another run, which counts its GPUs in another way
        assert len(visible_gpus()) == 2
        with some_gpus(1, print) as second:
            assert second == {"CUDA_VISIBLE_DEVICES": spelling.split(",")[-1]}


def test_the_works_own_variable_says_among_which_gpus_to_choose_and_the_lock_chooses(three_gpus):
    env = {"CUDA_VISIBLE_DEVICES": "1,GPU-8c22-cc"}
    with some_gpus(1, print, env) as first, some_gpus(1, print, env) as second:
        assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "GPU-8c22-cc"})
    with pytest.raises(ConfigError, match=r"shows 2 \(CUDA_VISIBLE_DEVICES=1,GPU-8c22-cc\)"), some_gpus(3, print, env):
        pass
    with some_gpus(0, print, env) as nothing:  # a stage on the CPU: its variable stays as it is
        assert nothing == {}


def test_a_work_may_not_name_a_gpu_that_its_run_was_not_given(monkeypatch, three_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7f11-bb,2")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == ["1"]
    with pytest.raises(ConfigError, match=r"may use the GPUs GPU-7f11-bb,2, without 0: name some of these"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "1,0"})


def test_a_stage_gets_the_gpu_of_its_lock_not_the_first_that_its_settings_name(three_gpus, tmp_path):
    log, program = tmp_path / "log", tmp_path / "python"
    program.write_text("#!/bin/sh\necho gpu=$CUDA_VISIBLE_DEVICES\n")
    program.chmod(0o755)
    env = {"CUDA_VISIBLE_DEVICES": "1,2"}
    works = [Work(f"w{number}", ("sample", "spec.json"), log, env, str(program), gpus=1) for number in range(2)]
    engine = Local(ExecutionConfig(), Store(tmp_path / "store"), print)
    handles = [engine.start(work) for work in works]
    with pytest.raises(ConfigError, match="ask for 3 GPUs or more at once, and this machine shows 2"):
        engine.start(works[0])
    deadline = time.monotonic() + 30
    while any(not handle.has_ended() for handle in handles):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sorted(log.read_text().split()) == ["gpu=1", "gpu=2"]


def test_nvidia_smi_tells_numbers_and_uuids(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-7f00-aa'\necho '1, GPU-7f11-bb'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_uuids() == {"0": "GPU-7f00-aa", "1": "GPU-7f11-bb"} and visible_gpus() == ["0", "1"]


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch, store, inputs):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with (
        pytest.raises(ConfigError, match=r"4 GPUs are asked for, and \S+ shows 2 \(CUDA_VISIBLE_DEVICES=0,1\): lower"),
        some_gpus(4, print),
    ):
        pass
    with pytest.raises(ConfigError, match=r"ask for 3 GPUs or more at once, and this machine shows 2"):
        build("sample", sampling(), inputs, store, execution=workers(3, gpus={"sample": 1}))
