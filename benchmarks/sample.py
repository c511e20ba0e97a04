"""Tokens per second through the sample stage against bare vllm.LLM.generate, same engine, same prompts, in one run.

    python -m benchmarks.sample --model models/smollm2-135m-instruct [--prompts 64] [--candidates 5] [--new-tokens 32] [--json out.json]

bare   one call of LLM.generate with every prompt and SamplingParams(n=K): no seeds, no log-probs, with detokenization
logps  the same, with the sampled tokens' log-probs
stage  from the prompts artifact to the committed generations artifact: a seed for every candidate, the sampled tokens' log-probs, shards that
       are flushed to disk, checks, record

Repetitions are interleaved, each stage run in an empty store; medians reported, on the wall and (with the in-process engine of the CPU) on the
processor. Starting the engine (import, weights) is reported apart, and is
paid once by either.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

from data_contracts.checkpoint import external_model
from data_contracts.prompts import load_prompts
from data_contracts.shards import read_shards
from data_contracts.store import Store
from stages.execute import execute
from stages.models.tokens import encode_prompt, load_tokenizer, stop_ids
from stages.sampling import SAMPLERS
from stages.sampling import stage as sampling
from stages.stage import STAGES
from tasks.prompts import publish

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = load_prompts(ROOT / "deploy" / "prompts" / "quickstart_train.jsonl")[: options.prompts]
    stage = STAGES["sample"]
    config = stage.parse({
        "backend": {"name": "vllm"}, "num_candidates": options.candidates, "temperature": 0.7, "top_p": 0.9, "max_prompt_tokens": 128,
        "max_new_tokens": options.new_tokens,
    })  # fmt: skip
    tokenizer = load_tokenizer(options.model)
    stops = stop_ids(options.model, tokenizer)
    began = time.perf_counter()
    sampler = SAMPLERS.get("vllm")(config.backend, config, options.model, stops, sampling.pick_device("auto"))
    start_seconds = time.perf_counter() - began
    SAMPLERS.get = lambda name: lambda *_: sampler  # the stage takes the engine that is there
    policy = external_model(Path(options.model))
    prompts = [{"prompt_token_ids": encode_prompt(tokenizer, row["messages"], "chat")} for row in rows]

    def bare(logprobs: int | None = None) -> tuple[int, float, float]:
        from vllm import SamplingParams

        sampler.engine.reset_prefix_cache()
        params = SamplingParams(
            n=options.candidates,
            temperature=0.7,
            top_p=0.9,
            max_tokens=options.new_tokens,
            stop_token_ids=stops,
            logprobs=logprobs,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = sampler.engine.generate(prompts, params, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return sum(len(one.token_ids) for output in outputs for one in output.outputs), wall, cpu

    def staged() -> tuple[int, float, float]:
        with tempfile.TemporaryDirectory() as directory:
            store = Store(directory)
            inputs = {"prompts": publish(rows, store), "policy": policy}
            wall, cpu = time.perf_counter(), time.process_time()
            record = execute(stage, config, inputs, store)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            table = read_shards(store.directory(record.kind, record.key), "generations")
            return int(table["token_ids"].combine_chunks().value_lengths().to_numpy().sum()), wall, cpu

    bare()  # warm-up
    runs: dict[str, list[tuple[int, float, float]]] = {"bare": [], "logps": [], "stage": []}
    for _ in range(options.repeats):
        runs["bare"].append(bare())
        runs["logps"].append(bare(logprobs=0))
        runs["stage"].append(staged())
    rate = {name: statistics.median(tokens / wall for tokens, wall, _ in of) for name, of in runs.items()}
    cpu = {name: statistics.median(tokens / seconds for tokens, _, seconds in of) for name, of in runs.items()}
    print(
        f"\n{Path(options.model).name}, {len(rows)} prompts x {options.candidates} candidates of up to {options.new_tokens} tokens, medians of {options.repeats}"
    )
    print(
        f"starting the engine: {start_seconds:.1f} s\n\n| side | tokens/s | / bare | tokens/CPU s | / bare |\n|---|---|---|---|---|"
    )
    for name, value in rate.items():
        print(
            f"| {name} | {value:.0f} | {value / rate['bare']:.3f} | {cpu[name]:.0f} | {cpu[name] / cpu['bare']:.3f} |"
        )
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = {
            "tokens_per_second": rate,
            "tokens_per_cpu_second": cpu,
            "runs": runs,
            "start_seconds": start_seconds,
            "options": settings,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
    os._exit(0)
