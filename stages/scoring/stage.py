"""Stage - prompts + generations -> scored_pairs: score every candidate, keep the raw scores, derive the rows to train
on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow
from data_contracts.shard_rows import RowsByPrompt, ShardRows, prompt_hashes
from data_contracts.shards import read_shard, shard_path, shard_paths, to_table, write_shard
from stages.job import Job
from stages.models.lazy import import_auto_classes
from stages.models.logps import Pass
from stages.models.turn_settings import TurnConfig, ending_of
from stages.registry import Named
from stages.running.cost import loading
from stages.running.history import events
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scorer, Scores, Services, compares, open_scorer, score_once, scorer_class
from stages.scoring.models import DEFAULT_TOKENS
from stages.scoring.pairing import PAIRINGS, Preference, pair_statistics
from stages.scoring.rows import GivenTexts, RowMaker
from stages.scoring.shortcuts import Ends, causes, sentences, told_apart
from stages.scoring.totals import ScoreTotals
from stages.stage import StageRuntime


class ScoringRuntime(StageRuntime):
    prompts_per_shard: int = Field(256, ge=1)
    """Prompts that are scored again, at most, after a scorer was killed."""
    batch_tokens: int | None = Field(None, ge=1)
    """Padded tokens per forward of a scorer's model, or of the start model: what bounds its memory. None: 4,096; on a
    GPU 32,768 for networks that give scores, whose forwards make no logits over a vocabulary."""


class ScoringConfig(TurnConfig):
    """Which responses are preferred over which.

    How conversations become tokens (`template` to `special_tokens_in_data`) is the sampler's, and set for you from the
    run's `sampling`.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = TurnConfig.NEUTRAL | {
        "preference": "both_orders",
        "min_preference": None,
        "max_length_ratio": 1.25,
        "max_total_tokens": None,
        "seed": 0,
    }

    scorer: Annotated[Named, SCORERS] | None = None
    """By name, with its settings; docs/scoring.md lists them all. None: for pairings that need no score."""
    pairing: Annotated[str, PAIRINGS] | None = None
    """best_vs_worst: of the K candidates; each: every candidate that could be scored, by itself;
    generations: every candidate by itself, without a scorer; truth_vs_generation: the prompt's `response`
    over candidate 0 (SPIN); truth: the `response` alone (SFT); given: the prompt's `chosen` over its `rejected`;
    given_each: `chosen` and `rejected`, each by itself (what `given` is for KTO); random_pair: any unequal two, drawn
    by `seed`; length_matched: the widest difference among candidates of about the same length; all_pairs: every unequal
    two, K(K-1)/2 rows. None: the method's own."""
    preference: Preference = "both_orders"
    """Of a pair scorer's raw logits L, P(i beats j) = sigmoid of: both_orders, (L_ij - L_ji) / 2; one_order, L_ij;
    sppo_release, the difference of aggregated scores as in SPPO's released code."""
    min_preference: float | None = Field(None, ge=0, le=1)
    """Only pairs whose chosen candidate beats the rejected one with at least this probability; None: all. 0.5 leaves
    out cycles."""
    max_length_ratio: float = Field(1.25, ge=1)
    """length_matched: the longer of the two has at most so many times the tokens of the shorter."""
    seed: int = 0
    """random_pair: which pair is drawn."""
    tau: float = Field(1.0, ge=0)
    """Scale of points r: P(i beats j) = sigmoid((r_i - r_j) / tau); 0: the better one wins for sure."""
    max_drop_rate: float = Field(0.9, ge=0, le=1)
    """The stage fails if a larger share of the prompts gives no row."""
    max_response_tokens: int = Field(1024, ge=1)
    """A longer given response is cut, and then carries no terminator."""
    max_total_tokens: int | None = Field(None, ge=2)
    """A response, given or sampled, is cut to what its prompt leaves of so many tokens, and then carries no terminator;
    a prompt that leaves nothing is dropped. None: only the limits of each part count."""
    runtime: ScoringRuntime = ScoringRuntime()


Config = ScoringConfig


def key_additions(config: ScoringConfig, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """Before the turn contract, given texts ended with the EOS, whatever the policy's template ends a turn with."""
    if "policy" not in inputs or not PAIRINGS.get(config.pairing or "best_vs_worst").texts:
        return {}
    ending = ending_of(inputs["policy"].path, config)
    if ending.token is None:
        return {}
    return {"terminator": ending.token}


def preload(config: ScoringConfig) -> None:
    """Import what `run` will; once for many stages, before any is forked (stages/forkserver.py)."""
    import_auto_classes()


def run(job: Job) -> None:
    config: ScoringConfig = job.config
    name = config.pairing or "best_vs_worst"
    needs = PAIRINGS.get(name)
    prompts = ShardRows([job.path("prompts")], "prompts")
    generations = Generations(job, prompts, name) if needs.candidates else None
    maker = RowMaker(config, GivenTexts(job) if needs.texts else None)
    scoring = _Scoring(job, prompts, generations.sizes) if config.scorer is not None and generations else None
    if scoring is None and needs.needs_scores:
        raise ConfigError(f"pairing {name} needs a scorer: set scoring.scorer")
    for index, chunk in job.missing_shards(
        prompts, config.runtime.prompts_per_shard, "scored_pairs", beside=("scores", "dropped")
    ):
        candidates = [[]] * len(chunk) if generations is None else generations.of(chunk)
        with job.timed("score"):
            scores = scoring.of(chunk, candidates, index) if scoring else [Scores(None, None, [])] * len(chunk)
            results = [maker.rows(*item) for item in zip(chunk, candidates, scores, strict=True)]
        # Raw scores first: a shard of pairs without its scores cannot be left behind.
        raw = [_score_row(prompt, score) for prompt, score in zip(chunk, scores, strict=True)]
        write_shard(shard_path(job.out, index, "scores"), to_table(raw, "scores"))
        dropped = [
            {"prompt_id": prompt["prompt_id"], "reason": result}
            for prompt, result in zip(chunk, results, strict=True)
            if isinstance(result, str)
        ]
        write_shard(shard_path(job.out, index, "dropped"), to_table(dropped, "dropped"))
        rows = [row for result in results if not isinstance(result, str) for row in result]
        ends = Ends.of([row["chosen_ids"] for row in rows], [row["rejected_ids"] for row in rows])
        if shares := told_apart(ends):
            job.event("told_apart", index=index, **shares)
            for sentence in sentences(shares, causes(ends, shares)):
                job.log(f"shard {index}: {sentence}")
        job.write(index, rows)
    if scoring is not None:
        scoring.close()
    if not job.is_worker:
        _summarise(job, len(prompts))


class Generations:
    """The candidates of every prompt, of which a million take 24 MB."""

    def __init__(self, job: Job, prompts: ShardRows, pairing_name: str):
        """Raises: ContractError for a prompt without a candidate, or a candidate without its prompt."""
        if "generations" not in job.inputs:
            raise ConfigError(f"pairing {pairing_name} compares generations: give the input `generations`")
        key, hashes = job.inputs["generations"].key, prompt_hashes(prompts)
        self.rows = RowsByPrompt(ShardRows([job.path("generations")], "generations"))
        self.sizes = self.rows.counts(hashes)
        """Candidates of each prompt."""
        if self.sizes.sum() < len(self.rows.rows) and (stray := self.rows.first_of_others(hashes)):
            raise ContractError(
                f"generations {key}: prompt {stray['prompt_id']!r} is not in prompts {job.inputs['prompts'].key}"
            )
        empty = np.flatnonzero(self.sizes == 0)
        if len(empty) and job.config.special_tokens_in_data != "drop":
            first = [prompt["prompt_id"] for prompt in prompts.pick(empty[:3])]
            raise ContractError(f"generations {key}: no candidate for the prompt(s) {first}")

    def of(self, prompts: Sequence[Mapping[str, Any]]) -> list[list[GenerationRow]]:
        """The candidates of each of these prompts, in order."""
        return cast("list[list[GenerationRow]]", self.rows.pick([prompt["prompt_id"] for prompt in prompts]))


class _Scoring:
    """The stage's scorer; it is made at the first shard that needs it."""

    def __init__(self, job: Job, prompts: ShardRows, sizes: np.ndarray):
        """`sizes`: candidates of each prompt."""
        self.job, self.config = job, job.config.scorer
        kind = scorer_class(self.config)
        kind.check_prompts(self.config, cast("Sequence[PromptRow]", prompts))
        self.start = _StartLogps(job) if kind.needs_start_logps(self.config) else None
        self.progress = _Comparisons(job, sizes) if compares(self.config) else None
        self.scorer: Scorer | None = None

    def of(self, prompts: Sequence[PromptRow], candidates: list[list[GenerationRow]], shard: int) -> list[Scores]:
        """The scores of one shard's candidates, prompt by prompt."""
        if self.scorer is None:
            with loading():
                self.scorer = open_scorer(self.config, self.job.config.runtime.device, self._services())
        full = [number for number, group in enumerate(candidates) if group]  # the sample stage may have dropped prompts
        groups = [candidates[number] for number in full]
        start_logps = self.start.of(groups) if self.start else [None] * len(full)
        batch = [
            Candidates(prompts[number], group, logps)
            for number, group, logps in zip(full, groups, start_logps, strict=True)
        ]
        began = time.monotonic()
        scores, sizes = score_once(self.scorer, batch) if batch else ([], [])
        self._report(shard, sizes, scores, time.monotonic() - began, self.scorer.metrics())
        by_number = dict(zip(full, scores, strict=True))
        return [by_number.get(number, Scores(None, None, [])) for number in range(len(prompts))]

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()

    def _services(self) -> Services:
        job = self.job
        services = Services(
            job.store_root,
            job.config.runtime.batch_tokens,
            job.log,
            used=job.used,
            waiting=lambda: job.timed("waiting"),
        )
        if self.progress is None:
            return services
        return services._replace(compared=self.progress.add)

    def _report(
        self, shard: int, sizes: list[int], scores: list[Scores], seconds: float, metrics: dict[str, float]
    ) -> None:
        """One event per shard: how much was scored, how fast, and what a pair scorer's two orders say of it."""
        matrices = [score.preference_logits for score in scores if score.preference_logits is not None]
        count, unit = sum(sizes), "candidates"
        if matrices:
            count, unit = sum(size * (size - 1) for size in sizes), "comparisons"
        facts: dict[str, float] = {
            unit: count,
            "seconds": round(seconds, 3),
            f"{unit}_per_second": round(count / max(seconds, 1e-9), 1),
        }
        if matrices:
            facts |= pair_statistics(matrices).rates()
        facts |= metrics
        self.job.event("scored", index=shard, **facts)
        self.job.log(f"shard {shard}: " + ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))


class _Comparisons:
    """Progress of a pair scorer in comparisons, over all shards; reported once a second."""

    def __init__(self, job: Job, sizes: np.ndarray):
        """`sizes`: candidates of each prompt."""
        self.job = job
        starts = np.arange(0, len(sizes), job.config.runtime.prompts_per_shard)
        self.shards: list[int] = np.add.reduceat(sizes * (sizes - 1), starts).tolist()
        self.total = sum(self.shards)
        self.finished, self.current, self.reported = 0, 0.0, 0.0
        job.on_shard = self.shard

    def shard(self, num_shards: int, total: int) -> None:
        """Shards were finished; comparisons of equal candidates, which are never made, count as finished with them."""
        self.finished, self.current = sum(self.shards[:num_shards]), 0.0
        self.job.progress(self.finished, self.total, "comparisons")

    def add(self, count: float) -> None:
        """Comparisons of the current shard were finished."""
        self.current += count
        if time.monotonic() - self.reported >= 1:
            self.reported = time.monotonic()
            self.job.progress(self.finished + round(self.current), self.total, "comparisons")


class _StartLogps:
    """Mean log-prob per token under the start model, by its pass in the log-prob store."""

    def __init__(self, job: Job):
        if "start" not in job.inputs:
            raise ConfigError(
                f"the scorer {job.config.scorer.name} has a fluency floor and needs the start model: "
                "give the input `start`"
            )
        self.job, runtime = job, job.config.runtime
        budget = runtime.batch_tokens or DEFAULT_TOKENS
        self.start = Pass(job.store_root, job.inputs["start"], "bfloat16", runtime.device, budget)

    def of(self, groups: list[list[GenerationRow]]) -> list[list[float]]:
        """The mean of each candidate, prompt by prompt, in nats."""
        rows = [row for group in groups for row in group]
        prompts, responses = [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows]
        self.start.fill(prompts, responses)
        self.start.account(self.job)
        means = iter([float(logps.mean()) for logps in self.start.get(prompts, responses)])
        return [[next(means) for _ in group] for group in groups]


def _score_row(prompt: PromptRow, scores: Scores) -> dict[str, Any]:
    """A row of `scores`; a candidate that could not be scored is null there."""
    points, logits = scores.scores, scores.preference_logits
    return {
        "prompt_id": prompt["prompt_id"],
        "scores": None if points is None else [None if np.isnan(value) else float(value) for value in points],
        "preference_logits": None if logits is None else np.asarray(logits, dtype=float).ravel().tolist(),
        "reasons": scores.reasons,
    }


def _summarise(job: Job, num_prompts: int) -> None:
    """Metrics of the whole artifact, shard by shard. Raises: ContractError if too many prompts give no row."""
    totals, rows_in = ScoreTotals(), 0
    for path in shard_paths(job.out, "scored_pairs"):
        index = path.stem.removeprefix("part-")
        raw, dropped = (read_shard(path.with_name(f"{kind}-{index}.parquet"), kind) for kind in ("scores", "dropped"))
        pairs = read_shard(path, "scored_pairs")
        check_every_prompt_counts(pairs, dropped, raw.num_rows, f"{job.out.name}, shard {index}")
        rows_in += raw.num_rows
        totals.add(pairs, raw, dropped)
    if rows_in != num_prompts:
        raise ContractError(
            f"scored_pairs {job.out.name}: its shards are of {rows_in} prompts, and there are {num_prompts}"
        )
    job.metrics |= {"rows_in": rows_in} | totals.metrics(num_prompts) | _rates(job.out)
    if lines := totals.warnings():
        job.facts["told_apart"] = lines
    if job.metrics["drop_rate"] > job.config.max_drop_rate or not totals.pairs:
        raise ContractError(
            f"scored_pairs {Path(job.out).name}: {totals.dropped.total()} of {num_prompts} prompts give no row "
            f"(limit {job.config.max_drop_rate:.0%}): {dict(totals.dropped)}, e.g. {totals.examples}. "
            "More candidates or a higher temperature give more varied ones; scoring.max_drop_rate moves the limit"
        )


def check_every_prompt_counts(pairs: pa.Table, dropped: pa.Table, num_prompts: int, key: str) -> None:
    """Raises: ContractError for prompts that gave no row and no reason, or both."""
    with_rows, without = set(pairs["prompt_id"].to_pylist()), set(dropped["prompt_id"].to_pylist())
    if with_rows & without or len(with_rows) + len(without) != num_prompts:
        raise ContractError(
            f"scored_pairs {key}: {len(with_rows)} prompts have rows and {len(without)} a reason to have none, of "
            f"{num_prompts} in all: some were lost or counted twice. Remove the directory and run again"
        )


def _rates(out: Path) -> dict[str, float]:
    """Comparisons and candidates per second, from the last time that each shard was scored, whichever try it was."""
    shards = {event["index"]: event for event in events(out) if event["event"] == "scored"}.values()
    rates = {}
    for unit in ("comparisons", "candidates"):
        if timed := [event for event in shards if unit in event]:
            seconds = sum(event["seconds"] for event in timed)
            rates[f"{unit}_per_second"] = sum(event[unit] for event in timed) / max(seconds, 1e-9)
    return rates
