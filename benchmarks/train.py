"""Benchmark - training: DPO pairs per second and peak memory against TRL's DPOTrainer, at equal losses.

    python -m benchmarks.train --model models/smollm2-135m-instruct [--dtype bfloat16] [--pairs PREFERENCES.json]
    [--json out.json] python -m benchmarks.train --smoke

Sides, each in a process of its own, repetitions interleaved, medians reported:

    ours             the train stage's loop: reference log-probs are in the rows
    reference        the weigh stage's reference pass over the same pairs; `ours + reference` adds it, once per pair
    trl live         DPOTrainer with its reference model in memory
    trl precomputed  DPOTrainer(precompute_ref_log_probs=True); its pass is timed apart

Both trainers take the same tokens in the same order: optimizer AdamW, linear schedule, clip 1, `--batch` pairs per
update. TRL pads every micro-batch of `--micro` pairs to its longest response (its only way); the stage cuts by
`--batch-tokens`. TRL runs without activation checkpointing, its default is slower; `--trl-dtype weights` gives it pure
bfloat16 weights, which is faster than its default (autocast over float32 weights) and keeps no float32 master copy.
Time: from the end of the first update to the end of the last, on the wall and on the processor (which other work on the
machine does not stretch). Memory: the process's peak resident set (ru_maxrss), interpreter and libraries included. It
fails if the losses of any update differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks._smoke import add_smoke, parse, tiny_model

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
BETA, RATE, SEED = 0.1, 1e-5, 0
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


# -- the pairs


def pairs_of(options: argparse.Namespace) -> list[dict]:
    """Token ids of prompt, chosen and rejected. Default: the quickstart's prompts, and random responses of 8 to 32."""
    from stages.models.turns import Turns

    turns = Turns(options.model)
    chance, rows = random.Random(0), []
    if options.pairs:
        for item in json.loads(Path(options.pairs).read_text()):
            messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in item["conversations"]]
            prompt = turns.prompt(messages)[-options.max_prompt :]
            sides = [turns.response(item[side]["value"]) for side in ("chosen", "rejected")]
            rows.append((prompt, *(side[: options.max_response] for side in sides)))
    else:
        for line in (ROOT / "deploy" / "prompts" / "quickstart_train.jsonl").read_text().splitlines():
            prompt = turns.prompt(json.loads(line)["messages"])
            lengths = [chance.randint(8, 32) for _ in range(2)]
            rows.append((prompt, *([chance.randrange(100, len(turns.tokenizer)) for _ in range(n)] for n in lengths)))
    rows = [row for row in rows if row[1] != row[2]]
    chance.shuffle(rows)
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows[: options.count]]


# -- the sides; each runs in a process of its own


class Moment(NamedTuple):
    """A point in time, in seconds."""

    wall: float
    cpu: float
    """CPU time of this process."""

    def since(self, earlier: Moment) -> dict[str, float]:
        return {"seconds": self.wall - earlier.wall, "cpu_seconds": self.cpu - earlier.cpu}


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


class Update(NamedTuple):
    """One optimizer update."""

    end: Moment
    loss: float
    margin: float
    """Mean difference of the implicit rewards, chosen minus rejected."""


def result_of(updates: list[Update], work: dict) -> dict:
    """Seconds from the first update's end to the last one's, the pairs trained in that time, all losses and margins."""
    seconds = updates[-1].end.since(updates[0].end)
    pairs = len(work["pairs"]) - work["batch"]
    curves = {"losses": [update.loss for update in updates], "margins": [update.margin for update in updates]}
    return {**seconds, "pairs": pairs, **curves}


def reference(work: dict) -> dict:
    """The reference pass; leaves its log-probs beside the work file for `ours`."""
    from stages.models.policy import load_causal_lm, pin_threads, score_responses

    pin_threads(work["threads"])
    model = load_causal_lm(work["model"], work["dtype"], work["device"]).eval()
    rows = work["pairs"]
    prompts = [row["prompt_ids"] for row in rows] * 2
    responses = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
    score_responses(model, prompts[:2], responses[:2], work["batch_tokens"])  # warm-up
    began = now()
    logps = score_responses(model, prompts, responses, work["batch_tokens"])
    seconds = now().since(began)
    Path(work["directory"], "logps.json").write_text(json.dumps([values.tolist() for values in logps]))
    return {**seconds, "pairs": len(rows), "losses": [], "margins": []}


def ours(work: dict) -> dict:
    """The train stage's loop on rows as the weigh stage writes them, with the log-probs of `reference`."""
    from data_contracts.shard_rows import ShardRows
    from data_contracts.shards import SCHEMAS, shard_path, to_table, write_shard
    from stages.models.policy import pin_threads
    from stages.training.engine import Engine
    from stages.training.loop import train
    from stages.training.stage import TrainingConfig

    pin_threads(work["threads"])
    directory, pairs = Path(work["directory"]), work["pairs"]
    logps, rows = json.loads((directory / "logps.json").read_text()), []
    for number, pair in enumerate(pairs):
        row = dict.fromkeys(SCHEMAS["weighted_pairs"].names) | pair | {"pair_id": str(number), "prompt_id": str(number)}
        row |= {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0, "chosen_candidate": 0, "rejected_candidate": 1}
        for half, side in enumerate(("chosen", "rejected")):
            row[f"{side}_reference_logps"] = logps[half * len(pairs) + number]
            row[f"{side}_weights"] = [1.0] * len(pair[f"{side}_ids"])
        rows.append(row)
    write_shard(shard_path(directory / "pairs", 0), to_table(rows, "weighted_pairs"))
    config = TrainingConfig.model_validate({
        "method": {"name": "dpo", "beta": BETA}, "learning_rate": RATE, "batch_size": work["batch"],
        "optimizer": work["optimizer"], "dtype": work["dtype"], "warmup_ratio": 0.0, "seed": SEED,
        "adapter": work.get("adapter"),
        "runtime": {
            "device": work["device"], "batch_tokens": work["batch_tokens"], "save_every_steps": 10**6, **work["runtime"],
        },
    })  # fmt: skip
    updates: list[Update] = []
    out = directory / "ours"
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    Engine.export = lambda self, directory: None  # TRL does not save either

    def report(done: int, total: int, metrics: dict[str, float]) -> None:
        updates.append(Update(now(), metrics["loss"], metrics["rewards/margins"]))

    table = ShardRows([directory / "pairs"], "weighted_pairs")
    train(config, table, work["model"], None, None, out, work["device"], report)
    return result_of(updates, work)


def trl(work: dict, precompute: bool) -> dict:
    """TRL's DPOTrainer on the same tokens in the same order; `start_seconds` is its set-up, with the precomputation."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from stages.training.batches import plan_steps

    torch.set_num_threads(work["threads"])
    order = [i for step in plan_steps(len(work["pairs"]), work["batch"], 1, SEED) for i in step.rows]

    class Trainer(DPOTrainer):
        """Our tokens, our order."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    ends: list[Moment] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(now())

    pure = work["dtype"] == "bfloat16" and work["trl_dtype"] == "weights"
    dtype = torch.float32
    if pure:
        dtype = torch.bfloat16

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)

    config = DPOConfig(
        output_dir=str(Path(work["directory"], "trl")), per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=work["batch"] // work["micro"], learning_rate=RATE, beta=BETA, num_train_epochs=1,
        use_cpu=work["device"] == "cpu", bf16=work["dtype"] == "bfloat16" and not pure, gradient_checkpointing=False,
        precompute_ref_log_probs=precompute, max_length=None, logging_steps=1, save_strategy="no", report_to=[],
        warmup_steps=0, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer = Trainer(
        model=load(), ref_model=None if precompute else load(), args=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(work["model"]),
        train_dataset=Dataset.from_list([work["pairs"][i] for i in order]), callbacks=[Watch()],
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    updates = [Update(end, line["loss"], line["rewards/margins"]) for end, line in zip(ends, lines, strict=True)]
    return result_of(updates, work) | {"start_seconds": started - began}


SIDES = {
    "reference": reference,
    "ours": ours,
    "trl live": lambda work: trl(work, False),
    "trl precomputed": lambda work: trl(work, True),
}


def one_side(path: Path, side: str) -> None:
    """Run a side in this process and write its result beside the work file."""
    result = SIDES[side](json.loads(path.read_text()))
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    path.with_name(f"{side}.json").write_text(json.dumps(result))
    os._exit(0)  # DeepSpeed's end prints warnings


def in_process(path: Path, side: str, threads: int) -> dict:
    """The result of a side, run in a process of its own. Exits with its last output if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(path.parent / f"cache-{time.time_ns()}"),
    }
    command = [sys.executable, "-m", "benchmarks.train", "--side", side, "--work", str(path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(path.with_name(f"{side}.json").read_text())


# -- the comparison


def measure(options: argparse.Namespace, pairs: list[dict], directory: Path) -> dict[str, list[dict]]:
    """Results of every repetition, by side."""
    names = ("model", "batch", "micro", "batch_tokens", "dtype", "trl_dtype", "threads", "runtime")
    work = {name: getattr(options, name) for name in names} | {"pairs": pairs, "directory": str(directory)}
    work |= {"device": "cpu", "optimizer": "adamw"}
    path = directory / "work.json"
    path.write_text(json.dumps(work))
    runs: dict[str, list[dict]] = {side: [] for side in options.sides}
    for _ in range(options.repeats):
        for side in options.sides:
            result = in_process(path, side, options.threads)
            runs[side].append(result)
            print(
                side,
                {name: round(value, 2) for name, value in result.items() if isinstance(value, int | float)},
                flush=True,
            )
    return runs


def worst_difference(runs: dict[str, list[dict]]) -> float:
    """Largest difference of an update's loss between ours and TRL's; 0 if one side is missing."""
    losses = {side: results[0]["losses"] for side, results in runs.items()}
    theirs = [losses[side] for side in losses if side.startswith("trl")]
    gaps = [abs(a - b) for other in theirs for a, b in zip(losses.get("ours", other), other, strict=True)]
    return max(gaps, default=0.0)


def report(runs: dict[str, list[dict]], pairs: list[dict], options: argparse.Namespace) -> None:
    """Print a line per side. Exits if the losses differ by more than the tolerance."""
    lengths = {name: [len(row[f"{name}_ids"]) for row in pairs] for name in ("prompt", "chosen", "rejected")}
    means = {name: round(statistics.mean(values), 1) for name, values in lengths.items()}
    print(
        f"\n{Path(options.model).name}, {options.dtype} (TRL: {options.trl_dtype}), {len(pairs)} pairs, mean tokens "
        f"{means}, {options.batch} pairs per update; TRL {options.micro} pairs per forward, ours "
        f"{options.batch_tokens} tokens; {options.threads} threads, {options.repeats} repetitions\n"
    )
    median = statistics.median
    rate = {side: median(run["pairs"] / run["seconds"] for run in results) for side, results in runs.items()}
    cpu = {side: median(run["pairs"] / run["cpu_seconds"] for run in results) for side, results in runs.items()}
    peak = {side: median(run["peak_mib"] for run in results) for side, results in runs.items()}
    if {"ours", "reference"} <= rate.keys():
        for rates in (rate, cpu):
            rates["ours + reference"] = 1 / (1 / rates["ours"] + 1 / rates["reference"])
        peak["ours + reference"] = max(peak["ours"], peak["reference"])
    others = [side for side in ("trl live", "trl precomputed") if side in rate]
    columns = " | ".join(f"speed / {other} | CPU | memory" for other in others)
    print(f"| side | pairs/s | pairs/CPU s | peak MiB | {columns} |")
    print("|---|---|---|---|" + "---|---|---|" * len(others))
    for side in rate:
        ratios = [
            f"{rate[side] / rate[other]:.2f} | {cpu[side] / cpu[other]:.2f} | {peak[side] / peak[other]:.2f}"
            for other in others
        ]
        print(f"| {side} | {rate[side]:.2f} | {cpu[side]:.2f} | {peak[side]:.0f} | " + " | ".join(ratios) + " |")
    worst = worst_difference(runs)
    losses = [round(loss, 5) for loss in runs["ours"][0]["losses"]] if "ours" in runs else []
    print(f"\nlosses {losses}; largest difference from TRL's {worst:.1e}")
    if options.json:
        record = {"rate": rate, "cpu_rate": cpu, "peak_mib": peak, "runs": runs, "tokens": means}
        record |= {"worst_loss_difference": worst, "options": {name: str(v) for name, v in vars(options).items()}}
        options.json.write_text(json.dumps(record, indent=1))
    if worst > (options.tolerance or TOLERANCE[options.dtype]):
        raise SystemExit(f"the losses differ by {worst:.2e}: the comparison is void")


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--model")
    parser.add_argument("--pairs", help="a JSON list of {conversations, chosen, rejected}; default: see pairs_of")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--max-prompt", type=int, default=256)
    parser.add_argument("--max-response", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="pairs per update")
    parser.add_argument("--micro", type=int, default=8, help="TRL's pairs per forward (8 is its default)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="our padded tokens per forward")
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--trl-dtype", default="weights", choices=["weights", "autocast"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--runtime", type=json.loads, default={}, help="more settings of training.runtime, as JSON")
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    add_smoke(parser)
    return parse(parser, arguments, required=("model",))


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(arguments)
    if options.side:
        one_side(options.work, options.side)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if options.smoke:
            options.model, options.dtype, options.threads, options.repeats = tiny_model(root / "model"), "float32", 1, 1
            options.count, options.batch, options.micro = 12, 4, 2
            options.sides = ["reference", "ours", "trl live"]
        pairs = pairs_of(options)
        runs = measure(options, pairs, root)
    report(runs, pairs, options)


if __name__ == "__main__":
    main()
