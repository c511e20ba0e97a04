"""DPO pairs per second and peak memory of the train stage against TRL's DPOTrainer, on the same pairs, at equal losses, in one run.

    python -m benchmarks.train --model models/smollm2-135m-instruct [--dtype bfloat16] [--pairs PREFERENCES.json] [--json out.json]

Sides, each in a process of its own, repetitions interleaved, medians reported:

    ours             the train stage's loop: reference log-probs are in the rows
    reference        the weigh stage's reference pass over the same pairs; `ours + reference` adds it, once per pair and epoch
    trl live         DPOTrainer with its reference model in memory
    trl precomputed  DPOTrainer(precompute_ref_log_probs=True); its pass is timed apart

Both trainers take the same tokens in the same order: optimizer AdamW, linear schedule, clip 1, `--batch` pairs per update. TRL pads every
micro-batch of `--micro` pairs to its longest response (its only way); the stage cuts by `--batch-tokens`. TRL runs without activation
checkpointing, its default is slower; `--trl-dtype weights` gives it pure bfloat16 weights, which is faster than its default (autocast over
float32 weights) and keeps no float32 master copy. Time: from the end of the first update to the end of the last, on the wall and on the
processor (which other work on the machine does not stretch). Memory: the process's
peak resident set (ru_maxrss), interpreter and libraries included. It fails if the losses of any update differ by more than --tolerance.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
BETA, RATE = 0.1, 1e-5


# -- the pairs


def pairs_of(options: argparse.Namespace) -> list[dict]:
    """Token ids of prompt, chosen and rejected. Without a file: the quickstart's prompts, and responses of 8 to 32 random tokens."""
    from stages.models.tokens import encode_prompt, encode_response, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    draw, rows = random.Random(0), []
    if options.pairs:
        for item in json.loads(Path(options.pairs).read_text()):
            roles = {"human": "user", "gpt": "assistant", "system": "system"}
            messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in item["conversations"]]
            prompt = encode_prompt(tokenizer, messages, "chat")
            sides = [encode_response(tokenizer, item[side]["value"]) for side in ("chosen", "rejected")]
            rows.append((prompt[-options.max_prompt :], *(side[: options.max_response] for side in sides)))
    else:
        for line in (ROOT / "deploy" / "prompts" / "quickstart_train.jsonl").read_text().splitlines():
            prompt = encode_prompt(tokenizer, json.loads(line)["messages"], "chat")
            rows.append(
                (prompt, *([draw.randrange(100, len(tokenizer)) for _ in range(draw.randint(8, 32))] for _ in range(2)))
            )
    rows = [row for row in rows if row[1] != row[2]]
    draw.shuffle(rows)
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows[: options.count]]


# -- the sides; each runs in a process of its own and returns seconds, losses


def reference(work: dict) -> dict:
    """The reference pass; leaves its log-probs beside the work file for `ours`."""
    from stages.models.policy import load_causal_lm, pin_threads, score_responses

    pin_threads(work["threads"])
    model = load_causal_lm(work["model"], work["dtype"], "cpu").eval()
    rows = work["pairs"]
    prompts = [row["prompt_ids"] for row in rows] * 2
    responses = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
    score_responses(model, prompts[:2], responses[:2], work["batch_tokens"])
    began = _now()
    logps = score_responses(model, prompts, responses, work["batch_tokens"])
    seconds, cpu_seconds = (now - before for now, before in zip(_now(), began, strict=True))
    Path(work["directory"], "logps.json").write_text(json.dumps([values.tolist() for values in logps]))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "pairs": len(rows), "losses": []}


def _now() -> tuple[float, float]:
    """The clock on the wall, and the processor's time of this process."""
    return time.perf_counter(), time.process_time()


def ours(work: dict) -> dict:
    from data_contracts.shards import SCHEMAS
    from stages.models.policy import pin_threads
    from stages.training.loop import train
    from stages.training.stage import TrainingConfig

    pin_threads(work["threads"])
    logps, rows = json.loads(Path(work["directory"], "logps.json").read_text()), []
    for number, pair in enumerate(work["pairs"]):
        row = dict.fromkeys(SCHEMAS["weighted_pairs"].names) | pair | {"pair_id": str(number)}
        row |= {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0}
        for half, side in enumerate(("chosen", "rejected")):
            row[f"{side}_reference_logps"] = logps[half * len(work["pairs"]) + number]
            row[f"{side}_weights"] = [1.0] * len(pair[f"{side}_ids"])
        rows.append(row)
    config = TrainingConfig.model_validate({
        "method": {"name": "dpo", "beta": BETA}, "learning_rate": RATE, "batch_size": work["batch"], "optimizer": "adamw",
        "dtype": work["dtype"], "warmup_ratio": 0.0, "seed": SEED,
        "runtime": {"device": "cpu", "batch_tokens": work["batch_tokens"], "save_every_steps": 10**6, **work["runtime"]},
    })  # fmt: skip
    seen: list[tuple[Any, float]] = []
    out = Path(work["directory"], "ours")
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    from stages.training.engine import Engine

    Engine.export = lambda self, directory: None  # TRL does not save either
    train(
        config,
        rows,
        work["model"],
        None,
        None,
        out,
        "cpu",
        lambda done, total, metrics: seen.append((_now(), metrics["loss"])),
    )
    return _between(seen, work)


SEED = 0


def trl(work: dict, precompute: bool) -> dict:
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

    seen: list[tuple[Any, float]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append((_now(), 0.0))

    pure = work["dtype"] == "bfloat16" and work["trl_dtype"] == "weights"
    dtype = torch.bfloat16 if pure else torch.float32
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)  # noqa: E731
    config = DPOConfig(
        output_dir=str(Path(work["directory"], "trl")), per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=work["batch"] // work["micro"], learning_rate=RATE, beta=BETA, num_train_epochs=1, use_cpu=True,
        bf16=work["dtype"] == "bfloat16" and not pure, gradient_checkpointing=False, precompute_ref_log_probs=precompute, max_length=None,
        logging_steps=1, save_strategy="no", report_to=[], warmup_steps=0, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer = Trainer(
        model=load(), ref_model=None if precompute else load(), args=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(work["model"]),
        train_dataset=Dataset.from_list([work["pairs"][i] for i in order]), callbacks=[Watch()],
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return _between([(at, loss) for (at, _), loss in zip(seen, losses, strict=True)], work) | {
        "start_seconds": started - began
    }


def _between(seen: list[tuple[Any, float]], work: dict) -> dict:
    seconds, cpu_seconds = (last - first for first, last in zip(seen[0][0], seen[-1][0], strict=True))
    pairs = len(work["pairs"]) - work["batch"]
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "pairs": pairs, "losses": [loss for _, loss in seen]}


SIDES = {
    "reference": reference,
    "ours": ours,
    "trl live": lambda work: trl(work, False),
    "trl precomputed": lambda work: trl(work, True),
}


def one_side(path: Path, side: str) -> None:
    result = SIDES[side](json.loads(path.read_text()))
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    path.with_name(f"{side}.json").write_text(json.dumps(result))
    os._exit(0)  # without DeepSpeed's goodbye


def in_process(path: Path, side: str, threads: int) -> dict:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(path.parent / f"cache-{time.time_ns()}"),
    }
    command = [sys.executable, "-m", "benchmarks.train", "--side", side, "--work", str(path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(path.with_name(f"{side}.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument(
        "--pairs", help="a JSON list of {conversations, chosen, rejected}; default: the quickstart's prompts"
    )
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
    options = parser.parse_args()
    if options.side:
        one_side(options.work, options.side)
    pairs = pairs_of(options)
    with tempfile.TemporaryDirectory() as directory:
        names = ("model", "batch", "micro", "batch_tokens", "dtype", "trl_dtype", "threads", "runtime")
        work = {name: getattr(options, name) for name in names} | {"pairs": pairs, "directory": directory}
        path = Path(directory, "work.json")
        path.write_text(json.dumps(work))
        runs: dict[str, list[dict]] = {side: [] for side in options.sides}
        for _ in range(options.repeats):
            for side in options.sides:
                runs[side].append(in_process(path, side, options.threads))
                print(side, {k: round(v, 2) for k, v in runs[side][-1].items() if k != "losses"}, flush=True)
    report(runs, pairs, options)


def report(runs: dict[str, list[dict]], pairs: list[dict], options: argparse.Namespace) -> None:
    lengths = {name: [len(row[f"{name}_ids"]) for row in pairs] for name in ("prompt", "chosen", "rejected")}
    means = {name: round(statistics.mean(values), 1) for name, values in lengths.items()}
    print(
        f"\n{Path(options.model).name}, {options.dtype} (TRL: {options.trl_dtype}), {len(pairs)} pairs, mean tokens {means}, {options.batch} pairs per "
        f"update; TRL {options.micro} pairs per forward, ours {options.batch_tokens} tokens; {options.threads} threads, {options.repeats} repetitions\n"
    )
    rate = {side: statistics.median(run["pairs"] / run["seconds"] for run in of) for side, of in runs.items()}
    cpu = {side: statistics.median(run["pairs"] / run["cpu_seconds"] for run in of) for side, of in runs.items()}
    peak = {side: statistics.median(run["peak_mib"] for run in of) for side, of in runs.items()}
    losses = {side: of[0]["losses"] for side, of in runs.items() if of and of[0]["losses"]}
    if {"ours", "reference"} <= rate.keys():
        for one in (rate, cpu):
            one["ours + reference"] = 1 / (1 / one["ours"] + 1 / one["reference"])
        peak["ours + reference"] = max(peak["ours"], peak["reference"])
    theirs = [side for side in ("trl live", "trl precomputed") if side in rate]
    print(
        "| side | pairs/s | pairs/CPU s | peak MiB | "
        + " | ".join(f"speed / {o} | CPU | memory" for o in theirs)
        + " |"
    )
    print("|---|---|---|---|" + "---|---|---|" * len(theirs))
    for side in rate:
        ratios = [f"{rate[side] / rate[o]:.2f} | {cpu[side] / cpu[o]:.2f} | {peak[side] / peak[o]:.2f}" for o in theirs]
        print(f"| {side} | {rate[side]:.2f} | {cpu[side]:.2f} | {peak[side]:.0f} | " + " | ".join(ratios) + " |")
    tolerance, worst = options.tolerance or TOLERANCE[options.dtype], 0.0
    for side in theirs:
        if "ours" in losses:
            worst = max(worst, *(abs(a - b) for a, b in zip(losses["ours"], losses[side], strict=True)))
    print(f"\nlosses {[round(loss, 5) for loss in losses.get('ours', [])]}; largest difference from TRL's {worst:.1e}")
    if options.json:
        record = {
            "rate": rate,
            "cpu_rate": cpu,
            "peak_mib": peak,
            "runs": runs,
            "tokens": means,
            "worst_loss_difference": worst,
        }
        options.json.write_text(
            json.dumps(record | {"options": {k: str(v) for k, v in vars(options).items()}}, indent=1)
        )
    if worst > tolerance:
        raise SystemExit(f"the losses differ by {worst:.2e}: the comparison is void")


if __name__ == "__main__":
    main()
