"""A judge that the stage serves itself: when it is started, what its name says, and that nothing of it survives.

Strategy: the interpreter that is to run vLLM is a script that answers as `vllm serve` does. With vLLM itself it is a
slow test of tests/flows/test_scoring_loop.py.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_contracts.errors import ConfigError, TransientError
from stages.running.supervise import processes_with
from stages.scoring import SCORERS, served

ROOT = Path(__file__).resolve().parents[3]
FAKE = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
with open("{log}", "a") as log:
    log.write(json.dumps({{"argv": sys.argv[1:], "name": sys.argv[sys.argv.index("--served-model-name") + 1]}}) + chr(10))
{extra}
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, body):
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self.reply(b"")
    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "leave" in text: os._exit(7)
        self.reply(json.dumps({{"choices": [{{"message": {{"content": "Score: 4"}}}}]}}).encode())
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def serve(tmp_path, tiny_model, monkeypatch):
    """serve(extra=lines of the fake server, **settings) -> settings of a judge; its starts are lines of
    tmp_path/starts."""
    marker = f"SELFPLAY_TEST=served-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv(*marker.split("="))

    def make(extra="", model=tiny_model, **settings):
        python = tmp_path / "python"
        python.write_text(FAKE.format(python=sys.executable, log=tmp_path / "starts", extra=extra))
        python.chmod(0o755)
        server = {"python": str(python), "arguments": {"max_model_len": 512}, "start_seconds": 30} | settings.pop(
            "server", {}
        )
        return {
            "name": "llm_judge",
            "model": "own",
            "serve": {"path": str(model)},
            "server": server,
            "runtime": {"retries": 0},
        } | settings

    make.marker = marker
    return make


def starts(tmp_path):
    return (tmp_path / "starts").read_text().splitlines() if (tmp_path / "starts").is_file() else []


def gone(marker):
    end = time.monotonic() + 15
    while (left := processes_with(marker)) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def test_it_is_started_once_by_the_first_request_that_is_not_cached_and_ends_when_closed(scoring, serve, tmp_path):
    judge = scoring.scorer(serve(), root=tmp_path / "store")
    assert starts(tmp_path) == []
    for answers in (["a", "b"], ["c"]):
        (scores,) = judge.score([scoring.candidates("why?", answers)])
        assert scores.scores.tolist() == [4.0] * len(answers)
    (line,) = starts(tmp_path)
    assert (
        "vllm.entrypoints.openai.api_server" in line
        and '"--host", "127.0.0.1"' in line
        and '"--max-model-len", "512"' in line
    )
    assert processes_with(serve.marker)
    judge.close()
    assert gone(serve.marker)
    again = scoring.scorer(serve(), root=tmp_path / "store")
    (scores,) = again.score([scoring.candidates("why?", ["a", "c"])])
    assert (
        scores.scores.tolist() == [4.0, 4.0] and len(starts(tmp_path)) == 1
    )  # all of it was cached: nobody was started


def test_its_key_and_its_judgements_follow_the_weights_not_their_place(scoring, serve, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "copy")
    shutil.copytree(tiny_model, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    settings = [serve(model=model) for model in (tiny_model, tmp_path / "copy", tmp_path / "other")]
    same, copy, other = (SCORERS.config(one) for one in settings)
    assert same.identity() == copy.identity() != other.identity()
    names = [scoring.scorer(one).name for one in settings]
    assert names[0] == names[1] != names[2] and names[0].startswith("own@")
    served_elsewhere = SCORERS.config({"name": "llm_judge", "model": "own"})
    assert "serve" not in served_elsewhere.identity() and "server" not in same.identity()


def test_a_server_that_does_not_start_says_why(scoring, serve):
    judge = scoring.scorer(serve(extra="raise SystemExit('no GPU for you')"))
    with pytest.raises(ConfigError, match=r"ended with code 1(.|\n)*no GPU for you"):
        judge.score([scoring.candidates("why?", ["a"])])
    slow = scoring.scorer(serve(extra="import time; time.sleep(60)", server={"start_seconds": 0.5}))
    with pytest.raises(TransientError, match="did not answer within 0.5 s"):
        slow.score([scoring.candidates("why?", ["a"])])
    assert gone(serve.marker)


def test_a_server_that_dies_is_worth_another_try_and_no_missing_score(scoring, serve):
    judge = scoring.scorer(serve())
    judge.score([scoring.candidates("why?", ["a"])])
    with pytest.raises(TransientError, match="ended with code 7"):
        judge.score([scoring.candidates("leave", ["a", "b"])])
    assert judge.score([scoring.candidates("who?", ["a"])])[0].scores.tolist() == [
        4.0
    ]  # and the next one starts it again
    judge.close()


def test_it_ends_with_the_process_that_started_it_however_that_ends(serve, tmp_path):
    code = (
        "import json, sys, time\nfrom pathlib import Path\nfrom stages.scoring.served import Served, ServerRuntime\n"
        f"runtime = ServerRuntime.model_validate({serve()['server']!r})\n"
        "Served(runtime, Path('model'), 'own', 'cuda').start()\nprint('up', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n" and len(processes_with(serve.marker)) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(serve.marker)


def test_weights_that_are_not_there_are_found_before_anything_runs():
    config = SCORERS.config({"name": "llm_judge", "model": "own", "serve": {"path": "/nowhere/at/all"}})
    with pytest.raises(ConfigError, match="no config.json"):
        SCORERS.get("llm_judge").check_prompts(config, [])


@pytest.mark.parametrize(
    ("free", "arguments", "share"),
    [(0.95, {}, None), (0.61288, {}, "0.612"), (0.5, {"gpu_memory_utilization": 0.3}, "0.3")],
)
def test_the_server_takes_what_is_free_of_its_gpu(tiny_model, monkeypatch, free, arguments, share):
    monkeypatch.setattr(served, "engine_share", lambda most, weights, count: min(most, free))
    runtime = served.ServerRuntime(arguments=arguments)
    command = served.Served(runtime, tiny_model, "own", "cuda").command(80)
    given = dict(itertools.pairwise(command)).get("--gpu-memory-utilization")
    assert given == share
