r"""Stages - Arena-Hard: two games per prompt against a baseline, five verdicts, score with style control.

Source: Li et al. 2024, arXiv:2406.11939. Game 1 shows the baseline's answer as A, game 2 the model's. A strong verdict
(`>>`) counts three times. The plain score is the mean outcome; under style control the outcomes of all M models are
fitted together by a logistic (Bradley-Terry) regression

    logit P(model m wins game g) = strength_m + sum_f style_f * z_gf,        score_m = sigmoid(strength_m)

with z the standardised differences of style between model and baseline. Axes: G outcomes, M models, F = 4 features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data_contracts.errors import ConfigError
from data_contracts.rows import ReportRow
from stages.evaluation.judging import Judge, read_rows
from stages.evaluation.logistic import fit, sigmoid
from stages.evaluation.rows import report_row

STRONG = 3
"""Weight of a verdict with >> or <<."""
OUTCOMES = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
OUTCOMES |= {"A<<B": (0.0, STRONG), "A<B": (0.0, 1), "B<A": (1.0, 1), "B<<A": (1.0, STRONG), "B=A": (0.5, 1)}
"""Verdict -> (P(A wins), weight)."""
POLICY = "policy"
"""Name of the model that a run measures."""
STYLES = ("length", "headers", "lists", "bold")


class Game(NamedTuple):
    """One judgment, as the model sees it."""

    model: str
    prompt_id: str
    outcome: float | None
    """1 the model wins, 0 the baseline; None: the judge failed."""
    weight: int
    style: tuple[float, ...]
    """Differences model minus baseline, in the order of STYLES."""


def verdict(judgment: str) -> tuple[float, int] | None:
    """(P(A wins), weight) by the last verdict in the text; None without one."""
    verdicts = re.findall(r"\[\[([AB<>=]+)\]\]", judgment)
    if verdicts:
        return OUTCOMES.get(verdicts[-1])
    return None


def style_of(text: str, count_tokens: Callable[[str], int] = lambda text: len(text.split())) -> dict[str, float]:
    """The length of a text and its counts of markdown marks; marks in code blocks do not count."""
    prose = re.sub(r"```[^`]*```", "", text)  # as the official script cuts them
    return {
        "length": float(count_tokens(text)),
        "headers": float(len(re.findall(r"^#{1,6}\s", prose, flags=re.MULTILINE))),
        "lists": float(len(re.findall(r"^\s*(?:\d+\.|[-*+])\s", prose, flags=re.MULTILINE))),
        "bold": float(len(re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", prose))),
    }


def style_difference(model: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[float, ...]:
    """The difference of style, model minus baseline, in the order of STYLES.

    Length: (l_m - l_b) / (l_m + l_b). Marks: (d_m - d_b) / (d_m + d_b + 1) with d = count / (length + 1), the density.
    """
    total = model["length"] + baseline["length"]
    differences = [(model["length"] - baseline["length"]) / total if total else 0.0]
    for name in STYLES[1:]:
        density_m, density_b = (style[name] / (style["length"] + 1) for style in (model, baseline))
        differences.append((density_m - density_b) / (density_m + density_b + 1))
    return tuple(differences)


def play(
    judge: Judge, system: str, template: str, model: str, rows: Sequence[Mapping[str, str]], **options: Any
) -> list[Game]:
    """Two games per row {"prompt_id", "prompt", "answer", "baseline"}: the baseline's answer as A, then the model's.

    template: fields question_1, answer_1, answer_2, or QUESTION, ANSWER_A, ANSWER_B. options: of the judge's requests.
    """
    prompts = []
    for row in rows:
        for a, b in ((row["baseline"], row["answer"]), (row["answer"], row["baseline"])):
            fields = {"question_1": row["prompt"], "answer_1": a, "answer_2": b}  # as v0.1 names them
            fields |= {"QUESTION": row["prompt"], "ANSWER_A": a, "ANSWER_B": b}  # as v2.0 does
            text = template.format(**fields)
            prompts.append([{"role": "system", "content": system}, {"role": "user", "content": text}])
    replies = judge.ask(prompts, **({"temperature": 0.0, "max_tokens": 4096} | options))
    games = []
    for row, first, second in zip(rows, replies[::2], replies[1::2], strict=True):
        style = style_difference(style_of(row["answer"]), style_of(row["baseline"]))
        for reply, model_is_a in ((first, False), (second, True)):
            outcome, weight = None, 1
            if reply is not None and (judged := verdict(reply.text)) is not None:
                a_wins, weight = judged
                outcome = a_wins if model_is_a else 1 - a_wins
            games.append(Game(model, row["prompt_id"], outcome, weight, style))
    return games


def scores(games: Sequence[Game], style_control: bool = True) -> tuple[dict[str, float], dict[str, float]]:
    """Model -> score in percent, and style -> coefficient (empty without control). Failed games are left out."""
    judged = [game for game in games if game.outcome is not None]
    models = sorted({game.model for game in judged})
    outcome = np.array([game.outcome for game in judged])
    weight = np.array([game.weight for game in judged], dtype=np.float64)
    index = np.array([models.index(game.model) for game in judged], dtype=int)
    if not style_control or not judged:
        means = {}
        for i, name in enumerate(models):
            of_model = index == i
            means[name] = 100 * float((outcome * weight)[of_model].sum() / weight[of_model].sum())
        return means, {}
    style = np.array([game.style for game in judged], dtype=np.float64)  # [G, F]
    spread = style.std(axis=0)
    varies = spread > 1e-12
    # Centred at the baseline (difference 0), not at the mean: the score is at equal style.
    scaled = style[:, varies] / spread[varies]
    coefficients = fit(np.concatenate([np.eye(len(models))[index], scaled], axis=1), outcome, weight)
    varying_styles = [name for name, does_vary in zip(STYLES, varies, strict=True) if does_vary]
    style_coefficients = dict(zip(varying_styles, map(float, coefficients[len(models) :]), strict=True))
    return {name: 100 * float(sigmoid(coefficients[i])) for i, name in enumerate(models)}, style_coefficients


def interval(
    games: Sequence[Game], model: str, style_control: bool = True, draws: int = 100, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a model's score: prompts are resampled, their games kept together.

    NaN at both ends if there is one prompt, or no resample has a score.
    """
    groups: dict[str, list[Game]] = {}
    for game in games:
        groups.setdefault(game.prompt_id, []).append(game)
    names, rng, values = sorted(groups), np.random.default_rng(seed), []
    for _ in range(draws):
        resample = [game for pick in rng.integers(0, len(names), len(names)) for game in groups[names[pick]]]
        value = scores(resample, style_control)[0].get(model)
        if value is not None:
            values.append(value)
    if len(names) < 2 or not values:
        return math.nan, math.nan
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def report(games: Sequence[Game], judge: str, seed: int = 0) -> list[ReportRow]:
    """Rows of eval_report: both scores of each model, in percent, and how many judgments failed."""
    rows = []
    for metric, control in (("score", False), ("style_controlled_score", True)):
        for model, value in scores(games, control)[0].items():
            count = sum(game.model == model and game.outcome is not None for game in games)
            low, high = interval(games, model, control, seed=seed)
            task = "arena_hard" if model == POLICY else f"arena_hard/{model}"
            rows.append(report_row("arena_hard", task, metric, value, count, None, low, high, judge))
    failed = sum(game.outcome is None for game in games)
    return [*rows, report_row("arena_hard", "arena_hard", "failed_judgments", failed, len(games), version=judge)]


class Bench(NamedTuple):
    """The files of the benchmark."""

    rows: list[dict[str, str]]
    """{"prompt_id", "prompt", "baseline"}: the last is the baseline's answer."""
    system: str
    """The judge's instructions."""
    template: str


def load(directory: str | Path, limit: int | None = None) -> Bench:
    """Read question.jsonl, baseline.jsonl (a file of the official model_answer/) and judge_config.yaml.

    Raises: ConfigError.
    """
    root = Path(directory)
    questions = read_rows(root / "question.jsonl")[:limit]
    baseline = {_identity(row): _answer(row) for row in read_rows(root / "baseline.jsonl")}
    if missing := [_identity(row) for row in questions if not baseline.get(_identity(row))]:
        raise ConfigError(
            f"{root}/baseline.jsonl has no answer to {len(missing)} of {len(questions)} questions, e.g. {missing[0]}"
        )
    try:
        config = yaml.safe_load((root / "judge_config.yaml").read_text(encoding="utf-8"))
        system, template = config["system_prompt"], config["prompt_template"]
    except OSError as error:
        raise ConfigError(f"cannot read {root}/judge_config.yaml: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{root}/judge_config.yaml must hold `system_prompt` and `prompt_template`: {error!r}"
        ) from None
    rows = [
        {"prompt_id": _identity(row), "prompt": _prompt(row), "baseline": baseline[_identity(row)]} for row in questions
    ]
    return Bench(rows, system, template if isinstance(template, str) else template[0])


def _identity(row: Mapping[str, Any]) -> str:
    return str(row.get("uid") or row.get("question_id"))


def _prompt(row: Mapping[str, Any]) -> str:
    if "prompt" in row:
        return row["prompt"]
    return row["turns"][0]["content"]


def _answer(row: Mapping[str, Any]) -> str:
    """The answer in a row of the newer files ("messages") or of the older ones ("choices")."""
    text = row["messages"][-1]["content"] if "messages" in row else row["choices"][0]["turns"][0]["content"]
    if isinstance(text, dict):
        return text["answer"]
    return text
