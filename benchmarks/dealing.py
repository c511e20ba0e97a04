"""Benchmark - dealing: which share of the ranks' time a step of each preset computes, by the arithmetic of its rows.

    python -m benchmarks.dealing [--steps 200]
    python -m benchmarks.dealing --smoke

The ranks of a step wait for each other at every micro-batch, so with equal time per token the useful share is

    tokens that all ranks compute / (ranks x sum over micro-batches of the fullest rank's tokens),

over the micro-batches that the trainer deals (stages/training/batches.py). `real`: of the tokens computed, those that are
no padding.
Lengths are drawn, not measured: prompts around 200 tokens, responses around 350 (log-normal, sigma 0.6, cut at the
preset's limits), as UltraFeedback's are. `at best`: what no dealing of whole rows can exceed, since a step takes at least
as long as its longest row. Needs no GPU and no model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks._smoke import add_smoke
from flows.config import RunConfig, load_run
from stages.methods import METHODS
from stages.training.batches import micro_batches, row_length
from stages.training.streams import PADDED

ROOT = Path(__file__).resolve().parents[1]
PROMPT, RESPONSE, SIGMA = 200, 350, 0.6


class Share(NamedTuple):
    """Of a preset's training."""

    preset: str
    ranks: int
    batch: int
    packed: bool
    useful: float
    at_best: float
    real: float


def share_of(preset: str, run: RunConfig, steps: int) -> Share:
    """The useful share over so many steps of drawn rows."""
    training, sides = run.training, run.spec.sides(run.method)
    runtime = training.runtime
    ranks = runtime.num_processes * runtime.num_nodes
    packed = runtime.packing and not METHODS.get(run.method.name).needs(run.method) & PADDED
    draw = np.random.default_rng(0)

    def lengths(mean: int, most: int) -> np.ndarray:
        return np.clip(draw.lognormal(np.log(mean), SIGMA, training.batch_size), 8, most).astype(int)

    real = computed = waited = whole = longest = 0
    for _ in range(steps):
        prompts = lengths(PROMPT, run.sampling.max_prompt_tokens)
        responses = {side: lengths(RESPONSE, run.sampling.max_new_tokens) for side in sides}
        rows = [
            {
                "prompt_ids": range(prompt),
                **{f"{side}_ids": range(values[number]) for side, values in responses.items()},
            }
            for number, prompt in enumerate(prompts)
        ]
        # Padded rows read the prompt once per side, so that much is work in any case.
        real += sum(
            sum(len(row[f"{side}_ids"]) for side in sides) + len(row["prompt_ids"]) * (1 if packed else len(sides))
            for row in rows
        )
        sizes = [row_length(row, sides, packed) for row in rows]
        dealt = [micro_batches(sizes, runtime.batch_tokens, rank, ranks, packed) for rank in range(ranks)]
        for together in zip(*dealt, strict=True):
            tokens = [_tokens(sizes, batch, packed) for batch in together]
            computed += sum(tokens)
            waited += ranks * max(tokens)
        longest += ranks * max(sizes)
        whole += sum(sizes)
    at_best = min(1.0, whole / longest)
    return Share(preset, ranks, training.batch_size, packed, computed / waited, at_best, real / computed)


def _tokens(sizes: list[int], batch: list[int], packed: bool) -> int:
    """Tokens that a micro-batch computes."""
    picked = [sizes[number] for number in batch]
    if not picked:  # the rank computes another's row, for nothing
        return 0
    return sum(picked) if packed else len(picked) * max(picked)


def shares(steps: int) -> list[Share]:
    """The shares of all presets that name their hardware."""
    presets = sorted(path.stem for path in (ROOT / "deploy" / "runs").glob("*-*.yaml"))
    return [share_of(preset, load_run(ROOT / "deploy" / "runs" / f"{preset}.yaml"), steps) for preset in presets]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dealing")
    parser.add_argument("--steps", type=int, default=200)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    print("| preset | ranks | pairs a step | rows | useful share | at best | real |\n|---|---|---|---|---|---|---|")
    for share in shares(2 if options.smoke else options.steps):
        kind = "packed" if share.packed else "padded"
        print(
            f"| {share.preset} | {share.ranks} | {share.batch} | {kind} | {share.useful:.3f} | {share.at_best:.3f} "
            f"| {share.real:.3f} |"
        )


if __name__ == "__main__":
    main()
