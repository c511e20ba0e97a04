"""Numbers that go wrong: training stops, names the rows, signs nothing and keeps what is needed to see it again.

Strategy: a learning rate that throws the tiny model's weights away in one step, through the real command; then the batch is replayed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.shards import SCHEMAS, read_shards
from stages.training.bad_step import BATCH, MOST_NATS, what_is_wrong
from stages.training.replay import main

ROOT = Path(__file__).resolve().parents[3]


def pair(number: int) -> dict:
    row = dict.fromkeys(SCHEMAS["weighted_pairs"].names) | {
        "pair_id": f"p{number}/0-1", "prompt_id": f"p{number}", "prompt_ids": [5, 6, 7 + number], "win_rate_chosen": 0.9, "win_rate_rejected": 0.1,
    }  # fmt: skip
    for side, ids in (("chosen", [9, 10 + number, 1]), ("rejected", [20 + number, 30])):
        row |= {f"{side}_ids": ids, f"{side}_candidate": 0}
        row |= {f"{side}_{name}": [value] * len(ids) for name, value in (("weights", 1.0), ("reference_logps", -5.0))}
    return row


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny_model, make_artifact, run_stage_command):
    """(what the command said, the saved batch)."""
    from data_contracts.store import Store

    store = Store(tmp_path_factory.mktemp("failed") / "store")
    pairs = make_artifact(store, "weighted_pairs", [pair(number) for number in range(6)])
    config = {
        "method": {"name": "sppo", "eta": 20}, "learning_rate": 1e30, "batch_size": 2, "dtype": "float32", "max_grad_norm": 0, "warmup_ratio": 0,
        "runtime": {"device": "cpu", "save_every_steps": 1},
    }  # fmt: skip
    done = run_stage_command("train", config, {"pairs": pairs, "policy": tiny_model}, store)
    batches = list(store.root.glob("artifacts/checkpoint/*/.failed/step-*"))
    assert len(batches) == 1, done.stdout + done.stderr
    return done, batches[0]


def test_training_stops_with_the_rows_and_signs_nothing(failed):
    done, batch = failed
    assert done.returncode == 3
    names = json.loads((batch / BATCH).read_text())["pair_ids"]
    assert (
        "ContractError: step 2: loss 147.9" in done.stderr
        and ", grad norm nan; " in done.stderr
        and f"its rows: {', '.join(names)}. Nothing was signed." in done.stderr
    )
    assert f"python -m stages.training.replay {batch}" in done.stderr
    assert [row["pair_id"] for row in read_shards(batch, "weighted_pairs").to_pylist()] == names and len(names) == 2
    assert not (batch.parents[1] / "record.json").exists()


def test_the_batch_goes_wrong_again_when_it_is_replayed(failed):
    _, batch = failed
    done = subprocess.run(
        [sys.executable, "-m", "stages.training.replay", str(batch)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = json.loads((batch / BATCH).read_text())["pair_ids"]
    assert "step 2, from a policy after 1 steps" in done.stdout and ", grad norm nan" in done.stdout
    assert all(f"  {name}: 147.9" in done.stdout for name in names)


def test_a_directory_without_a_batch_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no batch to replay" in capsys.readouterr().err
    (tmp_path / BATCH).write_text("[]")
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2


@pytest.mark.parametrize(
    ("metrics", "wrong"),
    [
        ({"loss": 0.5, "grad_norm": 1.0}, ""),
        ({"loss": float("nan"), "grad_norm": 1.0}, "loss nan"),
        ({"loss": 0.5, "grad_norm": float("inf")}, "loss 0.5, grad norm inf"),
        ({"loss": 0.5, "rewards/chosen": float("-inf")}, "loss 0.5, rewards/chosen -inf"),
        # Two rows of ten tokens in all: 5 * 60 nats each, against 5 * 40.
        (
            {"loss": 0.5, "logps/chosen": -300.0, "tokens": 10.0},
            "log-probs of -60 nats per token: the log-ratios explode",
        ),
        ({"loss": 0.5, "logps/chosen": -200.0, "tokens": 10.0}, ""),
    ],
)
def test_what_counts_as_wrong(metrics, wrong):
    assert MOST_NATS == 50.0 and what_is_wrong(metrics, 2) == wrong
