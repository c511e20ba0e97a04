"""Benchmark - sampling: tokens per second through the sample stage against bare vllm.LLM.generate, same engine.

    python -m benchmarks.sample --model models/smollm2-135m-instruct [--prompts 64] [--candidates 5] [--new-tokens 32]
    [--json out.json] python -m benchmarks.sample --smoke

bare   one call of LLM.generate with every prompt and SamplingParams(n=K): no seeds, no log-probs, with detokenization
logps  the same, with the sampled tokens' log-probs
stage  from the prompts artifact to the committed generations artifact: a seed for every candidate, the sampled
       tokens' log-probs, shards that are flushed to disk, checks, record

Repetitions are interleaved, each stage run in an empty store. Medians are reported, per second on the wall and per CPU
second (the CPU's engine runs in this process). Starting the engine (import, weights) is reported apart; either side
pays it once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

from benchmarks._smoke import add_smoke, parse, tiny_model
from data_contracts.checkpoint import external_model
from data_contracts.shards import read_shards
from data_contracts.store import Store
from stages.execute import execute
from stages.models.turns import Turns
from stages.sampling import SAMPLERS
from stages.sampling import stage as sampling
from stages.stage import STAGES
from tasks.data.reading import read_source
from tasks.data.source import Source
from tasks.prompts import publish

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One pass over all prompts."""

    tokens: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds."""


class Bench:
    """One vLLM engine, and the three ways to sample with it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        source = Source(path=str(ROOT / "deploy" / "prompts" / "quickstart_train.jsonl"))
        self.rows = read_source(source).prompts[: options.prompts]
        self.stage = STAGES["sample"]
        self.config = self.stage.parse({
            "backend": {"name": "vllm"}, "num_candidates": options.candidates, "temperature": 0.7, "top_p": 0.9,
            "max_prompt_tokens": 128, "max_new_tokens": options.new_tokens,
        })  # fmt: skip
        turns = Turns(options.model, self.config)
        self.stops = turns.stop_ids
        began = time.perf_counter()
        engine = SAMPLERS.get("vllm")
        device = sampling.pick_device("auto")
        sampler = engine(self.config.backend, self.config, options.model, self.stops, device, turns.blank_ids)
        self.start_seconds = time.perf_counter() - began
        self.sampler = sampler

        class Running(engine):
            """The stage takes the engine that runs already."""

            def __new__(cls, *_):
                return sampler

        SAMPLERS.get = lambda name: Running
        self.policy = external_model(Path(options.model))
        self.prompts = [{"prompt_token_ids": turns.prompt(row["messages"])} for row in self.rows]

    def bare(self, logprobs: int | None = None) -> Run:
        from vllm import SamplingParams

        self.sampler.engine.reset_prefix_cache()
        params = SamplingParams(
            n=self.options.candidates,
            temperature=0.7,
            top_p=0.9,
            max_tokens=self.options.new_tokens,
            stop_token_ids=self.stops,
            logprobs=logprobs,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self.sampler.engine.generate(self.prompts, params, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Run(sum(len(answer.token_ids) for output in outputs for answer in output.outputs), wall, cpu)

    def staged(self) -> Run:
        with tempfile.TemporaryDirectory() as directory:
            store = Store(directory)
            inputs = {"prompts": publish(self.rows, store), "policy": self.policy}
            wall, cpu = time.perf_counter(), time.process_time()
            record = execute(self.stage, self.config, inputs, store)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            table = read_shards(store.directory(record.kind, record.key), "generations")
            return Run(int(table["token_ids"].combine_chunks().value_lengths().to_numpy().sum()), wall, cpu)


def report(bench: Bench, runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Print a line per side; returns medians of tokens per second and per CPU second."""
    options = bench.options
    rate = {name: statistics.median(run.tokens / run.wall for run in sides) for name, sides in runs.items()}
    cpu = {name: statistics.median(run.tokens / run.cpu for run in sides) for name, sides in runs.items()}
    print(
        f"\n{Path(options.model).name}, {len(bench.rows)} prompts x {options.candidates} candidates "
        f"of up to {options.new_tokens} tokens, medians of {options.repeats}\n"
        f"starting the engine: {bench.start_seconds:.1f} s\n\n"
        "| side | tokens/s | / bare | tokens/CPU s | / bare |\n|---|---|---|---|---|"
    )
    for name, value in rate.items():
        ratio, cpu_ratio = value / rate["bare"], cpu[name] / cpu["bare"]
        print(f"| {name} | {value:.0f} | {ratio:.3f} | {cpu[name]:.0f} | {cpu_ratio:.3f} |")
    return {"tokens_per_second": rate, "tokens_per_cpu_second": cpu}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample")
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    add_smoke(parser)
    options = parse(parser, arguments, required=("model",))
    with tempfile.TemporaryDirectory() as directory:
        if options.smoke:
            options.model = tiny_model(Path(directory))
            options.prompts, options.candidates, options.new_tokens, options.repeats = 2, 2, 4, 1
        bench = Bench(options)
        bench.bare()  # warm-up
        runs: dict[str, list[Run]] = {"bare": [], "logps": [], "stage": []}
        for _ in range(options.repeats):
            runs["bare"].append(bench.bare())
            runs["logps"].append(bench.bare(logprobs=0))
            runs["stage"].append(bench.staged())
    rates = report(bench, runs)
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = {**rates, "runs": runs, "start_seconds": bench.start_seconds, "options": settings}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end takes seconds
