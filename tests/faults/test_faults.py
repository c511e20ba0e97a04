"""A fixed sample of what `make faults` does (benchmarks/faults.py): struck once, the same command again gives what an undisturbed run gives."""

import pytest

from tests.faults import harness
from tests.faults.harness import Fault, kinds_for, plan, strike, untidy

SAMPLE = [
    ("score", "kill"), ("score", "stop"), ("score", "kill flow"), ("score", "ENOSPC"), ("score", "short write"), ("score", "clock -1 day"),
    ("score", "lost companion"), ("score", "flipped shard"), ("score", "foreign record"), ("score", "garbage in .plan"), ("score", "cut input"),
    ("score", "stale temporary files"), ("weigh", "kill supervisor"), ("weigh", "flipped log-probs"), ("sample", "no memory"),
    ("train", "kill"), ("train", "cut checkpoint to resume from"), ("evaluate", "int flow"), ("score", "moved store"), ("score", "newer record"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "kind"), SAMPLE, ids=[f"{stage}: {kind}" for stage, kind in SAMPLE])
def test_the_same_command_again_gives_what_it_would_have_given(scenes, tmp_path, stage, kind):
    for seed in range(5):  # a point in time may lie behind the end of the build
        verdict = strike(scenes[stage], Fault(stage, kind, seed), tmp_path / "work")
        assert verdict.problems == [], verdict.how
        if verdict.outcome != "not reached":
            return
    raise AssertionError("the fault never struck")


def test_every_kind_of_fault_is_tried_at_every_stage_before_any_comes_again(scenes):
    every = {(name, kind) for name, scene in scenes.items() for kind in kinds_for(scene)}
    assert {(fault.scene, fault.kind) for fault in plan(scenes, len(every))} == every
    assert len(every) > 150 and len(set(plan(scenes, 400))) == 400


def test_the_judge_sees_what_is_wrong(scenes, tmp_path):
    """A harness that cannot say no proves nothing."""
    import shutil

    scene = scenes["score"]
    ended = harness.Ended(0, "".join(f"content {name} {digest}\n" for name, digest in scene.wanted.items()))
    store = tmp_path / "store"
    shutil.copytree(scene.after, store, symlinks=True)
    assert harness.judge(scene, store, ended) == []
    assert harness.judge(scene, store, harness.Ended(1, "")) == ["lost: the same command again ended with 1"]
    assert harness.judge(scene, store, harness.Ended(None, "")) == ["hang: the same command again does not end"]
    assert harness.judge(scene, store, harness.Ended(0, "content score 00"))[0].startswith(
        "other content: score has 00, "
    )
    history = store / "artifacts" / scene.directory / ".events.jsonl"
    text = history.read_text()
    history.write_text(text * 3)
    assert [problem.split(":")[0] for problem in harness.judge(scene, store, ended)] == ["doubled"]
    history.write_text(text)
    (store / "logps").mkdir(exist_ok=True)
    (store / "logps" / ".x.tmp-1").touch()
    (store / "artifacts" / "generations" / "left").mkdir()
    assert untidy(store) == ["litter: logps/.x.tmp-1", "litter: artifacts/generations/left is unfinished"]
    shard = next((store / "artifacts" / scene.directory).glob("part-*"))
    shard.write_bytes(shard.read_bytes()[::-1])
    assert "other content: scored_pairs " + shard.name + " has other content than was signed" in harness.judge(
        scene, store, ended
    )
