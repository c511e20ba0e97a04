"""The evaluate stage on the tiny model, with a judge for MT-Bench, AlpacaEval 2 and Arena-Hard.

The judge answers, answers what cannot be read, or is away.
"""

import json
import math
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_contracts.config import parse
from data_contracts.errors import ConfigError
from data_contracts.shards import read_shards
from stages.evaluation.alpaca_eval import is_swapped, load
from stages.evaluation.judged import check_files
from stages.evaluation.judging import EndpointJudge
from stages.evaluation.stage import EvaluationConfig
from stages.scoring.endpoint import Endpoint, EndpointRuntime


@pytest.fixture
def server():
    """A judge that grades everything 7, but gives the maths question no grade, and prefers the answer shown first."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            body = request["messages"][-1]["content"]
            text = "no idea" if "180 litres" in body else "Fine. [[7]]\nScore: 3"
            text = "So [[A]]" if "two AI assistants" in request["messages"][0]["content"] else text
            text = "[[A>B]]" if "<|User Prompt|>" in body and "mumble" not in body else text
            top = [{"token": "M", "logprob": -0.1}, {"token": "m", "logprob": -2.0}]
            logprobs = (
                {"content": [{"token": "M", "logprob": -0.1, "top_logprobs": top}]} if request.get("logprobs") else None
            )
            body = json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", requests
    http.shutdown()
    http.server_close()


ARENA = (
    "<|User Prompt|>\n{question_1}\n\n<|The Start of Assistant A's Answer|>\n{answer_1}\n"
    "<|The Start of Assistant B's Answer|>\n{answer_2}"
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def benches(tmp_path):
    """Directories with four questions each, as the official files are laid out."""
    alpaca, arena = tmp_path / "alpaca", tmp_path / "arena"
    alpaca.mkdir()
    arena.mkdir()
    words = ["Say hello.", "Count to three.", "Name a tree.", "Please mumble."]
    (alpaca / "clf.txt").write_text("<|im_start|>user\n{instruction}\n{output_1}\n{output_2}\n<|im_end|>")
    answers = ["Yes.", "It is.", "So they say.", "Of course it is."]
    lines(
        alpaca / "baseline.jsonl",
        [{"instruction": text, "output": answer} for text, answer in zip(words, answers, strict=True)],
    )
    lines(arena / "question.jsonl", [{"uid": f"q{i}", "prompt": text} for i, text in enumerate(words)])
    newer = [{"uid": f"q{i}", "messages": [{"role": "assistant", "content": {"answer": "**Yes**."}}]} for i in range(2)]
    older = [{"question_id": f"q{i}", "choices": [{"turns": [{"content": "No."}]}]} for i in range(2, 4)]
    lines(arena / "baseline.jsonl", newer + older)
    (arena / "judge_config.yaml").write_text(json.dumps({"system_prompt": "Judge.", "prompt_template": [ARENA]}))
    return {"alpaca_eval": {"path": str(alpaca)}, "arena_hard": {"path": str(arena)}, "mt_bench": {"baseline": "start"}}


@pytest.fixture
def evaluated(store, tiny_model, make_prompts, make_artifact, run_stage_command):
    """evaluated(url, benchmarks, **config) -> (rows of eval_report by (task, metric), its directory)."""

    def run(url, benchmarks, **config):
        rows = [
            {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 1],
             "token_logps": [-1.0] * 3, "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
            for i in range(3)
        ]  # fmt: skip
        inputs = {"prompts": make_prompts(store, 3), "generations": make_artifact(store, "generations", rows)}
        inputs |= {"policy": tiny_model, "start": tiny_model}
        how = {"judge": "grader", "backend": {"name": "transformers", "dtype": "float32"}, "max_new_tokens": 8}
        how["runtime"] = {"base_url": url, "retries": 0, "timeout_seconds": 20}
        config = {"scorer": {"name": "length", "target_tokens": 3}, "dtype": "float32"} | config
        done = run_stage_command(
            "evaluate", config | {name: how | more for name, more in benchmarks.items()}, inputs, store
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
        directory = Path(done.stdout.strip().splitlines()[-1])
        return {
            (row["task"], row["metric"]): row for row in read_shards(directory, "eval_report").to_pylist()
        }, directory

    return run


def test_all_three_benchmarks_are_judged_and_what_could_not_be_read_is_counted(server, evaluated, benches):
    url, requests = server
    rows, directory = evaluated(url, benches)
    score, failed = rows["mt_bench", "score"], rows["mt_bench", "failed_judgments"]
    assert (score["value"], score["n"], score["task_version"]) == (7.0, 14, "grader")
    assert (failed["value"], failed["n"]) == (2.0, 16)
    # The policy is the start model, and the judge prefers the first answer: a tie in both orders. Where both orders
    # read the same they are one request.
    assert (rows["mt_bench_pairs", "win_rate"]["value"], rows["mt_bench_pairs", "win_rate"]["n"]) == (0.5, 16)
    rate = rows["alpaca_eval", "win_rate"]
    second = math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.0))
    shown_first = [is_swapped(text) for text in ("Say hello.", "Count to three.", "Name a tree.", "Please mumble.")]
    assert rate["value"] == pytest.approx(100 * sum(1 - second if first else second for first in shown_first) / 4)
    assert (rate["n"], rows["alpaca_eval", "length_controlled_win_rate"]["n"]) == (4, 4)
    # Game 1 shows the baseline as A, game 2 the policy: one win each, and the mumbled prompt is in no mean.
    assert (rows["arena_hard", "score"]["value"], rows["arena_hard", "score"]["n"]) == (50.0, 6)
    assert rows["arena_hard", "style_controlled_score"]["n"] == 6
    assert (rows["arena_hard", "failed_judgments"]["value"], rows["arena_hard", "failed_judgments"]["n"]) == (2.0, 8)
    assert ("heldout", "score") in rows
    graded = [request for request in requests if request["messages"][-1]["content"] and request["max_tokens"] == 2048]
    assert len(graded) == 16 + 16  # single and, the two orders being one request, in pairs
    assert all(request["temperature"] == 0 for request in requests)
    answers = [json.loads(line) for line in (directory / "mt_bench_answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and all(len(row["choices"][0]["turns"]) == 2 for row in answers)
    assert {path.name for path in directory.glob("*_answers.jsonl")} == {f"{name}_answers.jsonl" for name in benches}


def test_judges_that_are_away_end_the_stage_and_the_next_try_makes_what_is_missing(server, evaluated, benches, store):
    """The held-out scorer and each benchmark have a judge of their own; none answers, then all do."""

    def scorer(url):
        return {"name": "llm_judge", "model": "m", "runtime": {"base_url": url, "retries": 0}}

    away, (url, requests) = "http://127.0.0.1:9/v1", server
    with pytest.raises(AssertionError, match=f"^75: (.|\n)*TransientError: nobody answers at {away}"):
        evaluated(away, benches, scorer=scorer(away))
    (directory,) = (store.root / "artifacts" / "eval_report").iterdir()
    assert not (directory / "record.json").exists() and not list(directory.glob("part-*"))  # no failure is data
    for name in benches:  # what the policy answered is judged, not asked again
        path = directory / f"{name}_answers.jsonl"
        path.write_text(
            path.read_text().replace('"turns": ["', '"turns": ["kept ').replace('"answer": "', '"answer": "kept ')
        )
    rows, same = evaluated(url, benches, scorer=scorer(url))
    assert same == directory and rows["heldout", "score"]["value"] == 3
    assert {("mt_bench", "score"), ("arena_hard", "score"), ("alpaca_eval", "win_rate")} < rows.keys()
    asked = [message["content"] for request in requests for message in request["messages"]]
    assert sum("kept " in content for content in asked) == 8 * 2 + 8 * 2 * 2 + 4 * 2


@pytest.mark.parametrize(
    ("scorer", "refused"),
    [
        ({"name": "pairrm"}, True),
        ({"name": "llm_judge", "model": "m", "mode": "pairwise"}, True),
        ({"name": "llm_judge", "model": "m"}, False),
        ({"name": "combination", "parts": [{"scorer": {"name": "length"}}, {"scorer": {"name": "pairrm"}}]}, True),
        ({"name": "combination", "parts": [{"scorer": {"name": "length"}}, {"scorer": {"name": "checks"}}]}, False),
    ],
)
def test_a_scorer_that_only_compares_is_sent_to_the_tournament(scorer, refused):
    with pytest.raises(ConfigError, match="only compares two answers.*`tournament`") if refused else nullcontext():
        parse(EvaluationConfig, {"scorer": scorer}, "x")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("alpaca_eval", "more.json", "[]", "must hold exactly one .json or .jsonl file"),
        ("alpaca_eval", "baseline.jsonl", '{"instruction": "x"}', "`output` of row 0 is missing, expected a text"),
        ("alpaca_eval", "clf.txt", "{instruction} {output_1}", "no message between"),
        ("alpaca_eval", "clf.txt", "<|im_start|>user\n{instruction} {output_1}<|im_end|>", "no place for {output_2}"),
        ("alpaca_eval", "df_gamed.csv", "index,preference\n0,1\n", "is not the package's df_gamed.csv"),
        (
            "alpaca_eval",
            "df_gamed.csv",
            "index,preference,std_delta_len,instruction_difficulty\n0,1,0,0\n",
            "no difficulty of 3 of the 4",
        ),
        ("arena_hard", "baseline.jsonl", "", "baseline.jsonl has no rows"),
        ("arena_hard", "judge_config.yaml", "system_prompt: x", "must hold `system_prompt` and `prompt_template`"),
        ("mt_bench", None, "none.jsonl", "cannot read .*none.jsonl"),
    ],
)
def test_broken_files_are_refused_by_name_before_anything_runs(benches, name, file, text, message):
    settings = {"judge": "x"} | benches[name] | ({} if file else {"baseline": text})
    if file:
        Path(settings["path"], file).write_text(text)
    config = EvaluationConfig.model_validate({"scorer": {"name": "length"}, name: settings})
    with pytest.raises(ConfigError, match=message):
        check_files(name, getattr(config, name))


def test_the_packages_file_of_gamed_baselines_is_read(benches):
    path = Path(benches["alpaca_eval"]["path"]) / "df_gamed.csv"
    rows = [f"verbose,{i},0.{i},{i - 1.5},{i * 0.1:.1f},False" for i in range(4)]
    path.write_text(
        "\n".join(["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline", *rows])
    )
    bench = load(path.parent)
    assert bench.difficulty == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert bench.gamed.preferences == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert bench.gamed.scaled_lengths == pytest.approx([-1.5, -0.5, 0.5, 1.5])
    assert load(path.parent, limit=2).gamed is None  # of a part of the instructions the number is nobody's


def test_best_of_n_and_rouge_are_rows_of_the_heldout_report(
    store, tiny_model, make_prompts, make_artifact, run_stage_command, make_rows
):
    rows = [
        {"prompt_id": f"p{i:03d}", "candidate": k, "prompt_ids": [60, 61], "token_ids": [70, 80, *[90] * k, 1],
         "token_logps": [-1.0] * (3 + k), "finish_reason": "stop", "seed": k,
         "completion": make_rows(3)[i]["response"] if k == 0 else "quite another text"}
        for i in range(3) for k in range(3)
    ]  # fmt: skip
    inputs = {"prompts": make_prompts(store, 3), "generations": make_artifact(store, "generations", rows)}
    inputs |= {"policy": tiny_model, "start": tiny_model}
    config = {"scorer": {"name": "length", "target_tokens": 3}, "dtype": "float32", "best_of": [1, 3], "rouge_l": True}
    done = run_stage_command("evaluate", config, inputs, store)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read_shards(done.stdout.strip().splitlines()[-1], "eval_report").to_pylist()
    values = {row["metric"]: row["value"] for row in report}
    assert values["best_of_1"] == pytest.approx(values["score"])
    assert values["best_of_3"] > values["best_of_1"]
    assert values["rouge_l"] == pytest.approx(1 / 3)
    refused = run_stage_command("evaluate", config | {"best_of": [4]}, inputs, store)
    assert refused.returncode == 2
    assert "set heldout_sampling.num_candidates" in refused.stderr


def test_an_endpoint_gives_the_alternatives_of_the_first_token(server, tmp_path):
    judge = EndpointJudge("grader", Endpoint(EndpointRuntime(base_url=server[0]), tmp_path))
    conversations = [[{"role": "user", "content": "which?"}], [{"role": "user", "content": "which, again?"}]]
    first, _ = judge.ask(conversations, temperature=0.0, max_tokens=1, top_logprobs=5)
    assert first.top_logprobs == {"M": -0.1, "m": -2.0}
    assert judge.ask(conversations[:1], temperature=0.0, max_tokens=8)[0].top_logprobs is None


def test_where_the_judge_answers_enters_no_key_and_who_it_is_does():
    def identity(**bench):
        config = {"scorer": {"name": "length"}, "mt_bench": {"judge": "a", **bench}}
        return EvaluationConfig.model_validate(config).identity()

    assert identity() == identity(runtime={"base_url": "http://elsewhere/v1"})
    assert identity() != identity(judge="b")
    assert "mt_bench" not in EvaluationConfig.model_validate({"scorer": {"name": "length"}}).identity()
