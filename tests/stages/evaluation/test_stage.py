"""The evaluate stage with a judge: MT-Bench of our own on the tiny model, with a judge that answers, talks, or is away."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_contracts.shards import read_shards
from stages.evaluation.judging import EndpointJudge, ask_all
from stages.evaluation.stage import EvaluationConfig
from stages.scoring.endpoint import Endpoint, EndpointRuntime


@pytest.fixture
def server():
    """A judge that gives every single grade a 7, and nothing that can be read to the maths question."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            text = "no idea" if "180 litres" in request["messages"][-1]["content"] else "Fine. [[7]]"
            top = [{"token": "M", "logprob": -0.1}, {"token": "m", "logprob": -2.0}]
            logprobs = {"content": [{"token": "M", "logprob": -0.1, "top_logprobs": top}]} if request.get("logprobs") else None
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}).encode()
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


@pytest.fixture
def evaluated(store, tiny_model, make_prompts, make_artifact, run_stage_command):
    """evaluated(url) -> rows of eval_report by (task, metric)."""

    def run(url):
        rows = [
            {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 1], "token_logps": [-1.0] * 3,
             "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
            for i in range(3)
        ]  # fmt: skip
        inputs = {"prompts": make_prompts(store, 3), "generations": make_artifact(store, "generations", rows)}
        inputs |= {"policy": tiny_model, "start": tiny_model}
        bench = {"judge": "grader", "backend": {"name": "transformers", "dtype": "float32"}, "max_new_tokens": 8}
        bench["runtime"] = {"base_url": url, "retries": 0, "timeout_seconds": 20}
        config = {"scorer": {"name": "length", "target_tokens": 3}, "dtype": "float32", "mt_bench": bench}
        done = run_stage_command("evaluate", config, inputs, store)
        assert done.returncode == 0, done.stderr[-3000:]
        found = read_shards(done.stdout.strip().splitlines()[-1], "eval_report").to_pylist()
        return {(row["task"], row["metric"]): row for row in found}

    return run


def test_the_policys_answers_are_graded_and_what_could_not_be_read_is_counted(server, evaluated):
    url, requests = server
    found = evaluated(url)
    score, failed = found["mt_bench", "score"], found["mt_bench", "failed_judgments"]
    assert (score["value"], score["n"], score["task_version"]) == (7.0, 14, "grader")
    assert (failed["value"], failed["n"]) == (2.0, 16)
    assert len(requests) == 16
    assert all(request["temperature"] == 0 and request["max_tokens"] == 2048 for request in requests)
    assert ("heldout", "score") in found


def test_a_judge_that_is_away_leaves_the_rest_of_the_report(evaluated):
    found = evaluated("http://127.0.0.1:9/v1")
    assert found["mt_bench", "failed_judgments"]["value"] == 16
    assert ("mt_bench", "score") not in found
    assert ("heldout", "score") in found


def test_best_of_n_and_rouge_are_rows_of_the_heldout_report(store, tiny_model, make_prompts, make_artifact, run_stage_command, make_rows):
    rows = [
        {"prompt_id": f"p{i:03d}", "candidate": k, "prompt_ids": [60, 61], "token_ids": [70, 80, *[90] * k, 1], "token_logps": [-1.0] * (3 + k),
         "finish_reason": "stop", "seed": k, "completion": make_rows(3)[i]["response"] if k == 0 else "quite another text"}
        for i in range(3) for k in range(3)
    ]  # fmt: skip
    inputs = {"prompts": make_prompts(store, 3), "generations": make_artifact(store, "generations", rows)}
    inputs |= {"policy": tiny_model, "start": tiny_model}
    config = {"scorer": {"name": "length", "target_tokens": 3}, "dtype": "float32", "best_of": [1, 3], "rouge_l": True}
    done = run_stage_command("evaluate", config, inputs, store)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["metric"]: row for row in read_shards(done.stdout.strip().splitlines()[-1], "eval_report").to_pylist()}
    assert found["best_of_1"]["value"] == pytest.approx(found["score"]["value"])
    assert found["best_of_3"]["value"] > found["best_of_1"]["value"]
    assert found["rouge_l"]["value"] == pytest.approx(1 / 3)
    refused = run_stage_command("evaluate", config | {"best_of": [4]}, inputs, store)
    assert refused.returncode == 2
    assert "set heldout_sampling.num_candidates" in refused.stderr


def test_an_endpoint_gives_the_alternatives_of_the_first_token(server, tmp_path):
    judge = EndpointJudge("grader", Endpoint(EndpointRuntime(base_url=server[0]), tmp_path))
    asked = [[{"role": "user", "content": "which?"}], [{"role": "user", "content": "which, again?"}]]
    first, _ = ask_all(judge, asked, temperature=0.0, max_tokens=1, top_logprobs=5)
    assert first.top_logprobs == {"M": -0.1, "m": -2.0}
    assert ask_all(judge, asked[:1], temperature=0.0, max_tokens=8)[0].top_logprobs is None


def test_where_the_judge_answers_enters_no_key_and_who_it_is_does():
    def identity(**bench):
        config = {"scorer": {"name": "length"}, "mt_bench": {"judge": "a", **bench}}
        return EvaluationConfig.model_validate(config).identity()

    assert identity() == identity(runtime={"base_url": "http://elsewhere/v1"})
    assert identity() != identity(judge="b")
    assert "mt_bench" not in EvaluationConfig.model_validate({"scorer": {"name": "length"}}).identity()
