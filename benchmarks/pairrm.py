"""Pairs per second of the native PairRM against llm-blender 0.0.2, on the same checkpoints, texts and machine, in one run.

    make oracle                                                once: llm-blender's own environment
    .venv/bin/python benchmarks/pairrm.py [--size tiny mid] [--prompts 6] [--tokens 512 | --like ANSWERS.jsonl] [--device cpu]

llm-blender runs as SPPO runs it: `rank`, batch_size=1, K candidates, float32 here on both sides (and with --dtype float16 as well, which is
its own choice on a GPU). The logits of both are compared in the same run; it fails if they differ. The checkpoints are random
(tests/assets/pairrm_tiny.py), `large` has the size of the released one. Texts are 8 to --tokens words, or as long as the instructions and
outputs of a file of {"instruction": ..., "outputs": {model: text}} lines. `rank` compares each of the K (K - 1) ordered pairs by a forward of its
own, without padding, and so do we compare each of them.

Both sides get the same number of threads and a warm-up; the time is that of scoring, without loading. The two run one after the other,
twice over, and the better time of each counts. On a CPU it is the processor's time, which other work on the machine does not stretch; with
one thread that is the time on a machine of one's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-4, "float16": 0.05}


def tiny():
    spec = importlib.util.spec_from_file_location("pairrm_tiny", ROOT / "tests" / "assets" / "pairrm_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(count: int, candidates: int, longest: int) -> list[dict]:
    """Prompts and answers of words; lengths spread as those of real answers, seeded."""
    draw, words = random.Random(0), tiny().WORDS

    def text(low, high):
        length = round(2 ** draw.uniform(low.bit_length() - 1, high.bit_length() - 1))
        return " ".join(draw.choice(words) for _ in range(length))

    return [{"prompt": text(8, 128), "candidates": [text(8, longest) for _ in range(candidates)]} for _ in range(count)]


def texts_like(path: Path, count: int, candidates: int) -> list[dict]:
    """Words as many as the real texts have tokens (1.3 to a word): the vocabulary of these checkpoints would take English apart."""
    draw = random.Random(0)

    def like(text: str) -> str:
        return " ".join(draw.choice(tiny().WORDS) for _ in range(round(1.3 * len(text.split()))))

    rows = draw.sample([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], count)
    return [
        {
            "prompt": like(row["instruction"]),
            "candidates": [like(text) for text in list(row["outputs"].values())[:candidates]],
        }
        for row in rows
    ]


def oracle(request: dict) -> dict:
    """In llm-blender's environment."""
    import llm_blender
    import numpy as np
    import torch

    torch.set_num_threads(request["threads"])
    blender = llm_blender.Blender()
    blender.loadranker(request["ranker"], device=request["device"], fp16=request["dtype"] == "float16")
    inputs, candidates = (
        [case["prompt"] for case in request["cases"]],
        [case["candidates"] for case in request["cases"]],
    )
    blender.rank(inputs[:1], candidates[:1], batch_size=1, disable_tqdm=True)
    clock = time.process_time if request["device"] == "cpu" else time.perf_counter
    begin = clock()
    scores = blender.rank(inputs, candidates, return_scores=True, batch_size=1, disable_tqdm=True)
    return {"seconds": clock() - begin, "scores": np.asarray(scores, dtype=float).tolist()}


def native(request: dict) -> dict:
    import stages.scoring.pairrm as pairrm
    from stages.scoring import SCORERS
    from stages.scoring.base import Candidates, Services, open_scorer

    pairrm.pin_threads = lambda count: __import__("torch").set_num_threads(request["threads"])
    config = SCORERS.config({"name": "pairrm", "model": {"path": request["ranker"]}, "dtype": request["dtype"]})
    scorer = open_scorer(config, request["device"], Services(batch_tokens=request["batch_tokens"]))
    batch = [
        Candidates(
            {"messages": [{"role": "user", "content": case["prompt"]}]},
            [{"completion": text} for text in case["candidates"]],
            None,
        )
        for case in request["cases"]
    ]
    scorer.score(batch[:1])
    clock = time.process_time if request["device"] == "cpu" else time.perf_counter
    begin = clock()
    found = scorer.score(batch)
    seconds = clock() - begin
    logits = [item.preference_logits for item in found]
    return {"seconds": seconds, "scores": [(matrix - matrix.T).mean(axis=1).tolist() for matrix in logits]}


def in_process(python: str, side: str, request: dict, work: Path) -> dict:
    (work / "request.json").write_text(json.dumps(request))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(request["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, __file__, "--side", side, "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return json.loads((work / f"{side}.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["tiny", "mid"], choices=["tiny", "mid", "large"])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="words of the longest answer")
    parser.add_argument("--like", type=Path, help="take the lengths of these answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--oracle", default=str(ROOT / ".venv-oracle" / "bin" / "python"))
    parser.add_argument("--side", choices=["oracle", "native"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        request = json.loads((options.work / "request.json").read_text())
        (options.work / f"{options.side}.json").write_text(json.dumps(globals()[options.side](request)))
        return
    cases = (
        texts_like(options.like, options.prompts, options.candidates)
        if options.like
        else texts(options.prompts, options.candidates, options.tokens)
    )
    for size in options.size:
        with tempfile.TemporaryDirectory() as work:
            paths = tiny().build(Path(work) / size, size)
            request = {
                "ranker": str(paths["ranker"]), "cases": cases, "device": options.device, "dtype": options.dtype, "threads": options.threads, "batch_tokens": options.batch_tokens,
            }  # fmt: skip
            runs = [
                (
                    in_process(options.oracle, "oracle", request, Path(work)),
                    in_process(sys.executable, "native", request, Path(work)),
                )
                for _ in range(options.repeats)
            ]
        old, new = (min(run[side]["seconds"] for run in runs) for side in (0, 1))
        rows = zip(runs[0][0]["scores"], runs[0][1]["scores"], strict=True)
        worst = max(abs(a - b) for left, right in rows for a, b in zip(left, right, strict=True))
        each = ", ".join(f"{left['seconds'] / right['seconds']:.2f}" for left, right in runs)
        pairs = options.prompts * options.candidates * (options.candidates - 1)
        print(
            f"{size:6} {options.device} {options.dtype}: llm-blender {pairs / old:8.1f} pairs/s, native {pairs / new:8.1f} pairs/s, "
            f"{old / new:5.2f} times as fast ({each}); largest difference of a score {worst:.1e} over {pairs} pairs"
        )
        if worst > TOLERANCE[options.dtype]:
            raise SystemExit(f"the scores differ by {worst:.2e}: the comparison is void")


if __name__ == "__main__":
    main()
