"""The LLM judge against servers that behave, ramble, hang, break and lie: what is read, what is refused, what is asked
again.

Strategy: a real HTTP server on 127.0.0.1 whose answer a test supplies as a function of the request; the judge talks to
it as to any endpoint.
"""

import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data_contracts.errors import ConfigError, TransientError
from stages.scoring import SCORERS
from stages.scoring.endpoint import Reply
from stages.scoring.judge import PAIRWISE, RUBRIC, read_letter, read_score


class Server:
    """answer(request) -> text, a dict (the whole body), an int (a status), or bytes (the raw body)."""

    def __init__(self):
        self.answer, self.requests, self.under_way, self.most = None, [], 0, 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(request)
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                try:
                    answer = outer.answer(request)
                finally:
                    with lock:
                        outer.under_way -= 1
                status = answer if isinstance(answer, int) else 200
                if isinstance(answer, int):
                    answer = b"broken"
                if isinstance(answer, str):
                    answer = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the judge gave up waiting

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def judge(server, scoring, tmp_path):
    def make(root=tmp_path / "store", **settings):
        runtime = {"base_url": server.url, "backoff_seconds": 0.01, "retries": 1} | settings.pop("runtime", {})
        return scoring.scorer({"name": "llm_judge", "model": "tiny-judge", "runtime": runtime} | settings, root=root)

    return make


def text_of(request):
    return request["messages"][0]["content"]


def test_the_rubric_gives_each_candidate_its_score(server, judge, scoring):
    server.answer = lambda request: (
        "Fine.\nScore: 4" if "<answer>\ngood" in text_of(request) else "It is wrong.\n**Score:** 1.5/5"
    )
    (scores,) = judge().score([scoring.candidates("why?", ["good", "bad"])])
    assert scores.scores.tolist() == [4.0, 1.5] and scores.preference_logits is None and scores.reasons == ["", ""]
    request = server.requests[0]
    assert (
        request["model"] == "tiny-judge"
        and request["temperature"] == 0
        and "why?" in text_of(request)
        and "sample" not in request
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 3", 3.0),
        ("score : 2.5 ", 2.5),
        ("I thought Score: 1, but no.\nScore: 5", 5.0),
        ("**Score: 0**", 0.0),
        ("Score: 7", "judge's score is out of range"),
        ("Score: 57", "judge's score is out of range"),
        ("Score: -1", "judge's score is out of range"),
        ("I would give it four of five points.", "judge gave no score"),
        ("", "judge gave no score"),
        ("Score: five", "judge gave no score"),
        ("the score is 3", "judge gave no score"),
    ],
)
def test_what_counts_as_a_score(text, expected):
    assert read_score(Reply({"choices": [{"message": {"content": text}}]}, "")) == expected


@pytest.mark.parametrize(
    "body", [{"choices": [{}]}, {"choices": [{"message": {"content": None}}]}, {"choices": [{"message": None}]}]
)
def test_a_reply_without_text_is_no_score(body):
    assert read_score(Reply(body, "")) == "judge gave no score"


def test_samples_are_averaged_over_those_that_can_be_read(server, judge, scoring):
    server.answer = lambda request: {0: "Score: 2", 1: "no idea", 2: "Score: 5"}[request["seed"]]
    made = judge(samples=3, temperature=0.7)
    (scores,) = made.score([scoring.candidates("why?", ["a"])])
    assert scores.scores.tolist() == [3.5] and scores.reasons == [""]
    assert made.metrics()["judge/judge gave no score"] == 1


def test_pairwise_asks_both_orders_and_shows_a_position_bias(server, judge, scoring):
    def answer(request):
        first = text_of(request).split("<answer_a>\n")[1].split("\n")[0]
        second = text_of(request).split("<answer_b>\n")[1].split("\n")[0]
        if {first, second} == {"x", "y"}:
            return "[[A]]"  # whoever comes first
        return "B is better? No: [[A]]" if first == "x" else "[[B]]" if second == "x" else "equal [[ C ]]"

    server.answer = answer
    (scores,) = judge(mode="pairwise").score([scoring.candidates("why?", ["x", "y", "z"])])
    v = math.log(9)
    assert scores.preference_logits == pytest.approx(np.array([[0, v, v], [v, 0, 0], [-v, 0, 0]]))
    assert len(server.requests) == 6


def test_a_comparison_that_failed_is_unscored_and_says_why(server, judge, scoring):
    server.answer = lambda request: "well, well" if "<answer_a>\nx" in text_of(request) else "[[B]]"
    (scores,) = judge(mode="pairwise").score([scoring.candidates("why?", ["x", "y"])])
    assert math.isnan(scores.preference_logits[0, 1]) and scores.preference_logits[1, 0] == -math.log(9)
    assert scores.reasons == ["judge gave no verdict"] * 2


def top(**logps):
    listed = [{"token": token, "logprob": value} for token, value in logps.items()]
    return {
        "choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": listed}]}}]
    }


def test_one_token_judging_reads_the_probabilities(server, judge, scoring):
    server.answer = lambda request: top(A=-0.1, B=-2.5) if "<answer_a>\nx" in text_of(request) else top(A=-3.0, B=-0.05)
    (scores,) = judge(mode="logprob").score([scoring.candidates("why?", ["x", "y"])])
    assert scores.preference_logits == pytest.approx(np.array([[0, 2.4], [-2.95, 0]]))
    assert server.requests[0]["max_tokens"] == 1 and server.requests[0]["logprobs"] is True


def test_spellings_of_a_letter_are_added_and_a_missing_one_is_the_least_listed():
    body = top(**{"A": math.log(0.3), " a": math.log(0.2), "the": math.log(0.1)})
    assert read_letter(Reply(body, "")) == pytest.approx(math.log(0.5) - math.log(0.1))
    assert read_letter(Reply(top(the=-1.0), "")) == "judge named neither A nor B"
    assert (
        read_letter(Reply({"choices": [{"message": {"content": "A"}, "logprobs": None}]}, ""))
        == "judge gave no log-probs"
    )


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        (500, "judge answered 500", 2),
        (429, "judge answered 429", 2),
        (400, "judge answered 400", 1),
        (b"<html>", "judge's answer was damaged", 2),
        ({"choices": []}, "judge's answer was damaged", 2),
    ],
)
def test_a_judge_that_fails_leaves_a_candidate_unscored_with_the_reason(server, judge, scoring, answer, reason, tries):
    server.answer = lambda request: answer if "<answer>\nbad" in text_of(request) else "Score: 2"
    (scores,) = judge().score([scoring.candidates("why?", ["good", "bad"])])
    assert scores.scores[0] == 2 and math.isnan(scores.scores[1]) and scores.reasons == ["", reason]
    assert sum("<answer>\nbad" in text_of(request) for request in server.requests) == tries


def test_a_judge_that_hangs_is_given_up(server, judge, scoring):
    server.answer = lambda request: (
        time.sleep(1.5) or "Score: 5" if "<answer>\nslow" in text_of(request) else "Score: 2"
    )
    (scores,) = judge(runtime={"timeout_seconds": 0.3, "retries": 0}).score(
        [scoring.candidates("why?", ["slow", "fast"])]
    )
    assert math.isnan(scores.scores[0]) and scores.scores[1] == 2 and scores.reasons == ["judge timed out", ""]


def test_a_hiccup_is_retried(server, judge, scoring):
    server.answer = lambda request: 503 if len(server.requests) == 1 else "Score: 3"
    (scores,) = judge().score([scoring.candidates("why?", ["a"])])
    assert scores.scores.tolist() == [3.0] and len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_try_would_cure_stops_the_stage(server, judge, scoring, status):
    server.answer = lambda request: status
    with pytest.raises(ConfigError, match=str(status)):
        judge().score([scoring.candidates("why?", ["a"])])


def test_nobody_there_is_worth_another_try_later(scoring, judge):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = judge(runtime={"base_url": f"http://127.0.0.1:{port}/v1", "retries": 0})
    with pytest.raises(TransientError, match="nobody answers"):
        made.score([scoring.candidates("why?", ["a", "b"])])


def test_a_judgement_is_paid_once_also_by_the_next_process(server, judge, scoring, tmp_path):
    server.answer = lambda request: 500 if "<answer>\nbad" in text_of(request) else "Score: 4"
    judge(runtime={"retries": 0}).score([scoring.candidates("why?", ["good", "bad"])])
    server.answer = lambda request: "Score: 1"
    again = judge(runtime={"num_parallel": 1})
    (scores,) = again.score([scoring.candidates("why?", ["good", "bad"])])
    assert scores.scores.tolist() == [4.0, 1.0]  # the failure was asked again, the judgement was not
    assert len(server.requests) == 3 and again.metrics()["judge/cached"] == 1
    for path in (tmp_path / "store" / "judgements").rglob("*.json"):
        path.write_text("{")
    judge().score([scoring.candidates("why?", ["good"])])
    assert len(server.requests) == 4  # a damaged entry is asked again


def test_no_more_requests_at_once_than_allowed(server, judge, scoring):
    server.answer = lambda request: time.sleep(0.05) or "Score: 3"
    judge(runtime={"num_parallel": 3}).score([scoring.candidates("why?", [f"answer {k}" for k in range(12)])])
    assert server.most <= 3 and len(server.requests) == 12


def test_the_address_is_no_part_of_the_key_but_the_judge_is():
    def key(**settings):
        return SCORERS.config({"name": "llm_judge", "model": "m"} | settings).identity()

    assert key() == key(runtime={"base_url": "http://elsewhere/v1", "num_parallel": 2})
    assert key() != key(model="other") != key(mode="pairwise")


def test_braces_and_places_inside_texts_are_text(server, judge, scoring):
    server.answer = lambda request: "Score: 3"
    judge().score([scoring.candidates("{response} {x}", ["{prompt} {}"])])
    assert "<request>\n{response} {x}\n</request>" in text_of(server.requests[0])
    assert "<answer>\n{prompt} {}\n</answer>" in text_of(server.requests[0])


def test_another_wording_must_have_a_place_for_everything():
    with pytest.raises(ValueError, match=r"no place for \{response\}"):
        SCORERS.config({"name": "llm_judge", "model": "m", "prompt": "Grade {prompt}"})
    assert "{prompt}" in RUBRIC and "{response}" in RUBRIC and "{first}" in PAIRWISE


def test_the_evaluate_stage_keeps_what_its_judge_said(server, store, tiny_model, make_prompts, make_artifact):
    from data_contracts.checkpoint import external_model
    from stages.evaluation.stage import EvaluationConfig
    from stages.execute import execute
    from stages.stage import STAGES

    server.answer = lambda request: "Score: 4"
    rows = [
        {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 1], "token_logps": [-1.0] * 2,
         "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
        for i in range(3)
    ]  # fmt: skip
    model = external_model(tiny_model, store.root / "digests")
    inputs = {
        "prompts": make_prompts(store, 3),
        "generations": make_artifact(store, "generations", rows),
        "policy": model,
        "start": model,
    }
    scorer = {"name": "llm_judge", "model": "grader", "runtime": {"base_url": server.url}}
    config = EvaluationConfig.model_validate({"scorer": scorer, "dtype": "float32", "runtime": {"device": "cpu"}})
    record = execute(STAGES["evaluate"], config, inputs, store)
    assert record.metrics["heldout/score"] == 4.0 and len(server.requests) == 3
    assert len(list((store.root / "judgements").rglob("*.json"))) == 3
