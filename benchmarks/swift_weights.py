"""Benchmark - does the teacher's weight help? SWIFT, SPIN and ablations on the same shards.

    python -m benchmarks.swift_weights --student MODEL --teacher MODEL --stories STORIES.jsonl --out
    docs/swift_weights.md python -m benchmarks.swift_weights --smoke

A small story writer learns from stories' endings by self-play, two iterations per run. Everything that does not depend
on the variant (prompts, the first iteration's generations, the teacher's pass over the ground truths) is built once and
shared through the store. Two measures on held-out stories: how likely the policy finds the true endings (nats per
token), and how likely the teacher finds the policy's endings (nats per character, since the two models cut text
differently). Intervals: paired bootstrap over stories and seeds against the start model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import numpy as np

import stages.training.engine
from benchmarks._smoke import add_smoke, parse, tiny_model, write_stories
from data_contracts.checkpoint import external_model
from data_contracts.store import Store
from flows.config import RunConfig, SamplingConfig
from flows.preflight import Checked
from flows.self_play import SelfPlay
from stages.evaluation.intervals import paired_bootstrap
from stages.models.logps import Pass
from stages.models.policy import load_causal_lm, score_responses
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.transformers import Transformers
from tasks.data.prompt_set import PromptSet
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


Measures = tuple[dict[str, float], dict[str, float]]
"""By prompt id: nats per token of the true ending under the policy; nats per character of the policy's ending under
the teacher."""


def stories(path: Path, count: int) -> list[dict]:
    """Rows of prompts. Prompt: a story's first two sentences; response: the next three. Leaves out shorter stories."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        data = json.loads(line)
        text = data
        if isinstance(data, dict):
            text = data.get("text") or data["story"]
        sentences = re.split(r"(?<=[.!?\"])\s+", " ".join(text.split()))
        if len(sentences) < 5:
            continue
        row = {
            "prompt_id": f"story-{number:04d}",
            "messages": [{"role": "user", "content": " ".join(sentences[:2])}],
            "checks": "[]",
            "response": " " + " ".join(sentences[2:5]),
        }
        rows.append(row | {"chosen": None, "rejected": None, "source": "stories"})
        if len(rows) == count:
            break
    return rows


def config_of(options: argparse.Namespace, variant: dict, seed: int) -> RunConfig:
    """The run of a variant and seed; the same but for these two."""
    base = {
        "name": "swift-weights", "policy": {"path": options.student}, "models": {"teacher": {"path": options.teacher}},
        "seed": seed, "iterations": options.iterations, "prompts": {"train": "-", "heldout": "-", "reuse": True},
        "sampling": {
            "backend": {"name": "transformers", "dtype": "float32"}, "template": "plain", "num_candidates": 1,
            "max_prompt_tokens": options.prompt_tokens, "max_new_tokens": options.new_tokens,
        },
        "training": {
            "learning_rate": options.learning_rate, "epochs": 2, "batch_size": 8, "dtype": "float32",
            "runtime": {"batch_tokens": 4096},
        },
        "scoring": {"max_response_tokens": options.new_tokens},
        "evaluation": {"scorer": {"name": "length"}},
    }  # fmt: skip
    return RunConfig.model_validate(base | variant)


class Judge:
    """Both measures of a policy on the held-out stories."""

    def __init__(self, store: Store, teacher: str, rows: list[dict]):
        self.rows = rows
        self.teacher = Pass(store.root, external_model(Path(teacher)), "bfloat16", "cpu", 8192)
        self.teacher_turns = Turns(teacher, TurnConfig(template="plain"))

    def measure(self, policy: str, sampling: SamplingConfig, seed: int) -> Measures:
        turns = Turns(policy, sampling)
        ids = [row["prompt_id"] for row in self.rows]
        prompts = [turns.prompt(row["messages"]) for row in self.rows]
        # Without the end token: the stories are cut, their end is no ending.
        truths = [turns.text.encode(row["response"]) for row in self.rows]
        model = load_causal_lm(policy, "float32", "cpu").eval()
        means = [float(logps.mean()) for logps in score_responses(model, prompts, truths, 8192)]
        sampler = Transformers(sampling.backend, sampling, policy, turns.stop_ids, "cpu", turns.blank_ids)
        requests = [
            Prompt(name, prompt, candidate_seeds(seed + 1000, name, 1))
            for name, prompt in zip(ids, prompts, strict=True)
        ]
        answers = [group[0].token_ids for group in sampler.generate(requests)]
        texts = [turns.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        before = [self.teacher_turns.prompt(row["messages"]) for row in self.rows]
        after = [self.teacher_turns.text.encode(text or " ") for text in texts]
        self.teacher.fill(before, after)
        sums = [float(logps.sum()) for logps in self.teacher.get(before, after)]
        scores = [total / max(1, len(text)) for total, text in zip(sums, texts, strict=True)]
        return dict(zip(ids, means, strict=True)), dict(zip(ids, scores, strict=True))


def play_variant(config: RunConfig, train: list[dict], heldout: list[dict], store: Store) -> str:
    """Play a run in this process, without Prefect; returns the path of its last checkpoint."""
    models = {}
    if "teacher" in config.roles:
        models["teacher"] = external_model(Path(config.models.teacher.path))
    checked = Checked(PromptSet.of(train), PromptSet.of(heldout[:1]), config.evaluation)
    start = external_model(Path(config.policy.path))
    loop = SelfPlay(config, checked, start, models, HandsInProcess(), History())
    return loop.play(Place(str(store.root), config.name)).path


def measure_variants(options: argparse.Namespace, store: Store) -> dict[str, list[Measures]]:
    """Variant -> measures of each seed; "start" is the start model."""
    rows = stories(Path(options.stories), options.train + options.heldout)
    train, heldout = rows[: options.train], rows[options.train :]
    began, judge = time.monotonic(), Judge(store, options.teacher, heldout)
    sampling = config_of(options, VARIANTS["SPIN"], 0).sampling
    seeds = range(options.seeds)
    measures = {"start": [judge.measure(options.student, sampling, seed) for seed in seeds]}
    for name in options.variants:
        measures[name] = []
        for seed in seeds:
            final = play_variant(config_of(options, VARIANTS[name], seed), train, heldout, store)
            measures[name].append(judge.measure(final, sampling, seed))
            means = [round(float(np.mean(list(measure.values()))), 4) for measure in measures[name][-1]]
            print(name, seed, means, f"{time.monotonic() - began:.0f} s", flush=True)
    return measures


def by_story_and_seed(runs: list[Measures], column: int) -> dict[str, float]:
    """One of the two measures over all seeds."""
    return {f"{seed}/{name}": value for seed, run_ in enumerate(runs) for name, value in run_[column].items()}


def render(measures: dict[str, list[Measures]], options: argparse.Namespace) -> str:
    """The page docs/swift_weights.md, without its discussion."""
    lines = [
        "# Does the teacher's weight help? SWIFT, SPIN and SWIFT's ablations on the same shards", "",
        f"Student {Path(options.student).name}, teacher {Path(options.teacher).name}; {options.train} stories to train "
        f"on, {options.heldout} held out, {options.seeds} seeds, {options.iterations} iterations, RMSprop, learning "
        f"rate {options.learning_rate:g}, batch 8, two epochs. Change against the start model with its 95 % interval "
        "(paired bootstrap over stories and seeds). "
        "Made by `python -m benchmarks.swift_weights`.", "",
        "| variant | true endings under the policy, nats per token "
        "| policy's endings under the teacher, nats per character |", "|---|---|---|",
    ]  # fmt: skip
    base = [by_story_and_seed(measures["start"], column) for column in (0, 1)]
    means = [float(np.mean(list(values.values()))) for values in base]
    lines.append(f"| start | {means[0]:.4f} | {means[1]:.4f} |")
    for name in options.variants:
        gains = [paired_bootstrap(base[column], by_story_and_seed(measures[name], column)) for column in (0, 1)]
        cells = [f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" for gain in gains]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swift_weights")
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--stories")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", default="store")
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--heldout", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add_smoke(parser)
    options = parse(parser, arguments, required=("student", "teacher", "stories"))
    # DeepSpeed keeps the first process group for ever; the trainings of this process share it.
    stages.training.engine.Engine.close = lambda self: None
    with tempfile.TemporaryDirectory() as directory:
        if options.smoke:
            root = Path(directory)
            options.student, options.teacher = tiny_model(root / "student"), tiny_model(root / "teacher", seed=1)
            options.stories, options.store = write_stories(root / "stories.jsonl", 10), str(root / "store")
            options.train, options.heldout, options.seeds, options.iterations = 6, 4, 1, 1
            options.prompt_tokens, options.new_tokens = 160, 8
            options.variants = ["SWIFT (teacher)", "SPIN"]
        text = render(measure_variants(options, Store(options.store)), options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's end prints warnings
