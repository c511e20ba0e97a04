"""Benchmark - weights: SWIFT's weights across two tokenizers, the weigh stage against the released procedure.

    python -m benchmarks.weights --student MODEL --teacher MODEL --stories STORIES.jsonl [--dtype float32] [--json
    out.json] python -m benchmarks.weights --smoke

The released procedure is written anew after its code: chosen and rejected one after the other, batches of --batch
padded sequences, both models over prompt and response, log-softmax over the whole vocabulary at every position, moved
to numpy, and a Python loop per token that picks scores and averages them over components. (Its shifted index and its
commented-out student pass are left aside: with them its weights would not be the paper's, and nothing could be
compared.) Pairs: a story's opening with its true ending (chosen) and with another story's (rejected). Iteration 1 has
the same chosen and new rejected responses, as in a run; its store holds what iteration 0 computed, and its policy is
another model than the one before, so that only the teacher's half of the work can be found again.

Time: the stage from scored pairs to weighted pairs, without loading models. Both sides use the same model objects and
threads; repetitions are interleaved, medians reported, on the wall and on the processor. It fails if the weights differ
by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch

import stages.models.logps
from benchmarks._smoke import add_smoke, parse, tiny_model, write_stories
from benchmarks.swift_weights import stories
from data_contracts.checkpoint import external_model
from data_contracts.shards import SCHEMAS, read_shards
from data_contracts.store import Store
from stages.execute import execute
from stages.models.policy import load_causal_lm, pin_threads
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns
from stages.stage import STAGES
from stages.weighting.weights.spans import TokenText, encode_with_spans
from tests.conftest import _publish

K, MU, LOW, HIGH = 1.0, 1.0, -0.5, 1.5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Of a weight, on average; single ones differ more in bf16."""


def pairs_of(rows: list[dict], turns: Turns, shift: int) -> list[dict]:
    """Rows of scored_pairs; the rejected response is that of the story `shift` further on."""
    pairs = []
    for number, row in enumerate(rows):
        other = rows[(number + shift) % len(rows)]
        pair = dict.fromkeys(SCHEMAS["scored_pairs"].names)
        pair |= {"pair_id": f"{number}/{shift}", "prompt_id": row["prompt_id"], "scorer": "none"}
        pair |= {"prompt_ids": turns.prompt(row["messages"])}
        pair |= {"chosen": row["response"], "win_rate_chosen": 1.0, "chosen_candidate": -1}
        pair |= {"rejected": other["response"], "win_rate_rejected": 0.0, "rejected_candidate": 0}
        pair |= {f"{side}_ids": turns.response(pair[side]) for side in ("chosen", "rejected")}
        pairs.append(pair)
    return pairs


# -- the released procedure


def released(pairs: list[dict], student, teacher, tokenizers, batch: int) -> list[list[float]]:
    """Weights of every response: chosen and rejected of the first pair, then of the second, and so on."""
    tokenizer, teacher_tokenizer = tokenizers
    reader = TokenText(tokenizer)
    weights: list[list[float]] = [[] for _ in range(2 * len(pairs))]
    for side_number, side in enumerate(("chosen", "rejected")):
        for start in range(0, len(pairs), batch):
            chunk = pairs[start : start + batch]
            texts, spans = zip(*(reader.read(pair[f"{side}_ids"][:-1]) for pair in chunk), strict=True)
            teacher_ids, teacher_spans = encode_with_spans(teacher_tokenizer, texts)
            teacher_ids = [[*ids, teacher_tokenizer.eos_token_id] for ids in teacher_ids]
            prompts = [pair["prompt_ids"] for pair in chunk]
            prompt_texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
            teacher_prompts = [list(teacher_tokenizer(text).input_ids) for text in prompt_texts]
            scores = _scores(student, prompts, [pair[f"{side}_ids"] for pair in chunk])
            teacher_scores = _scores(teacher, teacher_prompts, teacher_ids)
            for j, text in enumerate(texts):
                response = 2 * (start + j) + side_number
                weights[response] = _weights(spans[j], teacher_spans[j], scores[j], teacher_scores[j], len(text))
    return weights


def _scores(model, prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
    """Log-probs of the responses' tokens, nats."""
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids, mask = torch.zeros(len(prompts), length, dtype=torch.long), torch.zeros(len(prompts), length, dtype=torch.long)
    for j, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[j, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[j, : len(prompt) + len(response)] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
    scores = []
    for j, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = []
        for t, token in enumerate(response):
            row.append(float(logps[j, len(prompt) - 1 + t, token]))
        scores.append(row)
    return scores


def _weights(
    spans: np.ndarray, teacher_spans: np.ndarray, scores: list[float], teacher_scores: list[float], length: int
) -> list[float]:
    """Weights of one response's student tokens, EOS last.

    A component begins where a token begins in both tokenizations; a student token's weight is the mean over its
    component's teacher tokens.
    """
    starts = sorted({int(span[0]) for span in spans} & {int(span[0]) for span in teacher_spans} | {0})
    weights = []
    for i, span in enumerate(spans):
        begin = max(start for start in starts if start <= int(span[0]))
        end = min((start for start in starts if start > int(span[0])), default=length)
        values = [
            _weight(teacher_scores[r] - scores[i])
            for r, teacher_span in enumerate(teacher_spans)
            if begin <= int(teacher_span[0]) < end
        ]
        weights.append(sum(values) / len(values) if values else K)
    return [*weights, _weight(teacher_scores[-1] - scores[-1])]


def _weight(difference: float) -> float:
    """SWIFT, Eq. 5: k exp(mu clip(teacher - student, L, U))."""
    return K * float(np.exp(MU * min(max(difference, LOW), HIGH)))


# -- the stage, and the comparison


def now() -> np.ndarray:
    """The clock on the wall, and the CPU time of this process, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class Bench:
    """The pairs of two iterations, both models in memory, and the weigh stage."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        rows = stories(Path(options.stories), options.pairs)
        plain = TurnConfig(template="plain")
        student, teacher = Turns(options.student, plain), Turns(options.teacher, plain)
        self.tokenizers = student.tokenizer, teacher.tokenizer
        self.pairs = [pairs_of(rows, student, shift) for shift in (1, 2)]
        self.policy, self.teacher = external_model(Path(options.student)), external_model(Path(options.teacher))
        # The next iteration's policy: the same weights, known to the store as another model.
        self.next_policy = self.policy.model_copy(update={"content": "f" * 64, "key": "0" * len(self.policy.key)})
        self.models = {
            ref.path: load_causal_lm(ref.path, options.dtype, "cpu").eval() for ref in (self.policy, self.teacher)
        }
        models = self.models
        stages.models.logps.Pass._load = lambda self: models[self.model.path]

    def released(self) -> tuple[np.ndarray, list[list[float]]]:
        """Seconds (see `now`) and weights of the released procedure, on the first iteration's pairs."""
        student, teacher = self.models[self.policy.path], self.models[self.teacher.path]
        began = now()
        weights = released(self.pairs[0], student, teacher, self.tokenizers, self.options.batch)
        return now() - began, weights

    def stage(self, store: Store, iteration: int) -> tuple[np.ndarray, list[list[float]]]:
        """Seconds (see `now`) and weights of the weigh stage, the weights in the order of `released`."""
        weigh, pairs = STAGES["weigh"], self.pairs[iteration]
        policy = (self.policy, self.next_policy)[iteration]
        config = weigh.parse({
            "weights": {"name": "swift", "segmenter": "common_starts"}, "dtype": self.options.dtype,
            "template": "plain", "runtime": {"batch_tokens": self.options.batch_tokens, "device": "cpu"},
        })  # fmt: skip
        inputs = {"pairs": _publish(store, "scored_pairs", pairs)}
        inputs |= {"policy": policy, "reference": policy, "teacher": self.teacher}
        began = now()
        record = execute(weigh, config, inputs, store)
        seconds = now() - began
        table = read_shards(store.directory(record.kind, record.key), "weighted_pairs")
        rows = {row["pair_id"]: row for row in table.to_pylist()}
        sides = ("chosen", "rejected")
        return seconds, [rows[pair["pair_id"]][f"{side}_weights"] for pair in pairs for side in sides]


def report(bench: Bench, seconds: dict[str, list[np.ndarray]], gaps: np.ndarray) -> None:
    """Print a line per side. Exits if the weights differ by more than the tolerance."""
    options, pairs = bench.options, bench.pairs[0]
    tokens = sum(len(pair[f"{side}_ids"]) for pair in pairs for side in ("chosen", "rejected"))
    rate = {name: tokens / np.median(values, axis=0) for name, values in seconds.items()}
    print(
        f"\nstudent {Path(options.student).name}, teacher {Path(options.teacher).name}, {options.dtype}, "
        f"{len(pairs)} pairs, {tokens} response tokens, {torch.get_num_threads()} threads, "
        f"medians of {options.repeats}\n\n"
        "| side | tokens/s | tokens/CPU s | / released, wall and CPU | / iteration 0 |\n|---|---|---|---|---|"
    )
    for name, value in rate.items():
        gain, later_gain = value / rate["released"], value / rate["stage, iteration 0"]
        print(
            f"| {name} | {value[0]:.0f} | {value[1]:.0f} | {gain[0]:.2f}, {gain[1]:.2f} "
            f"| {later_gain[0]:.2f}, {later_gain[1]:.2f} |"
        )
    print(f"\nweights differ by {gaps.mean():.1e} on average, {gaps.max():.1e} at most")
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = {name: {"wall and CPU": value.tolist()} for name, value in rate.items()}
        record |= {"mean_gap": gaps.mean(), "max_gap": gaps.max(), "options": settings}
        options.json.write_text(json.dumps(record, indent=1))
    if gaps.mean() > (options.tolerance or TOLERANCE[options.dtype]):
        raise SystemExit(f"the weights differ by {gaps.mean():.2e} on average: the comparison is void")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights")
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--stories")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences per forward of the released procedure")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, help="of a weight, on average")
    parser.add_argument("--json", type=Path)
    add_smoke(parser)
    options = parse(parser, arguments, required=("student", "teacher", "stories"))
    pin_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if options.smoke:
            options.student, options.teacher = tiny_model(root / "student"), tiny_model(root / "teacher", seed=1)
            options.stories, options.pairs, options.repeats = write_stories(root / "stories.jsonl", 4), 4, 1
            options.dtype = "float32"
        bench = Bench(options)
        seconds: dict[str, list[np.ndarray]] = {"released": [], "stage, iteration 0": [], "stage, iteration 1": []}
        for number in range(options.repeats):
            taken, expected = bench.released()
            seconds["released"].append(taken)
            store = Store(root / f"store-{number}")
            taken, weights = bench.stage(store, 0)
            seconds["stage, iteration 0"].append(taken)
            seconds["stage, iteration 1"].append(bench.stage(store, 1)[0])
            shutil.rmtree(store.root)
    gaps = np.concatenate([np.abs(np.subtract(a, b)) for a, b in zip(expected, weights, strict=True)])
    report(bench, seconds, gaps)


if __name__ == "__main__":
    main()
