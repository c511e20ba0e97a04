"""Benchmark - TRL's DPO trajectory: 50 updates of a public model on public pairs, step by step beside DPOTrainer's.

    python -m benchmarks.trl_trajectory [--steps 50] [--json out.json]      with the hub and `pip install trl`
    python -m benchmarks.trl_trajectory --model DIRECTORY --pairs PAIRS.jsonl      without the hub
    python -m benchmarks.trl_trajectory --smoke      our side alone, a random model: no hub, no TRL

Both trainers take the same tokens in the same order, in float32, at TRL's defaults (AdamW, linear schedule without a
warm-up, clip 1, beta 0.1), each in a process of its own (benchmarks/train.py). Printed are loss and reward margin of
both after every fifth update. It fails if a loss differs by more than --tolerance.

The pairs are conversations: `chosen` and `rejected` are lists of messages that differ in the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks._smoke import add_smoke, tiny_model

SIDES = ("reference", "ours", "trl live")
EVERY = 5
"""Updates between two lines of the table."""


def conversations(source: str, count: int) -> list[dict[str, Any]]:
    """Rows with `chosen` and `rejected`: of a JSON Lines file, or of a data set on the hub."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:count]]
    from datasets import load_dataset

    rows: Any = load_dataset(source, split=f"train[:{count}]")
    return list(rows)


def pairs_of(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The token ids of prompt, chosen and rejected of the first pairs that fit, as many as the updates take."""
    from stages.models.turns import Turns

    turns, needed = Turns(options.model), options.steps * options.batch
    pairs = []
    for row in conversations(options.pairs, 4 * needed):
        prompt = turns.prompt(row["chosen"][:-1])
        chosen, rejected = (turns.response(row[side][-1]["content"]) for side in ("chosen", "rejected"))
        is_long = len(prompt) + max(len(chosen), len(rejected)) > options.max_tokens
        if not is_long and chosen != rejected:
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if len(pairs) < needed:
        raise SystemExit(
            f"{options.pairs} has {len(pairs)} pairs of at most {options.max_tokens} tokens, and {options.steps} "
            f"updates take {needed}: lower --steps or --batch, or raise --max-tokens"
        )
    return pairs[:needed]


def random_pairs(model: str, count: int) -> list[dict[str, list[int]]]:
    """Pairs of the quickstart's prompts and random tokens, for a smoke run."""
    return train.pairs_of(argparse.Namespace(model=model, pairs=None, count=count))


def play(options: argparse.Namespace, pairs: list[dict[str, list[int]]], directory: Path) -> dict[str, dict[str, Any]]:
    """The result of every side; in a smoke run of ours alone, in this process."""
    work = {
        "model": options.model,
        "batch": options.batch,
        "micro": options.batch,
        "batch_tokens": options.batch_tokens,
    }
    work |= {"dtype": "float32", "trl_dtype": "weights", "threads": options.threads, "runtime": {}, "pairs": pairs}
    work |= {"directory": str(directory), "device": options.device, "optimizer": "adamw"}
    if options.smoke:
        return {side: train.SIDES[side](work) for side in ("reference", "ours")}
    path = directory / "work.json"
    path.write_text(json.dumps(work))
    return {side: train.in_process(path, side, options.threads) for side in SIDES}


def report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the trajectories. Exits if a loss of the two differs by more than the tolerance."""
    ours, theirs = results["ours"], results.get("trl live")
    print("| update | loss | TRL's | margin | TRL's |\n|---|---|---|---|---|")
    for number, (loss, margin) in enumerate(zip(ours["losses"], ours["margins"], strict=True), start=1):
        if number % EVERY == 0 or number == 1:
            other = ["not run", "not run"]
            if theirs is not None:
                other = [f"{theirs[name][number - 1]:.5f}" for name in ("losses", "margins")]
            print(f"| {number} | {loss:.5f} | {other[0]} | {margin:+.5f} | {other[1]} |")
    if options.json:
        options.json.write_text(
            json.dumps({"results": results, "options": {k: str(v) for k, v in vars(options).items()}})
        )
    count = len(ours["losses"])
    if theirs is None:
        print(f"{count} updates of ours on a random model; not run: TRL's side, and the hub's model and pairs")
        return
    worst = {
        name: max(abs(a - b) for a, b in zip(ours[name], theirs[name], strict=True)) for name in ("losses", "margins")
    }
    print(f"{count} updates: largest difference of a loss {worst['losses']:.1e}, of a margin {worst['margins']:.1e}")
    if worst["losses"] > options.tolerance:
        raise SystemExit(f"the losses differ by {worst['losses']:.2e}, more than --tolerance {options.tolerance:g}")


def local_directory(model: str) -> str:
    """The model's directory; a hub id is fetched."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_trajectory")
    parser.add_argument("--model", default="Qwen/Qwen2-0.5B-Instruct", help="a directory, or an id on the hub")
    parser.add_argument("--pairs", default="trl-lib/ultrafeedback_binarized", help="JSON Lines, or an id on the hub")
    parser.add_argument("--steps", type=int, default=50, help="updates")
    parser.add_argument("--batch", type=int, default=8, help="pairs per update")
    parser.add_argument("--max-tokens", type=int, default=512, help="longer pairs are left out")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="our padded tokens per forward")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of an update's loss")
    parser.add_argument("--json", type=Path)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if options.smoke:
            options.model, options.steps, options.batch, options.threads = tiny_model(root / "model"), 6, 2, 1
            pairs = random_pairs(options.model, options.steps * options.batch)
        else:
            if find_spec("trl") is None:
                raise SystemExit("TRL is not installed, and its side is half of this: pip install trl, or --smoke")
            options.model = local_directory(options.model)
            pairs = pairs_of(options)
        report(play(options, pairs, root), options)


if __name__ == "__main__":
    main()
