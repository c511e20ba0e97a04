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
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data_contracts.errors import ConfigError, TransientError
from stages.scoring import SCORERS
from stages.scoring.endpoint import Reply
from stages.scoring.judge import PAIRWISE, RUBRIC, read_letter, read_score, read_verdict


class Server:
    """answer(request) -> text, a dict (the whole body), an int (a status), or bytes (the raw body)."""

    def __init__(self):
        self.answer, self.requests, self.under_way, self.most = None, [], 0, 0
        self.body, self.more = b"broken", {}
        """Of an answer that is a status: its body, and more headers."""
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
                more = outer.more if isinstance(answer, int) else {}
                if isinstance(answer, int):
                    answer = outer.body
                if isinstance(answer, str):
                    answer = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the judge gave up waiting

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


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
        ("Score: 4,5", 4.5),
        ("Score: 4, and that is much", 4.0),
        ("Score: 4.", 4.0),
        ("Score: 4,500", "judge gave no score"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A]]", 1.0),
        ("[[C]], as I said: [[ C ]]", 0.0),
        ("[[A]] and [[B]]", "judge gave several verdicts"),
        ("[[A]]? No: [[B]]", "judge gave several verdicts"),
        ("A is better [1]", "judge gave no verdict"),
    ],
)
def test_what_counts_as_a_verdict(text, expected):
    assert read_verdict(Reply({"choices": [{"message": {"content": text}}]}, ""), 1.0) == expected


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
        (b"<html>", "judge's answer was damaged", 2),
        ({"choices": []}, "judge's answer was damaged", 2),
        (b"[" * 100_000 + b"]" * 100_000, "judge's answer was damaged", 2),
        (b'{"choices": [{"message": {"content": "Score: 3 \\ud800"}}]}', "judge's answer was damaged", 2),
        ({"choices": [{"message": {"content": "Score: 3"}}], "usage": [1, 2]}, "judge's answer was damaged", 2),
    ],
    ids=["html", "no choices", "deep", "surrogate", "usage"],
)
def test_an_answer_that_is_no_completion_leaves_a_candidate_unscored(server, judge, scoring, answer, reason, tries):
    server.answer = lambda request: answer if "<answer>\nbad" in text_of(request) else "Score: 2"
    (scores,) = judge().score([scoring.candidates("why?", ["good", "bad"])])
    assert scores.scores[0] == 2 and math.isnan(scores.scores[1]) and scores.reasons == ["", reason]
    assert sum("<answer>\nbad" in text_of(request) for request in server.requests) == tries


def test_counts_of_odd_kinds_are_left_out(server, judge, scoring):
    usage = {"prompt_tokens": 7, "completion_tokens": "9", "details": {"x": 1}, "cached": -1, "total": 1 << 70}
    server.answer = lambda request: {"choices": [{"message": {"content": "Score: 3"}}], "usage": usage}
    made = judge()
    assert made.score([scoring.candidates("why?", ["a"])])[0].scores.tolist() == [3.0]
    assert {name: made.endpoint.counts[name] for name in usage} == dict.fromkeys(usage, 0) | {"prompt_tokens": 7}


@pytest.mark.parametrize(
    ("slow", "settings", "reason"),
    [
        (lambda: time.sleep(1.5), {"timeout_seconds": 0.3}, "judge timed out"),
        (lambda: 500, {}, "judge answered 500"),
        (lambda: 429, {}, "judge answered 429"),
    ],
    ids=["silence", "500", "429"],
)
def test_a_judge_that_does_not_answer_ends_the_stage_and_the_next_try_goes_on(
    server, judge, scoring, slow, settings, reason
):
    server.answer = lambda request: slow() or "Score: 5" if "<answer>\nslow" in text_of(request) else "Score: 2"
    batch = [scoring.candidates("why?", ["slow", "fast"])]
    with pytest.raises(TransientError, match=f"{reason}. What was answered is kept") as failure:
        judge(runtime={"retries": 0} | settings).score(batch)
    assert failure.value.exit_code == 75
    server.answer = lambda request: "Score: 4"
    (scores,) = judge().score(batch)
    assert scores.scores.tolist() == [4.0, 2.0] and len(server.requests) == 3  # "fast" was asked once


def test_an_empty_account_ends_the_stage_at_once_and_what_was_paid_is_kept(server, judge, scoring):
    lock = threading.Lock()

    def answer(request):
        with lock:
            return "Score: 3" if len(server.requests) <= 6 else 402

    server.answer, server.body = answer, b'{"error": {"message": "Insufficient credits"}}'
    batch = [scoring.candidates(f"question {k}", ["a", "b", "c"]) for k in range(12)]
    with pytest.raises(TransientError, match=r"wants to be paid \(402\).*Insufficient credits.*top up the account"):
        judge(runtime={"num_parallel": 2, "retries": 3}).score(batch)
    assert len(server.requests) <= 8  # of 36: no question after the first refusal
    answered = len(server.requests) - 2
    server.answer = lambda request: "Score: 1"
    server.requests.clear()
    again = judge()
    scores = [value for result in again.score(batch) for value in result.scores]
    assert sorted(scores) == [1.0] * (36 - 6) + [3.0] * 6
    assert len(server.requests) == 30 <= 36 - answered and again.metrics()["judge/cached"] == 6


def test_a_judge_that_is_away_is_not_asked_every_question(server, judge, scoring):
    server.answer = lambda request: 503
    batch = [scoring.candidates(f"question {k}", ["a", "b"]) for k in range(50)]
    with pytest.raises(TransientError, match="left a question without an answer after one try: judge answered 503"):
        judge(runtime={"retries": 0, "num_parallel": 4}).score(batch)
    assert len(server.requests) <= 12
    server.answer = lambda request: b"<html>"
    with pytest.raises(TransientError, match="judge's answer was damaged"):
        judge(runtime={"retries": 0}).score(batch)


def test_a_judge_that_drips_is_given_up_at_the_deadline(judge, scoring):
    """Both a head and a body that come a byte at a time: no wait for one byte is long."""
    for head in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=drip, args=(listener, head), daemon=True).start()
            runtime = {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "retries": 0}
            began = time.monotonic()
            with pytest.raises(TransientError, match="judge timed out"):
                judge(runtime=runtime | {"deadline_seconds": 0.5}).score([scoring.candidates("why?", ["a"])])
            assert time.monotonic() - began < 5


def drip(listener, head):
    connection, _ = listener.accept()
    with connection, suppress(OSError):
        connection.sendall(head)
        while True:
            connection.sendall(b"H")
            time.sleep(0.05)


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_host_takes_no_key_along(server, judge, scoring, status, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-0123456789")
    other = Server()
    other.answer = lambda request: "Score: 5"
    server.answer, server.more = lambda request: status, {"Location": other.url + "/chat/completions"}
    try:
        with pytest.raises(ConfigError, match=f"answers {status} and points to .*a redirect is not followed"):
            judge().score([scoring.candidates("why?", ["a"])])
        assert other.requests == [] and len(server.requests) == 1
    finally:
        other.close()
    assert not list((tmp_path / "store").rglob("*.json"))


def test_a_refusal_that_repeats_the_key_is_told_without_it(server, judge, scoring, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-0123456789")
    server.answer, server.body = lambda request: 401, b"invalid key planted-key-0123456789"
    with pytest.raises(ConfigError, match=r"refuses the key \(401\): invalid key \*\*\*$") as refusal:
        judge().score([scoring.candidates("why?", ["a"])])
    assert "planted" not in repr(refusal.value)
    monkeypatch.setenv("OPENAI_API_KEY", "planted\nkey")
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY holds a line break"):
        judge().score([scoring.candidates("why?", ["a"])])


@pytest.mark.parametrize("at", ["seconds", "date"])
def test_retry_after_is_obeyed_up_to_a_limit(server, judge, scoring, at):
    def after(seconds):
        return str(seconds) if at == "seconds" else formatdate(time.time() + seconds, usegmt=True)

    server.answer = lambda request: 429 if len(server.requests) == 1 else "Score: 3"
    server.more = {"Retry-After": after(2)}
    began = time.monotonic()
    (scores,) = judge().score([scoring.candidates("why?", ["a"])])
    assert scores.scores.tolist() == [3.0] and time.monotonic() - began > 0.9  # a date has whole seconds
    server.answer, server.more = lambda request: 429, {"Retry-After": after(700)}
    with pytest.raises(TransientError, match=r"asks to wait (699|700) s .*runtime.retry_after_seconds is 600"):
        judge().score([scoring.candidates("why?", ["b"])])
    assert len(server.requests) == 3


def test_a_hiccup_is_retried(server, judge, scoring):
    server.answer = lambda request: 503 if len(server.requests) == 1 else "Score: 3"
    (scores,) = judge().score([scoring.candidates("why?", ["a"])])
    assert scores.scores.tolist() == [3.0] and len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_what_no_try_would_cure_stops_the_stage_once_with_the_bodys_first_words(server, judge, scoring, status):
    server.answer, server.body = lambda request: status, b"maximum context length is 8192 tokens" + b"x" * 5000
    with pytest.raises(ConfigError, match=rf"\({status}\): maximum context length is 8192 tokens") as refusal:
        judge(runtime={"num_parallel": 2}).score([scoring.candidates("why?", [f"answer {k}" for k in range(30)])])
    assert len(server.requests) <= 4 and len(str(refusal.value)) < 500


def test_nobody_there_is_worth_another_try_later(scoring, judge):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = judge(runtime={"base_url": f"http://127.0.0.1:{port}/v1", "retries": 0})
    with pytest.raises(TransientError, match="nobody answers"):
        made.score([scoring.candidates("why?", ["a", "b"])])


def test_a_judgement_is_paid_once_also_by_the_next_process(server, judge, scoring, tmp_path):
    server.answer = lambda request: 500 if "<answer>\nbad" in text_of(request) else "Score: 4"
    with pytest.raises(TransientError):
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
