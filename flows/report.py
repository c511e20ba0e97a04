"""Flows - what a run found: the cumulative table (Prefect artifact, terminal), a summary per iteration, and report.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from data_contracts.shards import read_shards
from data_contracts.store import Store, write_atomic
from flows.config import RunConfig
from stages.evaluation.intervals import Interval, paired_bootstrap
from stages.evaluation.stage import per_prompt
from tasks.build import Built
from tasks.stages import Place
from tasks.tracking import Tracker

STAGES = ("sample", "score", "weigh", "train", "evaluate")


class History:
    """Collects what the iterations made. Only reads records: a cached iteration reports like a fresh one."""

    def __init__(self, config: RunConfig, store: Store, tracker: Tracker):
        self.config, self.store, self.tracker = config, store, tracker
        self.rows: list[dict[str, Any]] = []
        self.heldout: list[list[dict[str, Any]]] = []
        self._built: dict[str, dict[str, Built]] = {}

    def built(self, place: Place, **stages: Built) -> None:
        """The training half of an iteration."""
        self._built[place.step] = stages
        for name, built in stages.items():
            self.tracker.stage(_number(place), built.record, built.cached, name)

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        """An iteration is complete: add its row, show it."""
        stages = self._built.get(place.step, {}) | {"evaluate": report}
        self.tracker.stage(_number(place), answers.record, answers.cached, "heldout_generations")
        self.tracker.stage(_number(place), report.record, report.cached, "evaluate")
        rows = {(row["task"], row["metric"]): row for row in read_shards(report.ref.path, "eval_report").to_pylist()}
        self.heldout.append(read_shards(report.ref.path, "heldout", "heldout").to_pylist())
        score = rows["heldout", "score"]
        row: dict[str, Any] = {
            "iteration": _number(place),
            "heldout_score": round(score["value"], 4),
            "low": round(score["low"], 4),
            "high": round(score["high"], 4),
            "mean_tokens": round(rows["heldout", "mean_tokens"]["value"], 1),
            "finished": round(rows["heldout", "finished_rate"]["value"], 3),
            "start_logp": round(rows["heldout", "start_logp"]["value"], 3),
            "distinct": round(rows["heldout", "distinct_rate"]["value"], 3),
        }
        row |= {f"{task}/{metric}": round(item["value"], 3) for (task, metric), item in rows.items() if task != "heldout"}
        seconds = dict.fromkeys(STAGES, 0.0)
        for built in stages.values():  # auxiliary models count under the stage that made them
            seconds[built.record.stage] += built.record.seconds["wall"]
        seconds["evaluate"] += answers.record.seconds["wall"]
        row |= {f"{name} s": round(value, 1) for name, value in seconds.items()}
        self.rows.append(row)
        self.tracker.summary(_number(place), {name.replace(" ", "_"): value for name, value in row.items() if name != "iteration"})
        self._publish(place)

    def gain(self, last: int = -1) -> Interval:
        """Held-out score of an iteration minus the start's, paired by prompt."""
        return paired_bootstrap(per_prompt(self.heldout[0], "score"), per_prompt(self.heldout[last], "score"))

    def fluency_change(self) -> float:
        """Change of the mean start-model log-prob per token, last minus start; negative: less fluent."""
        return self.rows[-1]["start_logp"] - self.rows[0]["start_logp"]

    def headline(self) -> str:
        gain = self.gain()
        return (
            f"held-out score {self.rows[0]['heldout_score']:.3f} -> {self.rows[-1]['heldout_score']:.3f}: gain {gain.mean:+.3f}, 95 % interval [{gain.low:+.3f}, {gain.high:+.3f}] "
            f"(paired bootstrap over {len(per_prompt(self.heldout[0], 'score'))} prompts); start-model log-prob per token {self.fluency_change():+.3f} nats"
        )

    def write_report(self) -> Path:
        """`runs/<name>/report.md`: the table, the headline, and answers side by side."""
        path = self.store.root / "runs" / self.config.name / "report.md"
        lines = [
            f"# Self-play run {self.config.name}",
            "",
            self.headline(),
            "",
            markdown_table(self.rows),
            "",
            "## The same prompts, iteration by iteration",
            "",
        ]
        lines += self._examples(8)
        lines += ["", "## Settings", "", "```json", self.config.model_dump_json(indent=1, exclude_defaults=True), "```", ""]
        write_atomic(path, "\n".join(lines))
        return path

    def _examples(self, count: int) -> list[str]:
        first = self.heldout[0]
        step = max(1, len(first) // count)
        lines = []
        for row in first[::step][:count]:
            lines += [f"**{row['prompt_id']}**", ""]
            for iteration, rows in enumerate(self.heldout):
                match = next(r for r in rows if (r["prompt_id"], r["candidate"]) == (row["prompt_id"], row["candidate"]))
                text = re.sub(r"\s+", " ", match["completion"]).strip()
                lines.append(f"- iteration {iteration} ({match['score']:.2f}): {text}")
            lines.append("")
        return lines

    def _publish(self, place: Place) -> None:
        """Into the UI. A server that went away costs the picture, not the run."""
        try:
            create_table_artifact(self.rows, key=f"{self.config.name}-history", description=f"{self.config.name}, iteration by iteration")
            create_markdown_artifact(
                f"## {place.step}\n\n{self.headline()}\n\n" + markdown_table(self.rows[-1:]),
                key=f"{self.config.name}-{place.step.replace('_', '-')}",
            )
        except Exception as error:
            get_run_logger().warning("the tables could not be sent to Prefect: %s", error)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[-1])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])


def _number(place: Place) -> int:
    return int(place.step.removeprefix("iter_"))
