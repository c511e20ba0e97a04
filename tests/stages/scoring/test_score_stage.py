"""The score stage around a pair scorer: what it writes, what it asks, what it does after a kill.

Strategy: a plug-in-like scorer that counts what it is asked, put in the place of PairRM's loading; the stage and the
store are real.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_contracts.errors import ContractError
from data_contracts.shards import read_shards
from stages.execute import execute
from stages.running.history import events
from stages.scoring.pairrm import PairRM
from stages.scoring.stage import ScoringConfig, check_every_prompt_counts
from stages.stage import STAGES


class Tokenizer:
    def source(self, text):
        return [0]

    def candidate(self, text, source_length):
        return [len(text)]


class Ranker:
    """The longer text wins, and whoever comes first has 0.5 on top; asked: every pair it saw."""

    tokenizer = Tokenizer()

    def __init__(self):
        self.asked, self.fail_after = [], None

    def logits(self, pairs):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += [(first[0], second[0]) for _, first, second in pairs]
        return [first[0] - second[0] + 0.5 for _, first, second in pairs]


@pytest.fixture
def ranker(monkeypatch):
    made = Ranker()
    monkeypatch.setattr(PairRM, "load", lambda self: made)
    return made


def generations_of(prompts, texts_of):
    return [
        {
            "prompt_id": prompt["prompt_id"],
            "candidate": k,
            "prompt_ids": [5, 6],
            "token_ids": list(range(1, 1 + len(text))),
            "token_logps": [-1.0] * len(text),
            "finish_reason": "stop",
            "seed": k,
            "completion": text,
        }
        for number, prompt in enumerate(prompts)
        for k, text in enumerate(texts_of(number))
    ]


@pytest.fixture
def score(store, make_rows, make_prompts, make_artifact, checkpoints):
    def run(texts_of, prompts=4, **settings):
        rows = make_rows(prompts)
        inputs = {
            "prompts": make_prompts(store, rows),
            "generations": make_artifact(store, "generations", generations_of(rows, texts_of)),
        }
        settings = {
            "scorer": {"name": "pairrm", "model": {"path": str(checkpoints["hf"])}},
            "runtime": {"prompts_per_shard": 2},
        } | settings
        record = execute(STAGES["score"], ScoringConfig.model_validate(settings), inputs, store)
        return record, store.directory(record.kind, record.key)

    return run


def test_raw_logits_are_kept_and_preferences_derived(score, ranker):
    record, out = score(lambda number: ["aaaa", "b", "cc"])
    raw = read_shards(out, "scores", "scores").to_pylist()
    expected = np.subtract.outer([4, 1, 2], [4, 1, 2]) + 0.5 * (1 - np.eye(3))
    assert len(raw) == 4 and all(
        np.array(row["preference_logits"]).reshape(3, 3) == pytest.approx(expected) for row in raw
    )
    pair = read_shards(out, "scored_pairs").to_pylist()[0]
    assert (pair["chosen"], pair["rejected"], pair["scorer"]) == ("aaaa", "b", "pairrm")
    # Both orders: the bias of 0.5 cancels, s = 4 - 1, 4 - 2.
    assert pair["win_rate_chosen"] == pytest.approx((0.5 + 1 / (1 + np.exp(-3)) + 1 / (1 + np.exp(-2))) / 3)
    assert pair["score_chosen"] == pytest.approx(5 / 3) and pair["group_scores"] == pytest.approx(
        [5 / 3, -4 / 3, -1 / 3]
    )
    assert (
        record.metrics["pairwise/position_bias"] == pytest.approx(0.5)
        and record.metrics["pairwise/cyclic_triples"] == 0
    )
    told = [event for event in events(out) if event["event"] == "scored"]
    assert [event["index"] for event in told] == [0, 1] and all(event["comparisons"] == 12 for event in told)
    assert told[0]["position_bias"] == pytest.approx(0.5) and told[0]["comparisons_per_second"] > 0


def test_progress_counts_comparisons_and_goes_on_where_an_earlier_try_stopped(score, ranker, capsys):
    def told():
        lines = [
            json.loads(line.split(" ", 1)[1])
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("@progress")
        ]
        assert {(line["unit"], line["total"]) for line in lines} == {("comparisons", 24)}
        return [line["done"] for line in lines]

    ranker.fail_after = 12  # the first shard of two prompts
    with pytest.raises(KeyboardInterrupt):
        score(lambda number: ["aaaa", "b", "cc"])
    assert told()[-1] == 12
    ranker.fail_after = None
    record, _ = score(lambda number: ["aaaa", "b", "cc"])
    done = told()
    assert done[0] == 12 and done[-1] == 24 and done == sorted(done)
    assert record.metrics["comparisons_per_second"] > 0


def test_equal_completions_are_compared_once_and_tie(score, ranker):
    _, out = score(lambda number: ["aaaa", "b", "aaaa", "b", "aaaa"], prompts=1)
    assert sorted(ranker.asked) == [(1, 4), (4, 1)]
    logits = np.array(read_shards(out, "scores", "scores").to_pylist()[0]["preference_logits"]).reshape(5, 5)
    assert (
        logits[0, 2] == logits[2, 4] == logits[1, 3] == 0
        and logits[0, 1] == logits[4, 3] == 3.5
        and logits[1, 0] == -2.5
    )


def test_prompts_of_equal_answers_are_dropped_and_counted(score, ranker):
    record, out = score(lambda number: ["same"] * 3 if number == 1 else ["one", "other"])
    assert [row["prompt_id"] for row in read_shards(out, "dropped", "dropped").to_pylist()] == ["p001"]
    assert record.metrics["dropped/all candidates are equally good"] == 1 and record.metrics["pairs"] == 3


def test_candidates_in_different_numbers_and_empty_ones(score, ranker):
    _, out = score(lambda number: [["lone"], ["a", ""], ["a", "bb", "ccc"], ["", "", "x", "yy"]][number])
    raw = read_shards(out, "scores", "scores").to_pylist()
    assert [len(row["preference_logits"]) for row in raw] == [1, 4, 9, 16]
    assert [row["reason"] for row in read_shards(out, "dropped", "dropped").to_pylist()] == [
        "fewer than two candidates could be scored"
    ]


def test_nothing_is_lost_and_nothing_scored_twice_after_a_kill(score, ranker, store):
    texts = lambda number: [f"{'x' * (number + 1)}", f"{'y' * (number + 3)}"]  # noqa: E731
    ranker.fail_after = 4  # the first shard of two prompts
    with pytest.raises(KeyboardInterrupt):
        score(texts)
    ranker.fail_after = None
    record, out = score(texts)
    assert len(ranker.asked) == 8 == len(set(ranker.asked))
    assert len(read_shards(out, "scores", "scores")) == 4 and record.metrics["pairs"] == 4


def test_the_derivation_is_a_setting_and_part_of_the_key_only_when_it_is_set(score, ranker, store):
    plain, _ = score(lambda number: ["aaaa", "b", "cc"])
    same, _ = score(lambda number: ["aaaa", "b", "cc"], preference="both_orders", seed=0)
    released, out = score(lambda number: ["aaaa", "b", "cc"], preference="sppo_release")
    assert plain.key == same.key != released.key
    assert "preference" not in ScoringConfig().identity() and "min_preference" not in ScoringConfig().identity()
    pair = read_shards(out, "scored_pairs").to_pylist()[0]
    # r = mean_j (L_ij - L_ji) = 10/3, -8/3, -2/3, and P = sigmoid of their differences: twice as wide.
    assert pair["score_chosen"] == pytest.approx(10 / 3)
    assert pair["win_rate_chosen"] == pytest.approx((0.5 + 1 / (1 + np.exp(-6)) + 1 / (1 + np.exp(-4))) / 3)


@pytest.mark.parametrize(
    ("pairing", "count"), [("random_pair", 1), ("all_pairs", 3), ("best_vs_worst", 1), ("each", 3)]
)
def test_every_pairing_gives_its_rows(score, ranker, pairing, count):
    _, out = score(lambda number: ["aaaa", "b", "cc"], pairing=pairing)
    rows = read_shards(out, "scored_pairs").to_pylist()
    assert len(rows) == 4 * count and len({row["pair_id"] for row in rows}) == len(rows)


def test_a_scorer_that_could_compare_nothing_stops_the_stage_with_the_reasons(score, ranker, monkeypatch):
    monkeypatch.setattr(Ranker, "logits", lambda self, pairs: [float("nan")] * len(pairs))
    with pytest.raises(ContractError, match="fewer than two candidates could be scored"):
        score(lambda number: ["a", "bb"])


def test_another_python_writes_the_same_contract(
    run_stage_command, store, make_rows, make_prompts, make_artifact, checkpoints
):
    """The stage as a process: the tiny checkpoint, from settings in JSON."""
    rows = make_rows(2)
    inputs = {
        "prompts": make_prompts(store, rows),
        "generations": make_artifact(
            store, "generations", generations_of(rows, lambda number: ["the sea", "a fox", "no"])
        ),
    }
    config = {"scorer": {"name": "pairrm", "model": {"path": str(checkpoints["ranker"])}}}
    done = run_stage_command("score", config, inputs, store)
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = [json.loads(path.read_text()) for path in store.root.glob("artifacts/scored_pairs/*/record.json")]
    assert record["metrics"]["pairs"] == 2 and "comparisons_per_second" in done.stdout
    shutil.rmtree(store.root / "artifacts" / "scored_pairs")


@pytest.mark.slow
def test_llm_blender_itself_writes_the_same_logits(
    make_rows, store, make_prompts, make_artifact, checkpoints, outside_package
):
    """In its own environment, by `runtime.python`'s way: another interpreter runs the same command."""
    python = Path(
        os.environ.get("SELFPLAY_ORACLE") or Path(__file__).resolve().parents[3] / ".venv-oracle" / "bin" / "python"
    )
    if not python.is_file():
        pytest.skip("`make oracle` makes the environment; SELFPLAY_ORACLE names its python")
    source = (Path(__file__).resolve().parents[2] / "oracle" / "llm_blender_scorer.py").read_text()
    outside_package("oracle_scorer", source, {"selfplay.scorers": {"llm_blender": "oracle_scorer:LLMBlender"}})
    rows = make_rows(2)
    texts = lambda number: ["the sea", "a fox", "no", "a fox"]  # noqa: E731
    inputs = {
        "prompts": make_prompts(store, rows),
        "generations": make_artifact(store, "generations", generations_of(rows, texts)),
    }
    found = {}
    for name, interpreter in (("pairrm", sys.executable), ("llm_blender", str(python))):
        spec = store.root / f"{name}.json"
        config = {"scorer": {"name": name, "model": {"path": str(checkpoints["ranker"])}}, "runtime": {"device": "cpu"}}
        spec.write_text(
            json.dumps(
                {
                    "config": config,
                    "inputs": {key: ref.model_dump() for key, ref in inputs.items()},
                    "store": str(store.root),
                }
            )
        )
        done = subprocess.run(
            [interpreter, "-m", "stages", "score", str(spec)],
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for path in store.root.glob("artifacts/scored_pairs/*/record.json"):
            if json.loads(path.read_text())["config"]["scorer"]["name"] == name:
                found[name] = [
                    row["preference_logits"] for row in read_shards(path.parent, "scores", "scores").to_pylist()
                ]
    assert np.abs(np.array(found["pairrm"]) - np.array(found["llm_blender"])).max() < 1e-5


@pytest.mark.parametrize(
    ("with_rows", "without", "is_whole"),
    [(["a", "a", "b"], ["c"], True), (["a"], ["c"], False), (["a", "b"], ["b"], False), (["a", "b", "c"], [], True)],
)
def test_every_prompt_has_rows_or_a_reason_to_have_none(with_rows, without, is_whole):
    pairs, dropped = (pa.table({"prompt_id": pa.array(ids, pa.string())}) for ids in (with_rows, without))
    with (
        nullcontext()
        if is_whole
        else pytest.raises(ContractError, match="of 3 in all: some were lost or counted twice")
    ):
        check_every_prompt_counts(pairs, dropped, 3, "key")


def test_responses_are_cut_to_what_the_prompt_leaves_of_the_whole(score, ranker):
    record, out = score(lambda number: ["aaaa", "b", "cc"], max_total_tokens=5)  # prompts have two tokens
    pair = read_shards(out, "scored_pairs").to_pylist()[0]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([1, 2, 3], [1])
    assert record.metrics["mean_tokens/chosen"] == 3
    with pytest.raises(ContractError, match=r"leaves nothing of scoring\.max_total_tokens"):
        score(lambda number: ["aaaa", "b", "cc"], max_total_tokens=2)
    config = ScoringConfig.model_validate({"pairing": "given"})
    assert "max_total_tokens" not in config.identity()
