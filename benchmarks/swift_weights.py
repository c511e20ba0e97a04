"""Benchmark - does the teacher's weight help? SWIFT, SPIN and SWIFT's ablations on the same shards, several seeds, with intervals.

    python -m benchmarks.swift_weights --student MODEL --teacher MODEL --stories STORIES.jsonl --out docs/swift_weights.md

A small story writer learns from stories' endings by self-play, two iterations per run. Everything that does not depend on the variant (prompts,
the first iteration's generations, the teacher's pass over the ground truths) is built once and shared through the store. Two measures on
held-out stories: how likely the policy finds the true endings (nats per token), and how likely the teacher finds the policy's endings
(nats per character, since the two models cut text differently). Intervals: paired bootstrap over stories and seeds against the start model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import numpy as np

import flows.preflight
import stages.training.engine
from data_contracts.checkpoint import external_model
from data_contracts.store import Store
from flows.config import RunConfig
from flows.self_play import SelfPlay
from stages.evaluation.intervals import paired_bootstrap
from stages.models.logps import Pass
from stages.models.policy import load_causal_lm, score_responses
from stages.models.tokens import encode_prompt, encode_response, load_tokenizer, stop_ids
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.transformers import Transformers
from tasks.place import Place
from tests.flows.in_process import HandsInProcess, History

VARIANTS = {
    "SWIFT (teacher)": {"method": {"name": "swift"}},
    "equal weights": {"method": {"name": "swift"}, "weighting": {"weights": {"name": "equal"}}},
    "random weights": {"method": {"name": "swift"}, "weighting": {"weights": {"name": "random"}}},
    "reverse weights": {"method": {"name": "swift"}, "weighting": {"weights": {"name": "reverse"}}},
    "SPIN": {"method": {"name": "spin"}},
    "SPIN, length-normalised": {"method": {"name": "spin_lengthnorm"}},
}


def stories(path: Path, count: int) -> list[dict]:
    """Prompt: a story's first two sentences; response: the next three. Only stories that are long enough."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        data = json.loads(line)
        text = data if isinstance(data, str) else data.get("text") or data.get("story")
        sentences = re.split(r"(?<=[.!?\"])\s+", " ".join(text.split()))
        if len(sentences) < 5:
            continue
        prompt, response = " ".join(sentences[:2]), " " + " ".join(sentences[2:5])
        row = {
            "prompt_id": f"story-{number:04d}",
            "messages": [{"role": "user", "content": prompt}],
            "checks": "[]",
            "response": response,
        }
        rows.append(row | {"chosen": None, "rejected": None, "source": "stories"})
        if len(rows) == count:
            break
    return rows


def config_of(options: argparse.Namespace, variant: dict, seed: int) -> RunConfig:
    base = {
        "name": "swift-weights", "policy": {"path": options.student}, "models": {"teacher": {"path": options.teacher}}, "seed": seed, "iterations": 2,
        "prompts": {"train": "-", "heldout": "-", "reuse": True},
        "sampling": {"backend": {"name": "transformers", "dtype": "float32"}, "template": "plain", "num_candidates": 1, "max_prompt_tokens": 256, "max_new_tokens": 96},
        "training": {"learning_rate": options.learning_rate, "epochs": 2, "batch_size": 8, "dtype": "float32", "runtime": {"batch_tokens": 4096}},
        "scoring": {"max_response_tokens": 96},
        "evaluation": {"scorer": {"name": "length"}},
    }  # fmt: skip
    return RunConfig.model_validate(base | variant)


class Judge:
    """Both measures of a policy on the held-out stories."""

    def __init__(self, store: Store, teacher: str, rows: list[dict]):
        self.rows, self.teacher = rows, Pass(store.root, external_model(Path(teacher)), "bfloat16", "cpu", 8192)
        self.teacher_tokens = load_tokenizer(teacher)

    def measure(self, policy: str, sampling, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        tokenizer = load_tokenizer(policy)
        prompts = [encode_prompt(tokenizer, row["messages"], "plain") for row in self.rows]
        truths = [
            encode_response(tokenizer, row["response"])[:-1] for row in self.rows
        ]  # cut stories: their end is no ending
        model = load_causal_lm(policy, "float32", "cpu").eval()
        likely = {
            row["prompt_id"]: float(logps.mean())
            for row, logps in zip(self.rows, score_responses(model, prompts, truths, 8192), strict=True)
        }
        sampler = Transformers(sampling.backend, sampling, policy, stop_ids(policy, tokenizer), "cpu")
        asked = [
            Prompt(row["prompt_id"], ids, candidate_seeds(seed + 1000, row["prompt_id"], 1))
            for row, ids in zip(self.rows, prompts, strict=True)
        ]
        texts = [tokenizer.decode(group[0].token_ids, skip_special_tokens=True) for group in sampler.generate(asked)]
        before = [self.teacher_tokens(row["messages"][0]["content"]).input_ids for row in self.rows]
        after = [self.teacher_tokens(text or " ").input_ids for text in texts]
        self.teacher.fill(before, after)
        scores = [
            float(logps.sum()) / max(1, len(text))
            for logps, text in zip(self.teacher.get(before, after), texts, strict=True)
        ]
        return likely, {row["prompt_id"]: score for row, score in zip(self.rows, scores, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--student", "--teacher", "--stories", "--out", "--store"):
        parser.add_argument(
            name, required=name not in ("--out", "--store"), default="store" if name == "--store" else None
        )
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--heldout", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()
    began = time.monotonic()
    stages.training.engine.Engine.close = lambda self: None
    store = Store(options.store)
    rows = stories(Path(options.stories), options.train + options.heldout)
    train, heldout = rows[: options.train], rows[options.train :]
    judge, start = Judge(store, options.teacher, heldout), external_model(Path(options.student))
    sampling = config_of(options, VARIANTS["SPIN"], 0).sampling
    measured: dict[str, list] = {
        "start": [judge.measure(options.student, sampling, seed) for seed in range(options.seeds)]
    }
    for name, variant in VARIANTS.items():
        for seed in range(options.seeds):
            config = config_of(options, variant, seed)
            models = {"teacher": external_model(Path(options.teacher))} if "teacher" in config.roles else {}
            checked = flows.preflight.Checked(train, heldout[:1], config.evaluation)
            loop = SelfPlay(config, checked, start, models, HandsInProcess(), History())
            final = loop.play(Place(str(store.root), config.name))
            measured.setdefault(name, []).append(judge.measure(final.path, sampling, seed))
            print(
                name,
                seed,
                [round(float(np.mean(list(m.values()))), 4) for m in measured[name][-1]],
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    table = render(measured, options)
    print(table)
    if options.out:
        Path(options.out).write_text(table)


def render(measured: dict[str, list], options: argparse.Namespace) -> str:
    lines = [
        "# Does the teacher's weight help? SWIFT, SPIN and SWIFT's ablations on the same shards", "",
        f"Student {Path(options.student).name}, teacher {Path(options.teacher).name}; {options.train} stories to train on, {options.heldout} held out, {options.seeds} seeds, two iterations, "
        f"RMSprop, learning rate {options.learning_rate:g}, batch 8, two epochs. Change against the start model with its 95 % interval (paired bootstrap over stories and seeds). "
        "Made by `python -m benchmarks.swift_weights`.", "",
        "| variant | true endings under the policy, nats per token | policy's endings under the teacher, nats per character |", "|---|---|---|",
    ]  # fmt: skip
    base = [
        [{f"{seed}/{key}": value for seed, run_ in enumerate(measured["start"]) for key, value in run_[column].items()}]
        for column in (0, 1)
    ]
    means = [float(np.mean(list(base[column][0].values()))) for column in (0, 1)]
    lines.append(f"| start | {means[0]:.4f} | {means[1]:.4f} |")
    for name in VARIANTS:
        cells = []
        for column in (0, 1):
            after = {
                f"{seed}/{key}": value
                for seed, run_ in enumerate(measured[name])
                for key, value in run_[column].items()
            }
            gain = paired_bootstrap(base[column][0], after)
            cells.append(f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
    os._exit(0)
