"""Tokens per second of SWIFT's weights across two tokenizers: the weigh stage against the released procedure, on the same pairs, in one run.

    python -m benchmarks.weights --student MODEL --teacher MODEL --stories STORIES.jsonl [--dtype float32] [--json out.json]

The released procedure, as its code has it and as we wrote it anew: chosen and rejected one after the other, batches of --batch padded
sequences, both models over prompt and response, log-softmax over the whole vocabulary at every position, moved to numpy, and a Python loop per
token that picks scores and averages them over components. (Its shifted index and its commented-out student pass are left aside: with them its
weights would not be the paper's, and nothing could be compared.) Pairs: a story's opening with its true ending (chosen) and with another
story's (rejected). Iteration 1 has the same chosen and new rejected responses, as in a run; its store holds what iteration 0 computed,
and its policy is another model than the one before, so that only the teacher's half of the work can be found again.

Time: the stage from scored pairs to weighted pairs, without loading models. Both sides use the same model objects and threads; repetitions are
interleaved, medians reported, on the wall and on the processor. It fails if the weights differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch

import stages.models.logps
from benchmarks.swift_weights import stories
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.shards import SCHEMAS, read_shards
from data_contracts.store import Store
from stages.execute import execute
from stages.models.policy import load_causal_lm, pin_threads
from stages.models.tokens import encode_prompt, encode_response, load_tokenizer
from stages.stage import STAGES
from stages.weighting.weights.spans import TokenText, encode_with_spans
from tests.conftest import _publish

K, MU, LOW, HIGH = 1.0, 1.0, -0.5, 1.5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Of a weight, on average; single ones differ more in bf16."""


def pairs_of(rows: list[dict], tokenizer, shift: int) -> list[dict]:
    """Rows of scored_pairs; the rejected response is that of the story `shift` further on."""
    out = []
    for number, row in enumerate(rows):
        other = rows[(number + shift) % len(rows)]
        pair = dict.fromkeys(SCHEMAS["scored_pairs"].names) | {
            "pair_id": f"{number}/{shift}",
            "prompt_id": row["prompt_id"],
        }
        pair |= {
            "chosen": row["response"],
            "rejected": other["response"],
            "scorer": "none",
            "win_rate_chosen": 1.0,
            "win_rate_rejected": 0.0,
        }
        pair |= {f"{side}_ids": encode_response(tokenizer, pair[side]) for side in ("chosen", "rejected")}
        pair |= {
            "chosen_candidate": -1,
            "rejected_candidate": 0,
            "prompt_ids": encode_prompt(tokenizer, row["messages"], "plain"),
        }
        out.append(pair)
    return out


def released(pairs: list[dict], student, teacher, tokenizers, batch: int) -> list[list[float]]:
    """Weights of every response, chosen and rejected of a pair beside each other."""
    mine, theirs = tokenizers
    reader, found = TokenText(mine), [[] for _ in range(2 * len(pairs))]
    for side_number, side in enumerate(("chosen", "rejected")):
        for start in range(0, len(pairs), batch):
            chunk = pairs[start : start + batch]
            read = [reader.read(pair[f"{side}_ids"][:-1]) for pair in chunk]
            texts, spans = [text for text, _ in read], [span for _, span in read]
            other_ids, other_spans = encode_with_spans(theirs, texts)
            other_ids = [[*ids, theirs.eos_token_id] for ids in other_ids]
            student_scores = _scores(
                student, [pair["prompt_ids"] for pair in chunk], [pair[f"{side}_ids"] for pair in chunk]
            )
            prompts = [
                list(theirs(mine.decode(pair["prompt_ids"], skip_special_tokens=False)).input_ids) for pair in chunk
            ]
            teacher_scores = _scores(teacher, prompts, other_ids)
            for j in range(len(chunk)):
                weights = _weights(spans[j], other_spans[j], student_scores[j], teacher_scores[j], len(texts[j]))
                found[2 * (start + j) + side_number] = weights
    return found


def _scores(model, prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, mask = torch.zeros(len(prompts), length, dtype=torch.long), torch.zeros(len(prompts), length, dtype=torch.long)
    for j, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[j, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[j, : len(prompt) + len(response)] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
    out = []
    for j, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = []
        for t, token in enumerate(response):
            row.append(float(logps[j, len(prompt) - 1 + t, token]))
        out.append(row)
    return out


def _weights(
    mine: np.ndarray, theirs: np.ndarray, student: list[float], teacher: list[float], length: int
) -> list[float]:
    """Components begin where a token begins in both tokenizations; every student token is the mean over its component's teacher tokens."""
    common = sorted({int(span[0]) for span in mine} & {int(span[0]) for span in theirs} | {0})
    weights = []
    for i, span in enumerate(mine):
        begin = max(point for point in common if point <= int(span[0]))
        end = min((point for point in common if point > int(span[0])), default=length)
        values = []
        for r, other in enumerate(theirs):
            if begin <= int(other[0]) < end:
                values.append(K * float(np.exp(MU * min(max(teacher[r] - student[i], LOW), HIGH))))
        weights.append(sum(values) / len(values) if values else K)
    return [*weights, K * float(np.exp(MU * min(max(teacher[-1] - student[-1], LOW), HIGH)))]


def now() -> np.ndarray:
    """The clock on the wall, and the processor's time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def stage(
    store: Store, pairs: list[dict], policy: ArtifactRef, teacher: ArtifactRef, options: argparse.Namespace
) -> tuple[Any, list]:
    """Seconds (see `now`), and the weights as `released` gives them."""
    weigh = STAGES["weigh"]
    config = weigh.parse({
        "weights": {"name": "swift", "segmenter": "common_starts"}, "dtype": options.dtype,
        "runtime": {"batch_tokens": options.batch_tokens, "device": "cpu"},
    })  # fmt: skip
    inputs = {
        "pairs": _publish(store, "scored_pairs", pairs),
        "policy": policy,
        "reference": policy,
        "teacher": teacher,
    }
    began = now()
    record = execute(weigh, config, inputs, store)
    seconds = now() - began
    rows = {
        row["pair_id"]: row
        for row in read_shards(store.directory(record.kind, record.key), "weighted_pairs").to_pylist()
    }
    return seconds, [rows[pair["pair_id"]][f"{side}_weights"] for pair in pairs for side in ("chosen", "rejected")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--student", "--teacher", "--stories"):
        parser.add_argument(name, required=True)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences per forward of the released procedure")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pin_threads(options.threads)
    rows = stories(Path(options.stories), options.pairs)
    tokenizers = load_tokenizer(options.student), load_tokenizer(options.teacher)
    policy, teacher = external_model(Path(options.student)), external_model(Path(options.teacher))
    # The next iteration's policy: the same weights, known to the store as another model.
    later = policy.model_copy(update={"content": "f" * 64, "key": "0" * len(policy.key)})
    models = {ref.path: load_causal_lm(ref.path, options.dtype, "cpu").eval() for ref in (policy, teacher)}
    stages.models.logps.Pass._load = lambda self: models[self.model.path]
    first, second = pairs_of(rows, tokenizers[0], 1), pairs_of(rows, tokenizers[0], 2)
    seconds: dict[str, list[Any]] = {"released": [], "stage, iteration 0": [], "stage, iteration 1": []}
    for _ in range(options.repeats):
        began = now()
        expected = released(first, models[policy.path], models[teacher.path], tokenizers, options.batch)
        seconds["released"].append(now() - began)
        with tempfile.TemporaryDirectory() as directory:
            store = Store(directory)
            taken, weights = stage(store, first, policy, teacher, options)
            seconds["stage, iteration 0"].append(taken)
            seconds["stage, iteration 1"].append(stage(store, second, later, teacher, options)[0])
    tokens = sum(len(pair[f"{side}_ids"]) for pair in first for side in ("chosen", "rejected"))
    gaps = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)) for a, b in zip(expected, weights, strict=True)])
    rate = {name: tokens / np.median(values, axis=0) for name, values in seconds.items()}
    print(
        f"\nstudent {Path(options.student).name}, teacher {Path(options.teacher).name}, {options.dtype}, {len(first)} pairs, {tokens} response tokens, "
        f"{torch.get_num_threads()} threads, medians of {options.repeats}\n\n| side | tokens/s | tokens/CPU s | / released, wall and CPU | / iteration 0 |\n|---|---|---|---|---|"
    )
    for name, value in rate.items():
        gain, later_gain = value / rate["released"], value / rate["stage, iteration 0"]
        print(
            f"| {name} | {value[0]:.0f} | {value[1]:.0f} | {gain[0]:.2f}, {gain[1]:.2f} | {later_gain[0]:.2f}, {later_gain[1]:.2f} |"
        )
    print(f"\nweights differ by {gaps.mean():.1e} on average, {gaps.max():.1e} at most")
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = {name: {"wall and CPU": value.tolist()} for name, value in rate.items()}
        record |= {"mean_gap": gaps.mean(), "max_gap": gaps.max(), "options": settings}
        options.json.write_text(json.dumps(record, indent=1))
    if gaps.mean() > TOLERANCE[options.dtype]:
        raise SystemExit("the weights differ: the comparison is void")


if __name__ == "__main__":
    main()
