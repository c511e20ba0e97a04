"""Talking to a trained model: through a pipe, beside the start model, with the run's own sampling; and how a run ends."""

import io
import sys

import pytest

from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.cli import chat
from flows.cli.commands import main
from flows.cli.finished import measured_policies
from flows.cli.play import WIDTH, last_lines, tables_of
from flows.config import load_run
from flows.forecast.rehearsal import rehearse
from stages.sampling.base import Prompt


def test_prompts_of_a_pipe_are_answered_by_the_start_model_and_the_last_iterations(undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say a word.\n\n" + "long " * 100 + "\nSay a word.\n"))
    assert main(["chat", "tiny", "--store", str(undisturbed.store)]) == 0
    shown = capsys.readouterr()
    blocks = shown.out.strip("\n").split("\n> ")
    assert len(blocks) == 2 and blocks[0].startswith("> Say a word.\n")  # blank lines are no prompts
    for block in blocks:
        assert "\nstart model: " in block and "\niteration 2: " in block
    assert blocks[0].removeprefix("> ") != blocks[1]  # asked again, another answer
    assert "iteration 2 of tiny" in shown.err and "tokens, and the run allows 1 to 64" in shown.err


def test_a_speaker_answers_as_the_run_sampled(undisturbed, monkeypatch):
    """The held-out answers of the run, drawn again with their own seeds: token for token."""
    run, store = load_run(undisturbed.config), Store(undisturbed.store)
    policies = measured_policies(store, "tiny")
    assert policies == rehearse(run, store).policies()
    speaker = chat.Speaker("it", policies[1], run.sampling_for_heldout())
    rows = read_shards(undisturbed.store / "runs/tiny/iter_01/heldout_generations", "generations").to_pylist()[:2]
    answers = speaker.sampler.generate([Prompt(row["prompt_id"], row["prompt_ids"], [row["seed"]]) for row in rows])
    assert [answer.token_ids for [answer] in answers] == [row["token_ids"] for row in rows]


def test_a_run_that_has_trained_nothing_and_a_wrong_iteration_are_refused(undisturbed, tmp_path, capsys):
    assert main(["chat", "tiny", "--store", str(undisturbed.store), "--iteration", "5"]) == 2
    assert "--iteration is 5; trained and measured: 1, 2" in capsys.readouterr().err
    assert main(["chat", str(undisturbed.config), "--store", str(tmp_path)]) == 2
    assert "has no trained model yet" in capsys.readouterr().err


def test_version_names_the_program(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("selfplay-pipeline 0.")


# --- the end of a run


@pytest.mark.parametrize("benchmarks", [0, 1, 7])
def test_the_tables_at_a_runs_end_fit_into_80_columns_and_hold_every_number(benchmarks):
    rows = [
        {"iteration": iteration, "heldout_score": 0.5421, "low": 0.1, "high": 0.9, "mean_tokens": 123.4}
        | {"finished": 0.61, "start_logp": -1.291, "distinct": 1.0}
        | {f"a_benchmark_{number}/acc_norm": 0.111 + number for number in range(benchmarks)}
        | {f"{stage} s": 12345.6 for stage in ("sample", "score", "weigh", "train", "evaluate")}
        for iteration in range(12)
    ]
    rows[3] |= {"heldout_score": None, "low": None, "high": None}
    text = "\n\n".join(tables_of("tiny", rows))
    assert max(map(len, text.splitlines())) <= WIDTH == 80
    assert text.startswith("self-play run tiny\n") and "unscored" in text
    for row in rows:
        assert all(str(value) in text for value in row.values() if value is not None)


def test_the_last_lines_say_where_the_model_is_and_how_to_talk_to_it(undisturbed):
    lines = undisturbed.first.out.splitlines()
    assert f"talk to it:    selfplay chat tiny --store {undisturbed.store}" in lines
    (path,) = (line.split()[-1] for line in lines if line.startswith("trained model: "))
    assert (undisturbed.store / "runs/tiny/iter_02/train").samefile(path)
    result = {"report": "r", "final": "f"}
    assert last_lines("tiny", result, None)[-1] == "talk to it:    selfplay chat tiny"
    assert last_lines("tiny", result, "/a b")[-1] == "talk to it:    selfplay chat tiny --store '/a b'"
