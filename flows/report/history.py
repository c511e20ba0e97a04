"""Flows - what a run found: the cumulative table (Prefect artifact, terminal), a summary per iteration, report.md and report.html."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.shards import read_shards
from data_contracts.store import Store, write_atomic
from flows.config import RunConfig
from flows.report.page import Story, WeightPicture, markdown_table, render, standalone_figures
from flows.tournament import Standing, spread, standing
from stages.evaluation.intervals import Interval, paired_bootstrap
from stages.evaluation.promotion import Measurement, paired_gain
from stages.evaluation.rows import column_names
from stages.evaluation.stage import per_prompt
from stages.evaluation.win_rates import win_rate_matrix
from tasks.build import Built
from tasks.stages import Place
from tasks.tracking import Tracker

STAGES = ("sample", "score", "weigh", "train", "evaluate")
MOST_TOKENS = 2_000_000
"""Weights that a histogram reads; of a larger artifact, the first shards."""


class History:
    """Collects what the iterations made. Only reads records: a cached iteration reports like a fresh one."""

    def __init__(self, config: RunConfig, store: Store, tracker: Tracker):
        self.config, self.store, self.tracker = config, store, tracker
        self.directory = store.run_directory(config.name)
        self.rows: list[dict[str, Any]] = []
        self.heldout: list[list[dict[str, Any]]] = []
        self.reports: list[list[dict[str, Any]]] = []
        self.decisions: list[dict[str, Any]] = []
        """Of the promotion gate."""
        self.selections: list[dict[str, Any]] = []
        """Checkpoints of a training that were compared."""
        self.tournament: Standing | None = None
        self._built: dict[str, dict[str, Built]] = {}
        self._seconds: list[dict[str, float]] = []
        self._gains: list[dict[str, Any]] = []
        self._prompts: dict[str, str] = {}
        self._curves: dict[int, list[dict[str, float]]] = {}
        self._weights: dict[int, WeightPicture] = {}
        self._dropped: dict[int, dict[str, float]] = {}

    def built(self, place: Place, **stages: Built) -> None:
        """The training half of an iteration."""
        self._built[place.step] = stages
        for name, built in stages.items():
            self.tracker.stage(_number(place), built.record, built.cached, name)
        number = _number(place)
        if "train" in stages:
            self._curves[number] = _curve(stages["train"].ref)
        self._dropped[number] = _drop_reasons(
            built.record for name, built in stages.items() if name in ("sample", "score", "weigh")
        )
        if "weigh" in stages and "train" in stages and (picture := _weight_picture(stages["weigh"], stages["train"])):
            self._weights[number] = picture

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        """An iteration is complete: add its row, show it."""
        stages = self._built.get(place.step, {}) | {"evaluate": report}
        self.tracker.stage(_number(place), answers.record, answers.cached, "heldout_generations")
        self.tracker.stage(_number(place), report.record, report.cached, "evaluate")
        self.reports.append(read_shards(report.ref.path, "eval_report").to_pylist())
        rows = {row["metric"]: row for row in self.reports[-1] if row["suite"] == "heldout"}
        self.heldout.append(read_shards(report.ref.path, "heldout", "heldout").to_pylist())
        if not self._prompts and "prompts" in report.record.inputs:
            self._prompts = _prompt_texts(report.record.inputs["prompts"])

        def value(metric: str, column: str, digits: int) -> float | None:
            found = rows.get(metric)
            return None if found is None else round(found[column], digits)

        row: dict[str, Any] = {
            "iteration": _number(place),
            "heldout_score": value("score", "value", 4),  # None: nothing could be scored
            "low": value("score", "low", 4),
            "high": value("score", "high", 4),
            "mean_tokens": value("mean_tokens", "value", 1),
            "finished": value("finished_rate", "value", 3),
            "start_logp": value("start_logp", "value", 3),
            "distinct": value("distinct_rate", "value", 3),
        }
        if missing := sum(one["score"] is None for one in self.heldout[-1]):
            row["unscored"] = missing
        named = zip(column_names(self.reports[-1]), self.reports[-1], strict=True)
        row |= {name: round(item["value"], 3) for name, item in named if item["suite"] != "heldout"}
        row |= {
            one["task"]: None
            for one in self.reports[-1]
            if one["metric"] == "failed_judgments" and one["value"] == one["n"]
        }  # its judge was away: shown as unscored
        seconds = dict.fromkeys(STAGES, 0.0)
        for built in stages.values():  # auxiliary models count under the stage that made them
            seconds[built.record.stage] += built.record.seconds["wall"]
        seconds["evaluate"] += answers.record.seconds["wall"]
        self._seconds.append(seconds)
        row |= {f"{name} s": round(value, 1) for name, value in seconds.items()}
        self.rows.append(row)
        self._gains.append(self._gain_of(-1))
        summary = {
            name.replace(" ", "_"): value for name, value in row.items() if name != "iteration" and value is not None
        }
        self.tracker.summary(_number(place), summary)
        self._publish(place)

    def measured_at(self, iteration: int) -> Measurement:
        """What the promotion gate compares."""
        return Measurement.from_rows(self.heldout[iteration], self.reports[iteration])

    def selected(
        self,
        place: Place,
        checkpoints: Sequence[ArtifactRef],
        found: Sequence[Measurement],
        gains: Sequence[Interval | None],
        chosen: int,
    ) -> None:
        """Which checkpoint of the iteration's training goes on, and how all of them measured."""
        for number, (ref, one, gain) in enumerate(zip(checkpoints, found, gains, strict=True)):
            self.selections.append(
                {
                    "iteration": _number(place),
                    "checkpoint": ref.key.partition("/")[2] or "end of training",
                    "heldout_score": round(float(np.mean(list(one.scores.values()))), 4) if one.scores else None,
                    "gain over the first": f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "",
                    "goes on": "yes" if number == chosen else "",
                }
            )

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        """The tournament at the end of the run; kept in `runs/<name>/tournament.json` too. `scored` None: its judge was away."""
        self.tournament = found = standing(scorer, names, scored and scored.ref, prompts)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / "tournament.json", json.dumps(found._asdict(), indent=1) + "\n")
        for name, line in zip(names, found.rates, strict=True):
            if line[0] is not None and name.isdigit():
                self.tracker.summary(int(name), {"tournament/win_rate_against_start": line[0]})

    def decided(self, decision: dict[str, Any]) -> None:
        """The gate's decision about the iteration that was measured last."""
        self.decisions.append(decision)
        if logger := _logger():
            logger.info("gate, iteration %s: %s (%s)", decision["iteration"], decision["outcome"], decision["reason"])
        if decision["gain"]:
            values = {f"gate/{name}": decision["gain"][name] for name in ("mean", "low", "high")}
            self.tracker.summary(
                decision["iteration"], values | {"gate/promoted": float(decision["outcome"] == "promote")}
            )

    def gain(self, last: int = -1) -> Interval | None:
        """Held-out score of an iteration minus the start's, paired by prompt. None: no prompt was scored in both."""
        before, after = per_prompt(self.heldout[0], "score"), per_prompt(self.heldout[last], "score")
        return paired_bootstrap(before, after) if before.keys() & after.keys() else None

    def fluency_change(self) -> float:
        """Change of the mean start-model log-prob per token, last minus start; negative: less fluent."""
        return self.rows[-1]["start_logp"] - self.rows[0]["start_logp"]

    def headline(self) -> str:
        gain = self.gain()
        if gain is None:
            return f"the held-out answers could not be scored; start-model log-prob per token {self.fluency_change():+.3f} nats"
        return (
            f"held-out score {self.rows[0]['heldout_score']:.3f} -> {self.rows[-1]['heldout_score']:.3f}: gain {gain.mean:+.3f}, 95 % interval [{gain.low:+.3f}, {gain.high:+.3f}] "
            f"(paired bootstrap over {len(per_prompt(self.heldout[0], 'score'))} prompts); start-model log-prob per token {self.fluency_change():+.3f} nats"
        )

    def write_report(self, plots: bool = False) -> Path:
        """`runs/<name>/report.md` (its path is returned) and `report.html` beside it; its figures as `plots/*.svg` too, if asked for."""
        path = self.directory / "report.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# Self-play run {self.config.name}", "", self.headline(), "", markdown_table(self.rows), ""]
        if self.decisions:
            lines += ["## Promotion gate", ""]
            lines += [
                f"- iteration {one['iteration']} against {one['against']}: {one['outcome']} ({one['reason']})"
                for one in self.decisions
            ]
            lines += [""]
        if self.selections:
            lines += ["## Checkpoints of each training", "", markdown_table(self.selections), ""]
        if self.tournament:
            lines += ["## Tournament", "", *_tournament_lines(self.tournament), ""]
        lines += ["## The same prompts, iteration by iteration", ""]
        lines += self._examples(8)
        lines += ["", "## Settings", "", "```json", self._settings(), "```", ""]
        write_atomic(path, "\n".join(lines))
        page = render(self.story())
        write_atomic(path.with_suffix(".html"), page)
        if plots:
            shutil.rmtree(path.with_name("plots"), ignore_errors=True)
            path.with_name("plots").mkdir()
            for name, svg in standalone_figures(page).items():
                (path.with_name("plots") / f"{name}.svg").write_text(svg, encoding="utf-8")
        return path

    def story(self) -> Story:
        """Everything that report.html shows."""
        shown = spread(len(self.heldout), 10)
        scores = [per_prompt(self.heldout[i], "score") for i in shown]
        return Story(
            name=self.config.name,
            headline=self.headline(),
            rows=self.rows,
            reports=self.reports,
            heldout=self.heldout,
            prompts=self._prompts,
            gains=self._gains,
            win_rates=(
                {self.rows[i]["iteration"]: one for i, one in zip(shown, win_rate_matrix(scores), strict=True)}
                if all(scores)
                else {}
            ),
            curves=self._curves,
            weights=self._weights,
            dropped=self._dropped,
            seconds=self._seconds,
            decisions=self.decisions,
            selections=self.selections,
            tournament=self.tournament,
            settings=self._settings(),
        )

    def _gain_of(self, iteration: int) -> dict[str, Any]:
        start, now = self.measured_at(0), self.measured_at(iteration)
        names = sorted(start.scores.keys() & now.scores.keys())
        if len(names) < 2:
            return {}
        difference = np.array([now.scores[name] - start.scores[name] for name in names])
        lengths = np.array([now.tokens[name] - start.tokens[name] for name in names])
        plain = self.gain(iteration)
        assert plain is not None
        return plain._asdict() | {"controlled": paired_gain(difference, lengths)._asdict()}

    def _settings(self) -> str:
        return self.config.model_dump_json(indent=1, exclude_defaults=True)

    def _examples(self, count: int) -> list[str]:
        first = self.heldout[0]
        step = max(1, len(first) // count)
        lines = []
        for row in first[::step][:count]:
            lines += [f"**{row['prompt_id']}**", ""]
            for iteration, rows in enumerate(self.heldout):
                match = next(
                    r for r in rows if (r["prompt_id"], r["candidate"]) == (row["prompt_id"], row["candidate"])
                )
                text = re.sub(r"\s+", " ", match["completion"]).strip()
                score = "unscored" if match["score"] is None else f"{match['score']:.2f}"
                lines.append(f"- iteration {iteration} ({score}): {text}")
            lines.append("")
        return lines

    def _publish(self, place: Place) -> None:
        """The report so far, and the tables into the UI. A server that went away costs the picture, not the run."""
        key = self.config.name
        try:
            report = self.write_report()
        except Exception as error:  # at the end of the run it is written once more, and then an error is one
            if logger := _logger():
                logger.warning("the report could not be written yet (%s: %s)", type(error).__name__, error)
            return
        try:
            create_table_artifact(self.rows, key=f"{key}-history", description=f"{key}, iteration by iteration")
            summary = f"## {place.step}\n\n{self.headline()}\n\n{markdown_table(self.rows[-1:])}\n\nReport: `{report.with_suffix('.html')}`"
            create_markdown_artifact(summary, key=f"{key}-{place.step.replace('_', '-')}")
            create_link_artifact(
                report.with_suffix(".html").as_uri(), link_text=f"Report of {key}", key=f"{key}-report"
            )
        except Exception as error:
            if logger := _logger():
                logger.warning("the tables could not be sent to Prefect: %s", error)


def _tournament_lines(standing: Standing) -> list[str]:
    rows = [
        {"": name}
        | {
            f"against {other}": "" if rate is None else f"{100 * rate:.1f} %"
            for other, rate in zip(standing.names, line, strict=True)
        }
        for name, line in zip(standing.names, standing.rates, strict=True)
    ]
    said = f"By {standing.scorer}, over {standing.prompts} prompts; {standing.failed} comparisons failed and are in no mean."
    return [said, "", markdown_table(rows)]


def _number(place: Place) -> int:
    return int(place.step.removeprefix("iter_"))


def _prompt_texts(ref: ArtifactRef) -> dict[str, str]:
    rows = read_shards(ref.path, "prompts").to_pylist()
    return {row["prompt_id"]: "\n\n".join(message["content"] for message in row["messages"]) for row in rows}


def _curve(ref: ArtifactRef) -> list[dict[str, float]]:
    path = Path(ref.path) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _drop_reasons(records: Any) -> dict[str, float]:
    """Reasons and counts, as the stages' records say: what was dropped, and what spoilt a candidate."""
    found: dict[str, float] = {}
    record: ArtifactRecord
    for record in records:
        for name, count in record.metrics.items():
            kind, _, reason = name.partition("/")
            if kind in ("dropped", "spoilt") and reason and count:
                found[f"{record.stage}: {reason}"] = found.get(f"{record.stage}: {reason}", 0.0) + count
        if record.stage == "weigh" and record.metrics.get("dropped"):
            found["weigh: equal responses"] = record.metrics["dropped"]
    return found


def _weight_picture(weighed: Built, trained: Built) -> WeightPicture | None:
    """Histogram and examples of the token weights; None where all of them are one."""
    metrics = weighed.record.metrics
    ends = [
        metrics[f"weights/{side}/{end}"]
        for side in ("chosen", "rejected")
        for end in ("min", "max")
        if f"weights/{side}/{end}" in metrics
    ]
    if all(abs(end - 1.0) < 1e-6 for end in ends):
        return None
    sides: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    read = 0
    paths = sorted(Path(weighed.ref.path).glob("part-*.parquet"))
    for path in paths:
        table = pq.read_table(path, columns=[f"{side}_weights" for side in sides], partitioning=None)
        for side, found in sides.items():
            found.append(table[f"{side}_weights"].combine_chunks().flatten().to_numpy())
            read += len(found[-1])
        if read >= MOST_TOKENS:
            break
    low, high = min(ends), max(ends)
    edges = np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, high + 0.5, 41)
    parts = {side: np.concatenate(found) for side, found in sides.items()}
    bins = {
        side: list(np.histogram(values, edges)[0] / len(values)) if len(values) else []
        for side, values in parts.items()
    }
    clamped = {
        name.removeprefix("weights/"): value for name, value in metrics.items() if re.search(r"\bat_[LU]\b", name)
    }
    tokenizer = Path(trained.record.inputs["policy"].path) / "tokenizer.json"
    return WeightPicture(
        list(map(float, edges)),
        bins["chosen"],
        bins["rejected"],
        clamped,
        read,
        _token_examples(paths[0], tokenizer) if paths else [],
    )


def _token_examples(shard: Path, tokenizer_file: Path, count: int = 4, longest: int = 300) -> list[dict[str, Any]]:
    """The pairs of a shard whose weights vary most, as (text, weight) per token. Needs the policy's tokenizer.json; else none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return []
    if not tokenizer_file.is_file():
        return []
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    columns = ["prompt_id", "chosen_ids", "chosen_weights", "rejected_ids", "rejected_weights"]
    rows = pq.read_table(shard, columns=columns, partitioning=None).slice(0, 500).to_pylist()
    rows.sort(key=lambda row: (-float(np.std(row["chosen_weights"] or [0.0])), row["prompt_id"]))
    return [
        {
            "prompt_id": row["prompt_id"],
            **{
                side: token_pieces(tokenizer, row[f"{side}_ids"][:longest], row[f"{side}_weights"][:longest])
                for side in ("chosen", "rejected")
            },
        }
        for row in rows[:count]
    ]


def token_pieces(tokenizer: Any, ids: Sequence[int], weights: Sequence[float]) -> list[tuple[str, float]]:
    """The text that each token adds. A character made of several tokens is shown with the last of them, at their mean weight."""
    pieces: list[tuple[str, float]] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        context = ids[max(0, begin - 4) : begin]
        before = tokenizer.decode(context, skip_special_tokens=False) if context else ""
        piece = tokenizer.decode([*context, *ids[begin:end]], skip_special_tokens=False)[len(before) :]
        if piece.endswith("\ufffd") and end < len(ids) and end - begin < 4:
            continue
        pieces.append((piece, float(np.mean(weights[begin:end]))))
        begin = end
    return pieces


def _logger() -> Any:
    """Prefect's logger, or None outside a run."""
    try:
        return get_run_logger()
    except Exception:
        return None
