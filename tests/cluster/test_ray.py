"""The profile ray: sharded sampling and weights on a Ray cluster of two machines.

Strategy: two network namespaces, `ray start --head` in one, a second node in the other; `build` as every flow calls it.
Needs an interpreter with ray (SELFPLAY_RAY_PYTHON, or this one): it is no dependency of the project, so the test is
skipped where it is not.
"""

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_contracts.checkpoint import external_model
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from stages.running.history import events
from stages.sampling.stage import SamplingConfig
from stages.weighting.stage import WeightingConfig
from tasks.build import build
from tasks.execution.config import ExecutionConfig

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SELFPLAY_RAY_PYTHON") or (sys.executable if importlib.util.find_spec("ray") else None)
RUN = """
import json, sys
from data_contracts.artifact import ArtifactRef
from data_contracts.store import Store
from stages.stage import STAGES
from tasks.build import build
from tasks.execution.config import ExecutionConfig

request = json.loads(sys.argv[1])
for stage, config, inputs in request["stages"]:
    built = build(stage, STAGES[stage].parse(config), {name: ArtifactRef.model_validate(ref) for name, ref in inputs.items()}, Store(request["store"]),
                  lambda line: print(line, flush=True), execution=ExecutionConfig.model_validate(request["execution"]))
    print(json.dumps({"key": built.ref.key, "content": built.ref.content}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    PYTHON is None, reason="no interpreter with ray: pip install ray somewhere and set SELFPLAY_RAY_PYTHON to it"
)
def test_two_machines_share_sampling_and_weights(
    nodes, tmp_path, flaky, make_prompts, make_artifact, make_pair, tiny_model, shared_work
):
    flaky({}, pause="5.0")
    store, policy = Store(tmp_path / "store"), external_model(tiny_model)
    sample = {"backend": {"name": "flaky"}, "num_candidates": 2, "max_new_tokens": 6, "max_prompt_tokens": 64}
    sample["runtime"] = {"prompts_per_shard": 1, "device": "cpu"}
    weigh = {"dtype": "float32", "runtime": {"pairs_per_shard": 1, "device": "cpu"}}

    def stages(store: Store) -> list[tuple[str, Config, dict]]:
        pairs = make_artifact(store, "scored_pairs", [make_pair(number) for number in range(6)])
        return [
            ("sample", SamplingConfig.model_validate(sample), {"prompts": make_prompts(store, 12), "policy": policy}),
            ("weigh", WeightingConfig.model_validate(weigh), {"pairs": pairs, "reference": policy}),
        ]

    environment = {
        "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {name: os.environ[name] for name in ("FLAKY", "FLAKY_LOG", "FLAKY_PAUSE")}
    ray = [
        PYTHON,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--num-cpus=2",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]
    head = [
        "--head",
        f"--node-ip-address={nodes.addresses[0]}",
        "--port=6379",
        "--include-dashboard=false",
        f"--temp-dir=/tmp/spray{os.getpid()}",
    ]
    nodes.litter.append(Path(f"/tmp/spray{os.getpid()}"))
    nodes.start(0, [*ray, *head], tmp_path / "head.log", **environment)
    nodes.start(
        1,
        [*ray, f"--address={nodes.addresses[0]}:6379", f"--node-ip-address={nodes.addresses[1]}"],
        tmp_path / "second.log",
        **environment,
    )
    wait = f"import ray, time\nray.init('{nodes.addresses[0]}:6379', log_to_driver=False)\nwhile sum(n['Alive'] for n in ray.nodes()) < 2: time.sleep(0.5)"
    for _ in range(30):
        if nodes.start(0, [PYTHON, "-c", wait], tmp_path / "wait.log", **environment).wait(120) == 0:
            break
    else:
        raise AssertionError((tmp_path / "head.log").read_text()[-2000:] + (tmp_path / "wait.log").read_text()[-2000:])
    request = {
        "store": str(store.root),
        "stages": [
            (stage, config.model_dump(mode="json"), {name: ref.model_dump() for name, ref in inputs.items()})
            for stage, config, inputs in stages(store)
        ],
        "execution": {"profile": "ray", "address": f"{nodes.addresses[0]}:6379", "workers": {"sample": 4, "weigh": 4}},
    }
    run = nodes.start(0, [PYTHON, "-c", RUN, json.dumps(request)], tmp_path / "run.log", **environment)
    assert run.wait(900) == 0, (tmp_path / "run.log").read_text()[-3000:]
    made = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith('{"key"')]

    begun = [json.loads(line) for line in Path(os.environ["FLAKY_LOG"]).read_text().splitlines()]
    assert {line["node"] for line in begun} == {"0", "1"}
    assert Counter(prompt for line in begun for prompt in line["prompts"]) == Counter(
        f"p{number:03d}" for number in range(12)
    )
    passes = [
        event["index"]
        for event in events(store.directory("weighted_pairs", made[1]["key"]))
        if event["event"] == "pass"
    ]
    assert sorted(passes) == list(range(6))

    more = request | {"execution": request["execution"] | {"gpus": {"sample": 4}}}
    more["stages"] = [
        (stage, settings | {"num_candidates": 3}, inputs) for stage, settings, inputs in request["stages"][:1]
    ]
    refused = nodes.start(0, [PYTHON, "-c", RUN, json.dumps(more)], tmp_path / "refused.log", **environment)
    assert refused.wait(300) != 0
    assert (
        "asks for 4 GPUs on a node; the largest node of the Ray cluster has 0" in (tmp_path / "refused.log").read_text()
    )

    alone = Store(tmp_path / "alone")
    for result, (stage, config, inputs) in zip(made, stages(alone), strict=True):
        record = shared_work.sign(stage, config, inputs, alone)
        assert (record.key, record.content) == (result["key"], result["content"])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_without_ray_the_profile_says_what_to_install(store, make_prompts, tiny_model):
    config = SamplingConfig.model_validate({"backend": {"name": "canned"}})
    with pytest.raises(
        ConfigError, match="execution.profile is ray, and this interpreter has no ray: pip install ray, on every node"
    ):
        build(
            "sample",
            config,
            {"prompts": make_prompts(store, 2), "policy": external_model(tiny_model)},
            store,
            execution=ExecutionConfig(profile="ray"),
        )
