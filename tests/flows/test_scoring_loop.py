"""SPPO with K = 5 through the whole loop, once for each source of preferences: PairRM on tiny weights, and an LLM judge behind an endpoint.

Strategy: the runs are played in one process (in_process.py); the endpoint is a fake one on 127.0.0.1 that gives verdicts by length, now and
then an unreadable one. With a real server it is the slow test at the end.
"""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def verdict(text: str) -> str:
    """By length; every eleventh length rambles."""
    first, second = (len(text.split(f"<answer_{letter}>\n")[1].split(f"\n</answer_{letter}>")[0]) for letter in "ab")
    if (first + second) % 11 == 0:
        return "Both have their points."
    return "[[C]]" if first == second else "The longer one. [[A]]" if first > second else "The longer one. [[B]]"


@pytest.fixture(scope="module")
def judge_url():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = {"role": "assistant", "content": verdict(request["messages"][0]["content"])}
            body = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("pairrm_tiny", ROOT / "tests" / "assets" / "pairrm_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(tmp_path_factory.mktemp("pairrm") / "tiny")["hf"]


def play(work: Path, tiny_model: Path, tools, scorers: dict[str, dict]) -> dict[str, dict]:
    """name -> result of a two-iteration SPPO run whose training pairs that scorer makes."""
    heldout = work / "heldout.jsonl"
    heldout.write_text(
        "".join(line + "\n" for line in (ROOT / "deploy/prompts/quickstart_heldout.jsonl").read_text().splitlines()[:2])
    )
    settings = {
        "policy.path": str(tiny_model),
        "prompts.heldout": str(heldout),
        "training.dtype": "float32",
        "training.learning_rate": 1e-4,
    }
    settings |= {
        "sampling.backend.dtype": "float32",
        "sampling.max_prompt_tokens": 200,
        "sampling.num_candidates": 5,
        "learning_rates": [],
    }
    settings |= {"prompts.per_iteration": 4}
    cases = [
        {"id": name, "config": "deploy/runs/tiny/sppo.yaml", "set": settings | {"scoring.scorer": scorer}}
        for name, scorer in scorers.items()
    ]
    return tools.play_cases(cases, work)


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model, judge_url, pairrm, tools):
    scorers = {
        "pairrm": {"name": "pairrm", "model": {"path": str(pairrm)}},
        "judge": {
            "name": "llm_judge",
            "model": "by-length",
            "mode": "pairwise",
            "runtime": {"base_url": judge_url, "num_parallel": 4},
        },
    }
    work = tmp_path_factory.mktemp("scoring_loop")
    return play(work, tiny_model, tools, scorers) | {"work": work}


@pytest.mark.parametrize("name", ["pairrm", "judge"])
def test_sppo_learns_from_any_source_of_preferences(played, name):
    result = played[name]
    assert "error" not in result, result["error"]
    assert len(result["iterations"]) == 2
    for iteration in result["iterations"]:
        score, train = iteration["score"], iteration["train"]
        assert score["pairs"] >= 1 and train["steps"] > 0 and train["loss"] == train["loss"]
        assert score["win_rate/chosen"] > 0.5 > score["win_rate/rejected"]
        assert 0 <= score["pairwise/decided_by_order"] <= 1 and 0 <= score["pairwise/cyclic_triples"] <= 1


def test_judgements_lie_in_the_store_and_unreadable_ones_are_told(played):
    store = played["work"] / "store"
    kept = list((store / "judgements").rglob("*.json"))
    assert kept and all("choices" in json.loads(path.read_text())["reply"] for path in kept[:5])
    metrics = played["judge"]["iterations"][0]["score"]
    assert any(name.startswith("spoilt/judge gave no verdict") for name in metrics)
    assert metrics["pairwise/position_bias"] == pytest.approx(0, abs=1e-9)  # it looks at the texts only


@pytest.mark.slow
def test_a_judge_served_by_the_stage_with_vllm(tmp_path, tiny_model, tools):
    """A model that can say anything: one-token judging reads its probabilities, whatever it would have said."""
    model = ROOT / "models" / "smollm2-135m-instruct"
    if not model.is_dir():
        pytest.skip("make model")
    server = {"arguments": {"max_model_len": 1024, "dtype": "float32"}}
    scorer = {
        "name": "llm_judge",
        "model": "smollm2",
        "mode": "logprob",
        "serve": {"path": str(model)},
        "server": server,
    }
    scorer["runtime"] = {"num_parallel": 4, "timeout_seconds": 120}
    result = play(tmp_path, tiny_model, tools, {"vllm": scorer})["vllm"]
    assert "error" not in result, result["error"]
    assert len(result["iterations"]) == 2 and result["iterations"][0]["score"]["pairs"] >= 1
