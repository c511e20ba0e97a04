"""Flows - what a run found: the cumulative table, a summary per iteration, report.md and report.html."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.files import write_atomic
from data_contracts.redaction import redact
from data_contracts.rows import HeldoutRow, ReportRow
from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.config import RunConfig
from flows.gate import Verdict
from flows.report.about import about, changed_settings
from flows.report.channels import Pages, RunTracker
from flows.report.markdown import markdown_report
from flows.report.page import markdown_table, render, standalone_figures
from flows.report.story import ShownPrompt, Story, WeightPicture, shown_prompts
from flows.report.text import visible
from flows.report.trained import Trained, trained
from flows.report.weights import weight_picture
from flows.tournament import Standing, spread, standing
from stages.evaluation.heldout import per_prompt
from stages.evaluation.intervals import Interval, paired_bootstrap
from stages.evaluation.promotion import PROMOTE, Measurement, paired_gain
from stages.evaluation.rows import column_names
from stages.evaluation.win_rates import win_rate_matrix
from stages.stage import STAGES
from tasks.build import Built
from tasks.place import Place


class History:
    """Collects what the iterations made. Only reads records: a cached iteration reports like a fresh one."""

    def __init__(self, config: RunConfig, store: Store, tracker: RunTracker, pages: Pages):
        """`tracker`: mirrors records to MLflow; `pages`: shows the run so far while it is played."""
        self.config, self.store, self.tracker, self.pages = config, store, tracker, pages
        self.directory = store.run_directory(config.name)
        self.rows: list[dict[str, Any]] = []
        self.heldout: list[list[HeldoutRow]] = []
        self.reports: list[list[ReportRow]] = []
        self.decisions: list[dict[str, Any]] = []
        """Of the promotion gate."""
        self.selections: list[dict[str, Any]] = []
        """Checkpoints of a training that were compared."""
        self.tournament: Standing | None = None
        self.best: ArtifactRef | None = None
        """The last policy that the gate promoted; None before its first verdict."""
        self.data: Sequence[str] = ()
        """Lines on the prompts: how many were read and used, and why the others were not."""
        self._built: dict[int, dict[str, Built]] = {}
        self._seconds: list[dict[str, float]] = []
        self._gains: list[dict[str, Any]] = []
        self._prompts: dict[str, ShownPrompt] = {}
        self._curves: dict[int, list[dict[str, float]]] = {}
        self._weights: dict[int, WeightPicture] = {}
        self._trained: dict[int, Trained] = {}
        self._policy: ArtifactRef | None = None
        """The policy that the run has made so far; None before the first training."""
        self._records: list[ArtifactRecord] = []

    def built(self, place: Place, **stages: Built) -> None:
        """The training half of an iteration."""
        self._built[place.iteration] = stages
        for name, built in stages.items():
            self.tracker.stage(place.iteration, built.record, built.cached, name)
            self._records.append(built.record)
            for sentence in built.record.facts.get("told_apart", ()) if built.record.stage == name else ():
                self.pages.warn(f"iteration {place.iteration}: {sentence}")
        if "train" in stages:
            self._curves[place.iteration] = _curve(stages["train"].ref)
            self._policy = stages["train"].ref
        self._trained[place.iteration] = trained(stages)
        if "weigh" in stages and "train" in stages:
            prompts = stages["score"].record.inputs.get("prompts") if "score" in stages else None
            if picture := weight_picture(stages["weigh"], stages["train"], prompts):
                self._weights[place.iteration] = picture

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        """An iteration is complete: add its row, show it."""
        stages = self._built.get(place.iteration, {}) | {"evaluate": report}
        self._records += [answers.record, report.record]
        self.tracker.stage(place.iteration, answers.record, answers.cached, "heldout_generations")
        self.tracker.stage(place.iteration, report.record, report.cached, "evaluate")
        self.reports.append(cast(list[ReportRow], read_shards(report.ref.path, "eval_report").to_pylist()))
        rows = {row["metric"]: row for row in self.reports[-1] if row["suite"] == "heldout"}
        self.heldout.append(cast(list[HeldoutRow], read_shards(report.ref.path, "heldout", "heldout").to_pylist()))
        if not self._prompts and "prompts" in report.record.inputs:
            self._prompts = shown_prompts(report.record.inputs["prompts"])

        def value(metric: str, column: str, digits: int) -> float | None:
            number = rows[metric][column] if metric in rows else None
            if number is None:
                return None
            return round(number, digits)

        row: dict[str, Any] = {
            "iteration": place.iteration,
            "heldout_score": value("score", "value", 4),  # None: nothing could be scored
            "low": value("score", "low", 4),
            "high": value("score", "high", 4),
            "mean_tokens": value("mean_tokens", "value", 1),
            "finished": value("finished_rate", "value", 3),
            "start_logp": value("start_logp", "value", 3),
            "distinct": value("distinct_rate", "value", 3),
        }
        if row["heldout_score"] is not None and row["low"] is None:  # one prompt: not known, and not unscored
            del row["low"], row["high"]
        given = ("preference_accuracy", "preference_margin", "preference_loss", "response_logp")
        row |= {metric: value(metric, "value", 3) for metric in given if metric in rows}
        if missing := sum(answer["score"] is None for answer in self.heldout[-1]):
            row["unscored"] = missing
        named = zip(column_names(self.reports[-1]), self.reports[-1], strict=True)
        row |= {name: round(item["value"], 3) for name, item in named if item["suite"] != "heldout"}
        row |= {
            item["task"]: None
            for item in self.reports[-1]
            if item["metric"] == "failed_judgments" and item["value"] == item["n"]
        }  # its judge was away: shown as unscored
        seconds = dict.fromkeys(STAGES, 0.0)
        for built in stages.values():  # auxiliary models count under the stage that made them
            seconds[built.record.stage] = seconds.get(built.record.stage, 0.0) + built.record.seconds["wall"]
        seconds["evaluate"] += answers.record.seconds["wall"]
        self._seconds.append(seconds)
        row |= {f"{name} s": round(value, 1) for name, value in seconds.items()}
        self.rows.append(row)
        self._gains.append(self._gain_of(-1))
        summary = {
            name.replace(" ", "_"): value for name, value in row.items() if name != "iteration" and value is not None
        }
        self.tracker.summary(place.iteration, summary)
        self._publish(place)

    def measured_at(self, iteration: int) -> Measurement:
        """What the promotion gate compares."""
        return Measurement.from_rows(self.heldout[iteration], self.reports[iteration])

    def selected(
        self,
        place: Place,
        checkpoints: Sequence[ArtifactRef],
        measurements: Sequence[Measurement],
        gains: Sequence[Interval | None],
        chosen: int,
    ) -> None:
        """Which checkpoint of the iteration's training goes on, and how all of them measured."""
        self._policy = checkpoints[chosen]
        for number, (ref, measurement, gain) in enumerate(zip(checkpoints, measurements, gains, strict=True)):
            scores = list(measurement.scores.values())
            self.selections.append(
                {
                    "iteration": place.iteration,
                    "checkpoint": ref.key.partition("/")[2] or "end of training",
                    "heldout_score": round(float(np.mean(scores)), 4) if scores else None,
                    "gain over the first": gain.text() if gain else "",
                    "goes on": "yes" if number == chosen else "",
                }
            )

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        """The tournament at the end of the run; kept in `runs/<name>/tournament.json` too.

        `scored` None: its judge was away.
        """
        self.tournament = result = standing(scorer, names, scored and scored.ref, prompts)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / "tournament.json", json.dumps(result._asdict(), indent=1) + "\n")
        for name, line in zip(names, result.rates, strict=True):
            if line[0] is not None and name.isdigit():
                self.tracker.summary(int(name), {"tournament/win_rate_against_start": line[0]})

    def decided(self, place: Place, verdict: Verdict) -> None:
        """The gate's verdict about the iteration that was measured last; kept in `runs/<name>/gate.json` too."""
        self.best = verdict.best
        if verdict.enabled:
            self._policy = verdict.best
        self.decisions.append(_as_json(verdict))
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / "gate.json", json.dumps(self.decisions, indent=1) + "\n")
        decision = verdict.decision
        self.pages.info(f"gate, iteration {verdict.iteration}: {decision.outcome} ({decision.reason})")
        if decision.gain is not None:
            gain = {f"gate/{name}": getattr(decision.gain, name) for name in ("mean", "low", "high")}
            self.tracker.summary(verdict.iteration, gain | {"gate/promoted": float(decision.outcome == PROMOTE)})

    def gain(self, last: int = -1) -> Interval | None:
        """Held-out score of an iteration minus the start's, paired by prompt. None: no prompt was scored in both."""
        before, after = per_prompt(self.heldout[0], "score"), per_prompt(self.heldout[last], "score")
        if before.keys() & after.keys():
            return paired_bootstrap(before, after)
        return None

    def fluency_change(self) -> float:
        """Change of the mean start-model log-prob per token, last minus start; negative: less fluent."""
        return self.rows[-1]["start_logp"] - self.rows[0]["start_logp"]

    def headline(self) -> str:
        """The run's outcome in one sentence: held-out gain, measured and at equal length, and the change of fluency."""
        gain, fluency = self.gain(), f"start-model log-prob per token {self.fluency_change():+.3f} nats"
        if gain is None:
            return f"the held-out answers could not be scored; {fluency}"
        before, after = self.rows[0]["heldout_score"], self.rows[-1]["heldout_score"]
        prompts = len(per_prompt(self.heldout[0], "score"))
        controlled = ""
        if "controlled" in self._gains[-1]:
            controlled = f", at equal length {Interval(**self._gains[-1]['controlled']).text()}"
        return (
            f"held-out score {before:.3f} -> {after:.3f}: gain {gain.text()}{controlled} "
            f"(95 %, paired bootstrap over {prompts} prompts); {fluency}"
        )

    def write_report(self, plots: bool = False) -> Path:
        """`runs/<name>/report.md` (its path is returned) and `report.html` beside it; its figures as `plots/*.svg`
        too, if asked for.
        """
        path = self.directory / "report.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        story = self.story()
        write_atomic(path, visible(redact(markdown_report(story))))
        write_atomic(path.with_suffix(".html"), redact(render(story)))
        if plots:
            shutil.rmtree(path.with_name("plots"), ignore_errors=True)
            path.with_name("plots").mkdir()
            for name, svg in standalone_figures(story).items():
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
                {self.rows[i]["iteration"]: rates for i, rates in zip(shown, win_rate_matrix(scores), strict=True)}
                if all(scores)
                else {}
            ),
            curves=self._curves,
            weights=self._weights,
            trained=self._trained,
            seconds=self._seconds,
            decisions=self.decisions,
            selections=self.selections,
            tournament=self.tournament,
            settings=json.dumps(changed_settings(self.config), indent=1),
            data=self.data,
            about=about(self.config, self.data, self._records, self._policy),
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

    def _publish(self, place: Place) -> None:
        """Show the run so far. At its end the report is written once more, and then an error is one."""
        try:
            report = self.write_report()
        except Exception as error:
            self.pages.warn(f"the report could not be written yet ({type(error).__name__}: {error})")
            return
        summary = f"## {place.step}\n\n{self.headline()}\n\n{markdown_table(self.rows[-1:])}"
        self.pages.show(place, self.rows, summary, report.with_suffix(".html"))


def _as_json(verdict: Verdict) -> dict[str, Any]:
    decision = verdict.decision._asdict()
    for name in ("gain", "plain"):
        interval = decision[name]
        decision[name] = interval and interval._asdict()
    best = {"iteration": verdict.best_iteration, "kind": verdict.best.kind, "key": verdict.best.key}
    where = {"iteration": verdict.iteration, "against": verdict.against, "enabled": verdict.enabled}
    return where | decision | {"best": best}


def _curve(ref: ArtifactRef) -> list[dict[str, float]]:
    path = Path(ref.path) / "metrics.jsonl"
    if path.is_file():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []
