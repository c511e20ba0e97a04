"""Benchmark - PairRM: pairs per second of the native scorer against llm-blender 0.0.2, at equal scores.

    make oracle                                                once: llm-blender's own environment
    python -m benchmarks.pairrm [--size tiny mid] [--prompts 6] [--tokens 512 | --like ANSWERS.jsonl] [--device cpu]
    python -m benchmarks.pairrm --smoke

llm-blender runs as SPPO runs it: `rank`, batch_size=1, K candidates. Both sides use float32; `--dtype float16` is
llm-blender's own choice on a GPU. The logits of both are compared in the same run; it fails if they differ. The
checkpoints are random (tests/assets/pairrm_tiny.py); `large` has the size of the released one. Texts have 8 to --tokens
words, or the lengths of the instructions and outputs of a file of {"instruction": ..., "outputs": {model: text}} lines.
`rank` compares each of the K (K - 1) ordered pairs by a forward of its own, without padding, and so does the native
scorer.

Both sides get the same number of threads and a warm-up; the time is that of scoring, without loading. The two run one
after the other, twice over, and the better time of each counts. On a CPU it is CPU time, which other work on the
machine does not stretch; with one thread that is the time on a quiet machine. `--smoke` compares with llm-blender's
scores in tests/assets/pairrm_golden.json and times one side.
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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-4, "float16": 0.05}


def checkpoints() -> ModuleType:
    """tests/assets/pairrm_tiny.py, which writes the random checkpoints."""
    spec = importlib.util.spec_from_file_location("pairrm_tiny", ROOT / "tests" / "assets" / "pairrm_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(count: int, candidates: int, longest: int) -> list[dict]:
    """Prompts and answers of random words; lengths spread as those of real answers."""
    chance, words = random.Random(0), checkpoints().WORDS

    def text(low: int, high: int) -> str:
        length = round(2 ** chance.uniform(low.bit_length() - 1, high.bit_length() - 1))
        return " ".join(chance.choice(words) for _ in range(length))

    return [{"prompt": text(8, 128), "candidates": [text(8, longest) for _ in range(candidates)]} for _ in range(count)]


def texts_like(path: Path, count: int, candidates: int) -> list[dict]:
    """As many words as the real texts have tokens (1.3 to a word): the tiny vocabulary would take English apart."""
    chance, words = random.Random(0), checkpoints().WORDS

    def like(text: str) -> str:
        return " ".join(chance.choice(words) for _ in range(round(1.3 * len(text.split()))))

    rows = chance.sample([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], count)
    return [
        {
            "prompt": like(row["instruction"]),
            "candidates": [like(text) for text in list(row["outputs"].values())[:candidates]],
        }
        for row in rows
    ]


def golden_texts() -> tuple[list[dict], list[list[float]]]:
    """Two of the frozen cases, and llm-blender's scores of them."""
    frozen = json.loads((ROOT / "tests" / "assets" / "pairrm_golden.json").read_text(encoding="utf-8"))["cases"]
    cases = checkpoints().cases()
    names = ("plain", "punctuation")
    return [cases[name] for name in names], [frozen[name]["scores"] for name in names]


def oracle(request: dict) -> dict:
    """CPU seconds and scores of llm-blender; runs in its own environment."""
    import llm_blender
    import numpy as np
    import torch

    torch.set_num_threads(request["threads"])
    blender = llm_blender.Blender()
    blender.loadranker(request["ranker"], device=request["device"], fp16=request["dtype"] == "float16")
    inputs = [case["prompt"] for case in request["cases"]]
    candidates = [case["candidates"] for case in request["cases"]]
    blender.rank(inputs[:1], candidates[:1], batch_size=1, disable_tqdm=True)
    clock = clock_of(request["device"])
    began = clock()
    scores = blender.rank(inputs, candidates, return_scores=True, batch_size=1, disable_tqdm=True)
    return {"seconds": clock() - began, "scores": np.asarray(scores, dtype=float).tolist()}


def clock_of(device: str) -> Callable[[], float]:
    """CPU time on a CPU, else the time on the wall."""
    if device == "cpu":
        return time.process_time
    return time.perf_counter


def native(request: dict) -> dict:
    """CPU seconds and scores of the project's own PairRM."""
    import torch

    import stages.scoring.pairrm as pairrm
    from stages.scoring import SCORERS
    from stages.scoring.base import Candidates, Services, open_scorer

    pairrm.pin_threads = lambda count: torch.set_num_threads(request["threads"])
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
    clock = clock_of(request["device"])
    began = clock()
    results = scorer.score(batch)
    seconds = clock() - began
    logits = [result.preference_logits for result in results]
    scores = [(matrix - matrix.T).mean(axis=1).tolist() for matrix in logits]
    return {"seconds": seconds, "scores": scores, "logits": [matrix.tolist() for matrix in logits]}


def in_process(python: str, side: str, request: dict, work: Path) -> dict:
    """What a side returns, run by an interpreter in a process of its own. Exits if it fails."""
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairrm")
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
    parser.add_argument("--smoke", action="store_true", help="the frozen scores stand in for llm-blender")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.repeats = ["tiny"], 1
    return options


def measure(size: str, cases: list[dict], frozen: list[list[float]], options: argparse.Namespace) -> list[list[dict]]:
    """[llm-blender's result, ours] of each repetition on a random checkpoint. Frozen scores come without seconds."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        request = {"ranker": str(checkpoints().build(work / size, size)["ranker"]), "cases": cases}
        request |= {name: getattr(options, name) for name in ("device", "dtype", "threads", "batch_tokens")}
        runs = []
        for _ in range(options.repeats):
            blender = {"seconds": float("nan"), "scores": frozen}
            if not frozen:
                blender = in_process(options.oracle, "oracle", request, work)
            runs.append([blender, in_process(sys.executable, "native", request, work)])
        return runs


def report(size: str, runs: list[list[dict]], pairs: int, options: argparse.Namespace) -> None:
    """Print both rates. Exits if the scores differ."""
    blender, ours = (min(run[side]["seconds"] for run in runs) for side in (0, 1))
    rows = zip(runs[0][0]["scores"], runs[0][1]["scores"], strict=True)
    gap = max(abs(a - b) for expected, scores in rows for a, b in zip(expected, scores, strict=True))
    ratios = ", ".join(f"{first['seconds'] / second['seconds']:.2f}" for first, second in runs)
    print(
        f"{size:6} {options.device} {options.dtype}: llm-blender {pairs / blender:8.1f} pairs/s, "
        f"native {pairs / ours:8.1f} pairs/s, "
        f"{blender / ours:5.2f} times as fast ({ratios}); largest difference of a score {gap:.1e} over {pairs} pairs"
    )
    if gap > TOLERANCE[options.dtype]:
        raise SystemExit(f"the scores differ by {gap:.2e}: the comparison is void")


SIDES = {"oracle": oracle, "native": native}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.side:
        request = json.loads((options.work / "request.json").read_text())
        (options.work / f"{options.side}.json").write_text(json.dumps(SIDES[options.side](request)))
        return
    frozen: list[list[float]] = []
    if options.smoke:
        cases, frozen = golden_texts()
    elif options.like:
        cases = texts_like(options.like, options.prompts, options.candidates)
    else:
        cases = texts(options.prompts, options.candidates, options.tokens)
    pairs = sum(len(case["candidates"]) * (len(case["candidates"]) - 1) for case in cases)
    for size in options.size:
        report(size, measure(size, cases, frozen, options), pairs, options)


if __name__ == "__main__":
    main()
