"""Stage - prompts + generations -> scored_pairs: score every candidate, keep the raw scores, derive the rows to train on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from stages.job import Job
from stages.models.logps import Pass
from stages.models.tokens import Template, encode_prompt, encode_response, load_tokenizer
from stages.registry import Named
from stages.running.cost import loading
from stages.running.history import events
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scores, Surroundings, close, compares, prepared, score_once
from stages.scoring.pairing import CHOOSE, Group, Preference, Rules, group_of, pair_statistics
from stages.stage import StageRuntime

Pairing = Literal[
    "best_vs_worst", "each", "truth_vs_generation", "truth", "given", "random_pair", "length_matched", "all_pairs"
]  # fmt: skip
WITHOUT_GENERATIONS = ("truth", "given")


class ScoringRuntime(StageRuntime):
    prompts_per_shard: int = Field(256, ge=1)
    """How much is lost, at most, when a scorer is killed."""
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward of a scorer's model, or of the start model: what bounds its memory."""


class ScoringConfig(BaseConfig):
    """What is preferred over what."""

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "preference": "both_orders",
        "min_preference": None,
        "max_length_ratio": 1.25,
        "seed": 0,
    }

    scorer: Annotated[Named, SCORERS] | None = None
    """By name, with its settings; docs/scoring.md lists them all. None: for pairings that need no score."""
    pairing: Pairing | None = None
    """best_vs_worst: of the K candidates; each: every candidate by itself; truth_vs_generation: the prompt's `response` over candidate 0
    (SPIN); truth: the `response` alone (SFT); given: the prompt's `chosen` over its `rejected`; random_pair: any unequal two, drawn by
    `seed`; length_matched: the widest difference among candidates of about the same length; all_pairs: every unequal two, K(K-1)/2 rows.
    None: what the method uses."""
    preference: Preference = "both_orders"
    """Of a pair scorer's raw logits L, P(i beats j) = sigmoid of: both_orders, (L_ij - L_ji) / 2; one_order, L_ij; sppo_release, the
    difference of aggregated scores as in SPPO's released code."""
    min_preference: float | None = Field(None, ge=0, le=1)
    """Only pairs whose chosen candidate beats the rejected one with at least this probability; None: all. 0.5 takes out cycles."""
    max_length_ratio: float = Field(1.25, ge=1)
    """length_matched: the longer of the two has at most so many times the tokens of the shorter."""
    seed: int = 0
    """random_pair: which pair is drawn."""
    tau: float = Field(1.0, ge=0)
    """Scale of a pointwise score: P(i beats j) = sigmoid((r_i - r_j) / tau); 0: the better one wins for sure."""
    max_drop_rate: float = Field(0.9, ge=0, le=1)
    """Stop if more than this part of the prompts gives no row."""
    template: Template = "chat"
    """How prompts without generations become tokens; the sampler's template. Set for you from the run's `sampling.template`."""
    max_response_tokens: int = Field(1024, ge=1)
    """A longer given response is cut, and then carries no EOS."""
    runtime: ScoringRuntime = ScoringRuntime()


Config = ScoringConfig


def run(job: Job) -> None:
    config: ScoringConfig = job.config
    pairing = config.pairing or "best_vs_worst"
    prompts = read_shards(job.path("prompts"), "prompts").to_pylist()
    groups = _generations(job, prompts, pairing)
    texts = _Texts(job) if "truth" in pairing or pairing == "given" else None
    scoring = _Scoring(job, prompts, groups) if config.scorer is not None and groups else None
    if scoring is None and pairing in CHOOSE:
        raise ConfigError(f"pairing {pairing} needs a scorer: set scoring.scorer")
    for index, chunk in job.missing_shards(
        prompts, config.runtime.prompts_per_shard, "scored_pairs", beside=("scores", "dropped")
    ):
        candidates = [groups[prompt["prompt_id"]] for prompt in chunk] if groups else [[]] * len(chunk)
        with job.timed("score"):
            scores = scoring.of(chunk, candidates, index) if scoring else [Scores(None, None, [])] * len(chunk)
            results = [
                _rows(prompt, rows, score, texts, config, pairing)
                for prompt, rows, score in zip(chunk, candidates, scores, strict=True)
            ]
        # Raw scores first: a shard of pairs without its scores cannot be left behind.
        raw = [_score_row(prompt, score) for prompt, score in zip(chunk, scores, strict=True)]
        write_shard(shard_path(job.out, index, "scores"), to_table(raw, "scores"))
        dropped = [
            {"prompt_id": prompt["prompt_id"], "reason": result}
            for prompt, result in zip(chunk, results, strict=True)
            if isinstance(result, str)
        ]
        write_shard(shard_path(job.out, index, "dropped"), to_table(dropped, "dropped"))
        job.write(index, [row for result in results if not isinstance(result, str) for row in result])
    if scoring is not None:
        close(scoring.scorer)
    if not job.is_worker:
        _summarise(job, len(prompts))


def _generations(job: Job, prompts: list[dict[str, Any]], pairing: str) -> dict[str, list[dict[str, Any]]]:
    """Candidates by prompt; empty where the pairing goes without."""
    if pairing in WITHOUT_GENERATIONS:
        return {}
    if "generations" not in job.inputs:
        raise ConfigError(f"pairing {pairing} compares generations: give the input `generations`")
    key = job.inputs["generations"].key
    groups: dict[str, list[dict[str, Any]]] = {prompt["prompt_id"]: [] for prompt in prompts}
    for row in read_shards(job.path("generations"), "generations").to_pylist():
        if row["prompt_id"] not in groups:
            raise ContractError(
                f"generations {key}: prompt {row['prompt_id']!r} is not in prompts {job.inputs['prompts'].key}"
            )
        groups[row["prompt_id"]].append(row)
    if empty := [prompt_id for prompt_id, rows in groups.items() if not rows]:
        raise ContractError(f"generations {key}: no candidate for the prompt(s) {empty[:3]}")
    return groups


class _Scoring:
    """The scorer, loaded at the first shard that needs it."""

    def __init__(self, job: Job, prompts: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]):
        self.job, self.config = job, job.config.scorer
        self.progress = (
            _Comparisons(job, [len(groups[prompt["prompt_id"]]) for prompt in prompts])
            if compares(self.config)
            else None
        )
        self.scorer_class = SCORERS.get(self.config.name)
        self.scorer_class.check_prompts(self.config, prompts)
        self.start = _StartLogps(job) if self.scorer_class.needs_start_logps(self.config) else None
        self.scorer: Any = None

    def of(self, prompts: Sequence[dict[str, Any]], candidates: list[list[dict[str, Any]]], shard: int) -> list[Scores]:
        if self.scorer is None:
            self._open()
        means = self.start.of(candidates) if self.start else [None] * len(prompts)
        batch = [Candidates(*item) for item in zip(prompts, candidates, means, strict=True)]
        begin = time.monotonic()
        scores, sizes = score_once(self.scorer, batch)
        self._tell(shard, sizes, scores, time.monotonic() - begin)
        return scores

    def _open(self) -> None:
        runtime = self.job.config.runtime
        with loading():
            told = {"compared": self.progress.add} if self.progress else {}
            surroundings = Surroundings(
                self.job.store_root,
                runtime.batch_tokens,
                self.job.log,
                used=self.job.used,
                waiting=lambda: self.job.timed("waiting"),
                **told,
            )
            self.scorer = prepared(self.scorer_class, self.config, runtime.device, surroundings)

    def _tell(self, shard: int, sizes: list[int], scores: list[Scores], seconds: float) -> None:
        """One event per shard: how much was scored, how fast, and what a pair scorer's two orders say of it."""
        matrices = [score.preference_logits for score in scores if score.preference_logits is not None]
        count, unit = (sum(k * (k - 1) for k in sizes), "comparisons") if matrices else (sum(sizes), "candidates")
        facts: dict[str, float] = {
            unit: count,
            "seconds": round(seconds, 3),
            f"{unit}_per_second": round(count / max(seconds, 1e-9), 1),
        }
        facts |= pair_statistics(matrices).rates() if matrices else {}
        facts |= self.scorer.metrics() if hasattr(self.scorer, "metrics") else {}
        self.job.event("scored", index=shard, **facts)
        self.job.log(f"shard {shard}: " + ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))


class _Comparisons:
    """Progress of a pair scorer in comparisons, over all shards; said once a second."""

    def __init__(self, job: Job, sizes: Sequence[int]):
        self.job, per_shard = job, job.config.runtime.prompts_per_shard
        counts = [size * (size - 1) for size in sizes]
        self.shards = [sum(counts[start : start + per_shard]) for start in range(0, len(counts), per_shard)]
        self.before, self.done, self.said = 0, 0.0, 0.0
        job.on_shard = self.shard

    def shard(self, done: int, total: int) -> None:
        """Equal candidates were not compared, but they are done."""
        self.before = sum(self.shards[:done])
        self.done = 0.0
        self.job.progress(self.before, sum(self.shards), "comparisons")

    def add(self, count: float) -> None:
        self.done += count
        if time.monotonic() - self.said >= 1:
            self.said = time.monotonic()
            self.job.progress(self.before + round(self.done), sum(self.shards), "comparisons")


class _StartLogps:
    """Mean log-prob per token under the start model, by its pass in the log-prob store."""

    def __init__(self, job: Job):
        if "start" not in job.inputs:
            raise ConfigError(
                f"the scorer {job.config.scorer.name} has a fluency floor and needs the start model: give the input `start`"
            )
        self.job, runtime = job, job.config.runtime
        self.start = Pass(job.store_root, job.inputs["start"], "bfloat16", runtime.device, runtime.batch_tokens)

    def of(self, groups: list[list[dict[str, Any]]]) -> list[list[float]]:
        rows = [row for group in groups for row in group]
        prompts, responses = [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows]
        self.start.fill(prompts, responses)
        self.start.account(self.job)
        means = iter([float(row.mean()) for row in self.start.get(prompts, responses)])
        return [[next(means) for _ in group] for group in groups]


class _Texts:
    """Given texts as tokens of the policy: tokenised apart from the prompt, with an EOS unless they had to be cut."""

    def __init__(self, job: Job):
        if "policy" not in job.inputs:
            raise ConfigError(f"pairing {job.config.pairing} tokenises given responses: give the input `policy`")
        self.tokenizer, self.config = load_tokenizer(job.path("policy")), job.config

    def prompt(self, prompt: dict[str, Any]) -> list[int]:
        return encode_prompt(self.tokenizer, prompt["messages"], self.config.template)

    def response(self, prompt: dict[str, Any], field: str) -> list[int]:
        if prompt[field] is None:
            raise ConfigError(
                f"pairing {self.config.pairing} needs `{field}` in every prompt; {prompt['prompt_id']!r} has none"
            )
        return encode_response(self.tokenizer, prompt[field])[: self.config.max_response_tokens]


def _rows(
    prompt: dict[str, Any],
    candidates: list[dict[str, Any]],
    scores: Scores,
    texts: _Texts | None,
    config: ScoringConfig,
    pairing: str,
) -> list[dict[str, Any]] | str:
    """The rows of one prompt, or the reason why it gives none."""
    group = (
        None
        if scores.scores is None and scores.preference_logits is None
        else group_of(scores, config.tau, config.preference)
    )
    common = {
        "prompt_id": prompt["prompt_id"],
        "prompt_ids": candidates[0]["prompt_ids"] if candidates else texts.prompt(prompt),
        "scorer": config.scorer.name if config.scorer else "",
        "group_scores": None if group is None else group.rewards.tolist(),
        "group_win_rates": None if group is None else group.win_rates.tolist(),
    }
    if texts is None:
        lengths = tuple(len(row["token_ids"]) for row in candidates)
        choices = CHOOSE[pairing](
            group, Rules(lengths, prompt["prompt_id"], config.seed, config.max_length_ratio, config.min_preference)
        )
        if isinstance(choices, str):
            return choices
        return [
            common | _side("chosen", candidates, choice.chosen, group) | _side("rejected", candidates, choice.rejected, group)
            | {"pair_id": f"{prompt['prompt_id']}/{choice.chosen}" + ("" if choice.rejected is None else f"-{choice.rejected}")}
            for choice in choices
        ]  # fmt: skip
    field = "chosen" if pairing == "given" else "response"
    row = common | _text_side("chosen", texts, prompt, field, 1.0) | {"pair_id": f"{prompt['prompt_id']}/{pairing}"}
    if pairing == "given":
        return [row | _text_side("rejected", texts, prompt, "rejected", 0.0)]
    if pairing == "truth":
        return [row | _side("rejected", candidates, None, group)]
    return [row | _side("rejected", candidates, 0, group) | {"win_rate_rejected": 0.0}]


def _side(side: str, candidates: list[dict[str, Any]], number: int | None, group: Group | None) -> dict[str, Any]:
    """Columns of one side that is candidate `number`, or nothing."""
    if number is None:
        return {f"{side}_ids": [], side: "", f"score_{side}": None, f"win_rate_{side}": 0.0, f"{side}_candidate": -1}
    return {
        f"{side}_ids": candidates[number]["token_ids"],
        side: candidates[number]["completion"],
        f"score_{side}": None if group is None else float(group.rewards[number]),
        f"win_rate_{side}": 0.5 if group is None else float(group.win_rates[number]),
        f"{side}_candidate": number,
    }


def _text_side(side: str, texts: _Texts, prompt: dict[str, Any], field: str, win_rate: float) -> dict[str, Any]:
    ids = texts.response(prompt, field)
    return {
        f"{side}_ids": ids,
        side: prompt[field],
        f"score_{side}": None,
        f"win_rate_{side}": win_rate,
        f"{side}_candidate": -1,
    }


def _score_row(prompt: dict[str, Any], scores: Scores) -> dict[str, Any]:
    plain = None if scores.scores is None else [None if np.isnan(value) else float(value) for value in scores.scores]
    logits = (
        None if scores.preference_logits is None else np.asarray(scores.preference_logits, dtype=float).ravel().tolist()
    )
    return {"prompt_id": prompt["prompt_id"], "scores": plain, "preference_logits": logits, "reasons": scores.reasons}


def _summarise(job: Job, num_prompts: int) -> None:
    pairs = read_shards(job.out, "scored_pairs")
    raw = read_shards(job.out, "scores", "scores")
    dropped = read_shards(job.out, "dropped", "dropped")
    values = [value for row in raw["scores"].to_pylist() if row is not None for value in row]
    scored = np.array([value for value in values if value is not None], dtype=float)
    drop_rate = dropped.num_rows / num_prompts
    spoilt = Counter(reason for row in raw["reasons"].to_pylist() for reason in row if reason)
    reasons = Counter(dropped["reason"].to_pylist())
    job.metrics |= {"pairs": pairs.num_rows, "drop_rate": drop_rate, "unscored": len(values) - len(scored)}
    job.metrics |= {f"dropped/{reason}": count for reason, count in reasons.items()}
    job.metrics |= {f"spoilt/{reason}": count for reason, count in spoilt.items()}
    # The last time that each shard was scored, whichever try it was.
    told = {event["index"]: event for event in events(job.out) if event["event"] == "scored"}.values()
    for unit in ("comparisons", "candidates"):
        if rates := [event for event in told if unit in event]:
            job.metrics[f"{unit}_per_second"] = sum(event[unit] for event in rates) / max(
                sum(event["seconds"] for event in rates), 1e-9
            )
    if len(scored):
        job.metrics["mean_score"] = float(scored.mean())
    flat = [row for row in raw["preference_logits"].to_pylist() if row is not None]
    if flat:
        matrices = [np.array(row, dtype=float).reshape(round(len(row) ** 0.5), -1) for row in flat]
        known = [matrix for matrix in matrices if matrix.size]
        job.metrics["unscored"] = sum(int(np.isnan(matrix).any(axis=1).sum()) for matrix in known)
        job.metrics |= {f"pairwise/{name}": value for name, value in pair_statistics(known).rates().items()}
    if pairs.num_rows:
        for side in ("chosen", "rejected"):
            job.metrics[f"mean_tokens/{side}"] = float(
                pairs[f"{side}_ids"].combine_chunks().value_lengths().to_numpy().mean()
            )
            job.metrics[f"win_rate/{side}"] = float(np.mean(pairs[f"win_rate_{side}"].to_numpy()))
    if drop_rate > job.config.max_drop_rate or not pairs.num_rows:
        raise ContractError(
            f"scored_pairs {Path(job.out).name}: {dropped.num_rows} of {num_prompts} prompts give no row (limit {job.config.max_drop_rate:.0%}): {dict(reasons)}, "
            f"e.g. {dropped['prompt_id'].to_pylist()[:3]}. "
            "More candidates or a higher temperature give more varied ones; scoring.max_drop_rate moves the limit"
        )
