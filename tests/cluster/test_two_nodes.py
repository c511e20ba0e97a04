"""Two machines: training whose ranks meet over a wire, and what happens when they do not.

Strategy: the machines are network namespaces with addresses of their own (root is needed; skipped elsewhere); the file
system is shared, as the store is on a cluster. The measure is the same training on one machine: metrics.jsonl step by
step.
"""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_contracts.checkpoint import external_model
from data_contracts.errors import ConfigError, ContractError, StageError, TransientError
from data_contracts.shards import SCHEMAS
from data_contracts.store import Store
from stages.running import rendezvous
from stages.running.history import events
from stages.stage import STAGES
from stages.training.config import TrainingConfig
from stages.training.launch import error_of
from stages.training.stage import take_part
from tasks.execution.remote import at_fault
from tests.conftest import tries_of


def pairs(count: int) -> list[dict]:
    """Random weighted pairs of different lengths."""
    random = np.random.default_rng(7)
    rows = []
    for number in range(count):
        prompt, chosen, rejected = (random.integers(5, 320, random.integers(2, most)).tolist() for most in (14, 12, 9))
        row = dict.fromkeys(SCHEMAS["weighted_pairs"].names)
        row |= {
            "pair_id": f"q{number}",
            "prompt_id": f"p{number}",
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
        }
        row |= {"win_rate_chosen": 0.9, "win_rate_rejected": 0.1, "chosen_candidate": 0, "rejected_candidate": 1}
        for side, ids in (("chosen", chosen), ("rejected", rejected)):
            row |= {
                f"{side}_weights": [1.0] * len(ids),
                f"{side}_reference_logps": (-random.uniform(3, 7, len(ids))).tolist(),
            }
        rows.append(row)
    return rows


def settings(processes: int, nodes: int, zero: int = 0) -> dict:
    runtime = {
        "device": "cpu",
        "num_processes": processes,
        "num_nodes": nodes,
        "zero_stage": zero,
        "save_every_steps": 2,
    }
    runtime |= {"collective_timeout_seconds": 120}
    return {
        "method": {"name": "sppo", "eta": 5},
        "learning_rate": 1e-3,
        "batch_size": 6,
        "epochs": 2,
        "dtype": "float32",
        "runtime": runtime,
    }


def spec(directory: Path, make_artifact, tiny_model, config: dict) -> tuple[Store, Path, Path]:
    """A store with pairs, the spec of a training on them, and where its artifact will be."""
    store = Store(directory / "store")
    inputs = {"pairs": make_artifact(store, "weighted_pairs", pairs(18)), "policy": external_model(tiny_model)}
    path = directory / "spec.json"
    path.write_text(
        json.dumps(
            {
                "config": config,
                "inputs": {name: ref.model_dump() for name, ref in inputs.items()},
                "store": str(store.root),
            }
        )
    )
    return (
        store,
        path,
        store.directory("checkpoint", STAGES["train"].key(TrainingConfig.model_validate(config), inputs)),
    )


def steps(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def on_both(nodes, path: Path) -> list:
    """The same command on both nodes; the processes, by node."""
    command = [sys.executable, "-m", "stages", "train", str(path)]
    variables = {"SELFPLAY_RENDEZVOUS": "today", "DS_ACCELERATOR": "cpu"}
    return [
        nodes.start(node, command, path.with_name(f"{node}.log"), SELFPLAY_NODE_RANK=str(node), **variables)
        for node in (0, 1)
    ]


def ends(ranks: list, path: Path) -> list[int]:
    """Exit codes; what was said, where one is not 0."""
    codes = [rank.wait(300) for rank in ranks]
    if any(codes):
        print("\n".join(path.with_name(f"{node}.log").read_text()[-3000:] for node in (0, 1)))
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_two_nodes_train_like_one_node_with_two_ranks(
    nodes, tmp_path, make_artifact, tiny_model, run_stage_command, zero
):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    _, path, alone = spec(tmp_path / "one", make_artifact, tiny_model, settings(2, 1, zero))
    first = nodes.start(0, [sys.executable, "-m", "stages", "train", str(path)], tmp_path / "one.log")
    assert first.wait(300) == 0, (tmp_path / "one.log").read_text()[-3000:]

    store, path, directory = spec(tmp_path / "two", make_artifact, tiny_model, settings(1, 2, zero))
    assert directory.name == alone.name  # nodes and ranks are no part of the key
    assert ends(on_both(nodes, path), path) == [0, 0]
    assert json.loads((directory / ".meeting-today.json").read_text())["address"] == nodes.addresses[0]
    for mine, theirs in zip(steps(directory), steps(alone), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-6), (mine["step"], name)
    assert len(steps(directory)) == 6
    record = store.load("checkpoint", directory.name)
    assert record.facts["world_size"] == 2
    from safetensors.torch import load_file

    weights, reference = (load_file(path / "model.safetensors") for path in (directory, alone))
    for name, tensor in reference.items():
        np.testing.assert_allclose(weights[name].numpy(), tensor.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "dies"), [(0, 1), (2, 0)])
def test_a_node_that_dies_in_mid_training_costs_the_steps_since_the_last_checkpoint(
    nodes, tmp_path, make_artifact, tiny_model, zero, dies
):
    """Its plug is pulled; the other one ends by itself; the same command on both ends with the very same weights."""
    config, last = settings(1, 2, zero) | {"epochs": 12}, 36
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    _, path, calm = spec(tmp_path / "calm", make_artifact, tiny_model, config)
    assert ends(on_both(nodes, path), path) == [0, 0]

    store, path, directory = spec(tmp_path / "killed", make_artifact, tiny_model, config)
    ranks, deadline = on_both(nodes, path), time.monotonic() + 240
    while not any(event["event"] == "step" and event["index"] >= 5 for event in events(directory)):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), ends(ranks, path)
        time.sleep(0.005)
    nodes.kill_node(dies)
    codes = ends(ranks, path)
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies] == TransientError.exit_code  # the pipeline would try again by itself
    assert store.find("checkpoint", directory.name) is None
    saved = int(json.loads((directory / "resume" / "latest").read_text())["tag"].removeprefix("step"))
    assert 4 <= saved < last

    assert ends(on_both(nodes, path), path) == [0, 0]
    tries = tries_of(directory, "step")
    assert len(tries) == 2 and tries[1] == list(range(saved + 1, last + 1))
    assert [step["loss"] for step in steps(directory)] == [step["loss"] for step in steps(calm)]
    assert (directory / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    record = store.load("checkpoint", directory.name)
    assert (
        not store.problems(record, deep=True)
        and record.provenance["starts"] == 2
        and not (directory / "resume").exists()
    )


def test_the_node_is_known_from_the_engine_or_a_hostfile(tmp_path, monkeypatch):
    for name in (*rendezvous.RANKS, "SELFPLAY_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    assert rendezvous.node_rank({}) == 0
    assert rendezvous.node_rank({"SLURM_NODEID": "3"}) == 3
    assert rendezvous.node_rank({"JOB_COMPLETION_INDEX": "1", "SELFPLAY_NODE_RANK": "2"}) == 2
    hosts = tmp_path / "hostfile"
    hosts.write_text("10.0.0.1 slots=8\n# a comment\n10.0.0.2 slots=8\n")
    assert rendezvous.node_rank({"SELFPLAY_HOSTFILE": str(hosts), "SELFPLAY_ADDRESS": "10.0.0.2"}) == 1
    with pytest.raises(ConfigError, match=r"lists 10.0.0.1, 10.0.0.2; this machine is .*put it there once"):
        rendezvous.node_rank({"SELFPLAY_HOSTFILE": str(hosts), "SELFPLAY_ADDRESS": "10.0.0.9"})


def test_a_meeting_of_yesterday_is_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFPLAY_ADDRESS", "10.0.0.1")
    monkeypatch.setenv("SELFPLAY_RENDEZVOUS", "yesterday")
    with rendezvous.announce(tmp_path, 2):
        monkeypatch.setenv("SELFPLAY_RENDEZVOUS", "today")
        with pytest.raises(TransientError, match="the first node has not said within 1 s where to meet"):
            rendezvous.join(tmp_path, wait=1)
    with rendezvous.announce(tmp_path, 2) as meeting:
        assert rendezvous.join(tmp_path) == meeting
        assert meeting.address == "10.0.0.1"


def test_a_meeting_whose_first_node_is_gone_is_not_joined_under_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFPLAY_RENDEZVOUS", "today")
    with rendezvous.announce(tmp_path, 2):
        pass
    assert list(tmp_path.glob(".meeting-*.json"))
    with pytest.raises(TransientError, match="the first node has not said within 1 s where to meet"):
        rendezvous.join(tmp_path, wait=1)
    with rendezvous.announce(tmp_path, 2) as meeting:
        assert rendezvous.join(tmp_path) == meeting


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (75, TransientError),
        (3, ContractError),
        (2, ConfigError),
        (-signal.SIGKILL, TransientError),
        (1, StageError),
        (255, StageError),
    ],
)
def test_what_the_ranks_exit_code_means(code, kind):
    """A process that was killed by signal 9 has the code -9."""
    assert error_of(code) is kind


def test_the_node_at_fault_speaks_for_those_that_it_left_alone():
    lost, broken = TransientError("rank 0 has lost another one"), StageError("step 3: loss nan")
    assert at_fault([lost, None, broken]) is broken
    assert at_fault([None, lost]) is lost
    assert at_fault([None, None]) is None


def test_a_node_too_many_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"this is node 2, and training.runtime.num_nodes is 2"):
        take_part(TrainingConfig.model_validate(settings(1, 2)), tmp_path, 2)
