"""Flows - report.html: one page that holds everything, from what a `Story` says. It asks no network and runs no script.

The figures are made in figures.py; the numbers are gathered in report.py. A part without data is left out, not shown empty.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from flows.report import figures
from flows.report.figures import Series
from flows.tournament import Standing, spread

LONGEST_TEXT = 1500
SHOWN_ITERATIONS = 6
MOST_BENCHMARKS = 24


class WeightPicture(NamedTuple):
    """Per-token weights of one iteration."""

    edges: list[float]
    chosen: list[float]
    """Part of the tokens in each bin."""
    rejected: list[float]
    clamped: dict[str, float]
    """Name of a bound -> part of the tokens at it."""
    tokens: int
    examples: list[dict[str, Any]]
    """{"prompt_id", "chosen": [(text, weight), ...], "rejected": [...]}"""


class Story(NamedTuple):
    """A run so far; every list has one entry per iteration, the start model's first."""

    name: str
    headline: str
    rows: list[dict[str, Any]]
    """Of the table: rounded, by column name."""
    reports: list[list[dict[str, Any]]]
    """Rows of eval_report."""
    heldout: list[list[dict[str, Any]]]
    prompts: dict[str, str]
    """prompt_id -> its text."""
    gains: list[dict[str, Any]]
    """Against the start: {"mean", "low", "high", "controlled": {...}} or empty."""
    win_rates: dict[int, list[float | None]]
    """Iteration -> part of the prompts on which it beats each of these iterations; at most ten of them."""
    curves: dict[int, list[dict[str, float]]]
    """Iteration -> lines of metrics.jsonl."""
    weights: dict[int, WeightPicture]
    dropped: dict[int, dict[str, float]]
    """Iteration -> reason -> count."""
    seconds: list[dict[str, float]]
    """Stage -> seconds."""
    decisions: list[dict[str, Any]]
    """Of the promotion gate."""
    selections: list[dict[str, Any]]
    """Checkpoints of each training: rows of a table."""
    tournament: Standing | None
    settings: str


def render(story: Story) -> str:
    sections = [
        ("score", "Did it get better?", _progress(story)),
        ("gate", "Promotion gate", _gate(story)),
        ("checkpoints", "Checkpoints of each training", _selections(story)),
        ("benchmarks", "Benchmarks", _benchmarks(story)),
        ("training", "Training", _training(story)),
        ("weights", "Token weights", _weights(story)),
        ("lengths", "Lengths and fluency", _lengths(story)),
        ("data", "What was dropped", _dropped(story)),
        ("responses", "The same prompts, iteration by iteration", _responses(story)),
        ("times", "Where the time went", _times(story)),
        ("table", "All numbers", table(story.rows)),
        (
            "settings",
            "Settings",
            f"<details><summary>What differs from the defaults</summary><pre>{escape(story.settings)}</pre></details>",
        ),
    ]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    header = f"<h1>{escape(story.name)}</h1><p>{escape(story.headline)}</p>{_tiles(story)}"
    return document(f"{story.name}: self-play report", f"<header>{header}</header><nav>{nav}</nav><main>{body}</main>")


def document(title: str, body: str) -> str:
    """A page that asks no network and runs no script."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n'
    )


def standalone_figures(page: str) -> dict[str, str]:
    """Name -> SVG file of each figure of a rendered page, with its caption as the title and the page's colours."""
    found = re.findall(
        r'<figure id="fig-([^"]+)"><figcaption>(.*?)</figcaption>.*?<svg ([^>]*)>(.*?)</svg>', page, flags=re.DOTALL
    )
    return {
        name: f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}><title>{caption}</title><style>{STYLE}</style>{body}</svg>\n'
        for name, caption, attributes, body in found
    }


def figure(name: str, caption: str, svg: str, labels: Sequence[str] = ()) -> str:
    return f'<figure id="fig-{name}"><figcaption>{escape(caption)}</figcaption>{figures.legend(labels)}{svg}</figure>'


def grid(*items: str) -> str:
    shown = [item for item in items if item]
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def _tiles(story: Story) -> str:
    last, first = story.rows[-1], story.rows[0]
    tiles = [("iterations", str(last["iteration"]), "")]
    if first["heldout_score"] is not None and last["heldout_score"] is not None:
        tiles.append(("held-out score", f"{last['heldout_score']:.3f}", f"from {first['heldout_score']:.3f}"))
    if gain := story.gains[-1]:
        tiles.append(("gain", f"{gain['mean']:+.3f}", f"95 % [{gain['low']:+.3f}, {gain['high']:+.3f}]"))
        if even := gain.get("controlled"):
            tiles.append(("at equal length", f"{even['mean']:+.3f}", f"95 % [{even['low']:+.3f}, {even['high']:+.3f}]"))
    tiles.append(("tokens per answer", f"{last['mean_tokens']:g}", f"from {first['mean_tokens']:g}"))
    tiles.append(("time", _duration(sum(sum(one.values()) for one in story.seconds)), "all stages"))
    if unscored := sum(row["score"] is None for rows in story.heldout for row in rows):
        tiles.append(("unscored answers", str(unscored), "in no mean"))
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><small>{escape(a)}</small><b>{escape(b)}</b><small>{escape(c)}</small></div>" for a, b, c in tiles
        )
        + "</div>"
    )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _progress(story: Story) -> str:
    numbers = [row["iteration"] for row in story.rows]
    score = Series(
        "held-out score", numbers, *([row[name] for row in story.rows] for name in ("heldout_score", "low", "high"))
    )
    items = []
    if any(row["heldout_score"] is not None for row in story.rows):
        items.append(
            figure(
                "score",
                "Held-out score, 95 % interval over prompts",
                figures.lines("held-out score", [score], "iteration", "score"),
            )
        )
    gains = [(number, gain) for number, gain in zip(numbers, story.gains, strict=True) if gain]
    if len(gains) > 1:
        series = [
            _gain_series("as measured", gains, lambda gain: gain),
            _gain_series("at equal length", gains, lambda gain: gain["controlled"]),
        ]
        items.append(
            figure(
                "gain",
                "Gain over the start model, paired by prompt",
                figures.lines("gain over the start model", series, "iteration", "score gain", zero=True),
                [one.label for one in series],
            )
        )
    if len(story.win_rates) > 1:
        names, values = [str(number) for number in story.win_rates], list(story.win_rates.values())
        picture = figures.matrix("win rates between iterations", names, values, "against iteration", "iteration")
        items.append(
            figure("win-rates", "How often (%) an iteration beats another on the same prompt; ties count half", picture)
        )
    if story.tournament is not None:
        one = story.tournament
        caption = f"Tournament: how often (%) the row beats the column, by {one.scorer}, {one.prompts} prompts"
        caption += f"; {one.failed} comparisons failed" if one.failed else ""
        items.append(
            figure("tournament", caption, figures.matrix("tournament", one.names, one.rates, "against", "policy"))
        )
    return grid(*items)


def _gain_series(label: str, gains: Sequence[tuple[int, dict[str, Any]]], pick: Any) -> Series:
    picked = [pick(gain) for _, gain in gains]
    return Series(
        label, [number for number, _ in gains], *([one[name] for one in picked] for name in ("mean", "low", "high"))
    )


def _gate(story: Story) -> str:
    if not story.decisions:
        return ""
    acting = story.decisions[-1]["enabled"]
    rows = []
    for one in story.decisions:
        gain = one["gain"]
        rows.append(
            {
                "iteration": one["iteration"],
                "against": one["against"],
                "outcome": one["outcome"],
                "gain": f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else "",
                "detectable": f"{one['detectable']:.3f}" if one["detectable"] is not None else "",
                "prompts": one["prompts"],
                "unscored": one["unscored"],
                "why": one["reason"],
            }
        )
    note = (
        "The gate is on: the outcome decides which policy goes on."
        if acting
        else "The gate is off: outcomes are recorded, and every policy goes on."
    )
    note += " <i>detectable</i>: the smallest true gain that so many prompts show in 80 % of all runs."
    return f"<p>{note}</p>{table(rows)}"


def _selections(story: Story) -> str:
    note = "Of the checkpoints of one training, the one that measures best on the held-out prompts goes on."
    return f"<p>{note}</p>{table(story.selections)}" if story.selections else ""


def _benchmarks(story: Story) -> str:
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    failures = []
    for row, report in zip(story.rows, story.reports, strict=True):
        for item in report:
            if item["metric"] == "failed_judgments":
                if item["value"]:
                    all_failed = item["value"] == item["n"]
                    told = {
                        "iteration": row["iteration"],
                        "benchmark": item["task"],
                        "failed": int(item["value"]),
                        "of": item["n"],
                    }
                    failures.append(
                        told | {"judge": item["task_version"], "result": "unscored" if all_failed else "of the others"}
                    )
            elif item["suite"] != "heldout":
                found.setdefault((item["suite"], item["task"], item["metric"]), {})[row["iteration"]] = item
    items = []
    for (suite, task, metric), values in list(found.items())[:MOST_BENCHMARKS]:
        numbers = [row["iteration"] for row in story.rows]
        rows = [values.get(number, {}) for number in numbers]  # a gap where it could not be measured
        series = Series(
            f"{task} {metric}", numbers, *([row.get(name) for row in rows] for name in ("value", "low", "high"))
        )
        last = values[max(values)]
        caption = f"{suite}: {task}, {metric} ({last['n']} questions" + (
            f", {last['n_shot']}-shot)" if last["n_shot"] else ")"
        )
        items.append(figure(f"benchmark-{len(items)}", caption, figures.lines(caption, [series], "iteration", metric)))
    more = len(found) - len(items)
    note = f'<p>{more} more are in <a href="#table">the table</a>.</p>' if more else ""
    told = f"<h3>Judgments that failed: they are in no mean</h3>{table(failures)}" if failures else ""
    return grid(*items) + note + told


def _training(story: Story) -> str:
    steps: list[float] = []
    lines: list[dict[str, float]] = []
    marks: list[tuple[float, str]] = []
    for number, curve in sorted(story.curves.items()):
        first = len(steps)
        marks.append((first + 1, f"iteration {number}"))
        lines += curve
        steps += range(first + 1, first + len(curve) + 1)
    if not lines:
        return ""
    marks = marks if len(marks) <= 8 else [mark for i, mark in enumerate(marks) if i in spread(len(marks), 8)]
    keep = spread(len(lines), 400)
    x = [steps[i] for i in keep]

    def picture(name: str, caption: str, y_label: str, columns: dict[str, str], zero: bool = False) -> str:
        series = [
            Series(label, x, [lines[i].get(column) for i in keep], dots=len(keep) < 60)
            for label, column in columns.items()
            if any(column in line for line in lines)
        ]
        labels = [one.label for one in series]
        svg = figures.lines(
            caption, series, "optimizer step, all iterations", y_label, zero=zero, marks=marks, whole=True
        )
        return figure(name, caption, svg, labels) if series else ""

    return grid(
        picture(
            "rewards",
            "Implicit rewards while training",
            "reward",
            {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
            zero=True,
        ),
        picture(
            "logps",
            "Log-probability of the responses",
            "nats",
            {"chosen": "logps/chosen", "rejected": "logps/rejected"},
        ),
        picture("margins", "Reward margin", "chosen minus rejected", {"margin": "rewards/margins"}, zero=True),
        picture(
            "accuracy", "Pairs whose chosen response has the higher reward", "part", {"accuracy": "rewards/accuracies"}
        ),
        picture("loss", "Loss", "loss", {"loss": "loss"}),
    )


def _weights(story: Story) -> str:
    if not story.weights:
        return ""
    numbers = sorted(story.weights)
    items = []
    for number in [numbers[i] for i in spread(len(numbers), SHOWN_ITERATIONS)]:
        picture = story.weights[number]
        caption = f"Iteration {number}: weights of {picture.tokens} tokens"
        if picture.clamped:
            caption += "; at a bound: " + ", ".join(f"{name} {value:.1%}" for name, value in picture.clamped.items())
        sides = [
            (label, values) for label, values in (("chosen", picture.chosen), ("rejected", picture.rejected)) if values
        ]
        svg = figures.histograms(caption, picture.edges, sides, "weight", "part of the tokens")
        items.append(figure(f"weights-{number}", caption, svg, [label for label, _ in sides]))
    return grid(*items) + _heat_maps(numbers[-1], story.weights[numbers[-1]].examples)


def _heat_maps(number: int, examples: Sequence[dict[str, Any]]) -> str:
    if not examples:
        return ""
    every = [weight for one in examples for side in ("chosen", "rejected") for _, weight in one[side]]
    middle = sorted(every)[len(every) // 2]
    reach = max((abs(math.log(max(weight, 1e-6) / max(middle, 1e-6))) for weight in every), default=0.0) or 1.0

    def span(text: str, weight: float) -> str:
        level = round(5 * math.log(max(weight, 1e-6) / max(middle, 1e-6)) / reach)
        return f'<span class="w{"p" if level >= 0 else "m"}{abs(level)}" title="{weight:.3f}">{escape(text)}</span>'

    cards = "".join(
        f'<div class="card"><h3>{escape(one["prompt_id"])}</h3>'
        + "".join(
            f'<p class="tokens"><em>{side}</em> {"".join(span(text, weight) for text, weight in one[side])}</p>'
            for side in ("chosen", "rejected")
            if one[side]
        )
        + "</div>"
        for one in examples
    )
    scale = "".join(
        f'<span class="w{side}{level}">&nbsp;&nbsp;</span>'
        for side, level in [("m", n) for n in range(5, 0, -1)] + [("p", n) for n in range(6)]
    )
    note = f"Iteration {number}. Blue: less than the middle weight {middle:.2f}; orange: more. {scale}"
    return f'<div id="fig-heat"><h3>Weight of each token</h3><p class="tokens">{note}</p>{cards}</div>'


def _lengths(story: Story) -> str:
    numbers = [row["iteration"] for row in story.rows]
    quarters = []
    for part, label in ((0.5, "median"), (0.9, "longest tenth")):
        series = []
        for rows in story.heldout:
            lengths = sorted(row["num_tokens"] for row in rows)
            series.append(float(lengths[min(int(part * len(lengths)), len(lengths) - 1)]) if lengths else None)
        quarters.append(Series(label, numbers, series))
    mean = _metric_series(story, "mean_tokens", "mean")
    pictures = [mean, *quarters]
    fluency = [_metric_series(story, "start_logp", "log-prob")]
    finished, distinct = (
        _metric_series(story, "finished_rate", "ended by itself"),
        _metric_series(story, "distinct_rate", "distinct answers"),
    )
    repeats = _metric_series(story, "repetition", "repetition")
    rates = [one for one in (finished, distinct, repeats) if any(value is not None for value in one.y)]
    return grid(
        figure(
            "lengths",
            "Tokens per held-out answer",
            figures.lines("tokens per answer", pictures, "iteration", "tokens"),
            [s.label for s in pictures],
        ),
        figure(
            "fluency",
            "Mean log-prob per token under the start model",
            figures.lines("fluency", fluency, "iteration", "nats"),
        ),
        figure(
            "rates",
            "Held-out answers",
            figures.lines("rates", rates, "iteration", "part"),
            [one.label for one in rates],
        ),
    )


def _metric_series(story: Story, metric: str, label: str) -> Series:
    found = [
        {row["metric"]: row for row in report if row["suite"] == "heldout"}.get(metric, {}) for report in story.reports
    ]
    numbers = [row["iteration"] for row in story.rows]
    low, high = [row.get("low") for row in found], [row.get("high") for row in found]
    values = [row.get("value") for row in found]
    return (
        Series(label, numbers, values, low, high)
        if any(value is not None for value in low)
        else Series(label, numbers, values)
    )


def _dropped(story: Story) -> str:
    totals: dict[str, float] = {}
    for reasons in story.dropped.values():
        for reason, count in reasons.items():
            totals[reason] = totals.get(reason, 0) + count
    if not totals:
        return ""
    order = sorted(totals, key=lambda reason: -totals[reason])
    shown, rest = order[:7], order[7:]
    numbers = sorted(story.dropped)
    parts = [(reason, [story.dropped[number].get(reason, 0) for number in numbers]) for reason in shown]
    if rest:
        parts.append(("other", [sum(story.dropped[number].get(reason, 0) for reason in rest) for number in numbers]))
    svg = figures.stacks("what was dropped", [str(number) for number in numbers], parts, "iteration", "count")
    return grid(
        figure(
            "dropped",
            "Prompts, pairs and candidates that did not train, by reason",
            svg,
            [f"{label} ({totals.get(label, sum(v)):g})" for label, v in parts],
        )
    )


def _times(story: Story) -> str:
    names = list(dict.fromkeys(name for one in story.seconds for name in one))
    parts = [(name, [one.get(name, 0.0) for one in story.seconds]) for name in names]
    svg = figures.stacks(
        "seconds of each stage", [str(row["iteration"]) for row in story.rows], parts, "iteration", "seconds"
    )
    return grid(figure("seconds", "Wall seconds of each stage, all tries together", svg, names))


def _responses(story: Story) -> str:
    keep = spread(len(story.heldout), SHOWN_ITERATIONS)
    by_prompt = [_by_prompt(rows) for rows in story.heldout]
    names = [name for name in by_prompt[0] if all(name in one for one in by_prompt)]
    if not names:
        return ""
    cards = []
    for name, why in _interesting(names, by_prompt):
        columns = []
        for i in keep:
            row = by_prompt[i][name]
            score = "unscored" if row["score"] is None else f"{row['score']:.2f}"
            text = row["completion"].strip()
            text = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " \u2026"
            head = f"iteration {story.rows[i]['iteration']} <b>{score}</b> <small>{row['num_tokens']} tokens</small>"
            columns.append(f'<div class="answer"><h4>{head}</h4><p>{escape(text)}</p></div>')
        prompt = story.prompts.get(name, "")[:LONGEST_TEXT]
        cards.append(
            f'<div class="card"><h3>{escape(name)}{f" <small>{why}</small>" if why else ""}</h3><p class="prompt">{escape(prompt)}</p>'
            f'<div class="answers">{"".join(columns)}</div></div>'
        )
    return "".join(cards)


def _by_prompt(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first answer to each prompt."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], row)
    return found


def _interesting(
    names: Sequence[str], by_prompt: Sequence[dict[str, dict[str, Any]]], count: int = 6
) -> list[tuple[str, str]]:
    """Evenly spaced prompts, then those whose score rose and fell most."""
    picked = [(names[i], "") for i in spread(len(names), count)]
    seen = {name for name, _ in picked}
    change = {}
    for name in names:
        first, last = by_prompt[0][name]["score"], by_prompt[-1][name]["score"]
        if first is not None and last is not None and name not in seen:
            change[name] = last - first
    order = sorted(change, key=lambda name: (change[name], name))
    picked += [(name, "rose most") for name in reversed(order[-2:]) if change[name] > 0]
    picked += [(name, "fell most") for name in order[:2] if change[name] < 0]
    return picked


def table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(name, '')))}</td>" for name in names) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown_table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |" for row in rows])


def _shown(value: Any) -> str:
    return "unscored" if value is None else str(value)


def _cell(value: Any) -> str:
    return "unscored" if value is None else value if isinstance(value, str) else json.dumps(value)


STYLE = """
:root{--bg:#fbfbf9;--card:#fff;--ink:#1c1e21;--soft:#5c636b;--rule:#e3e4e0;--c0:#0b62a4;--c1:#c9480a;--c2:#14866d;--c3:#a5488e;--c4:#8a6d00;--c5:#3aa0d8;--c6:#6b7280;--c7:#b03a48}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e8e8e4;--soft:#a2a8b0;--rule:#33373d;--c0:#6cb2ee;--c1:#f08a4b;--c2:#4cc3a5;--c3:#d98ac6;--c4:#d1ae3a;--c5:#7cc8f0;--c6:#9aa1ac;--c7:#ea7a86}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,nav,main{max-width:1360px;margin:0 auto;padding:0 16px}header{padding-top:24px}
h1{font-size:1.7rem;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:36px 0 10px}h3{font-size:.95rem;margin:0 0 6px}h4{font-size:.82rem;font-weight:600;margin:0 0 4px;color:var(--soft)}
header>p{margin:0 0 14px;color:var(--soft);max-width:80ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:10px}
.tiles>div,figure,.card{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tiles>div{padding:10px 12px;display:flex;flex-direction:column}.tiles b{font-size:1.35rem;font-variant-numeric:tabular-nums}small{color:var(--soft);font-size:.78rem;font-weight:400}
nav{display:flex;gap:6px 16px;flex-wrap:wrap;margin-top:16px;font-size:.88rem}a{color:var(--c0)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px;min-width:0}figcaption{font-size:.88rem;font-weight:600;margin-bottom:4px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}svg text{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}svg .label{fill:var(--ink)}svg .marked{font-size:9.5px}svg .cell{fill:var(--ink);font-size:13px}
.rule{stroke:var(--rule)}.zero{stroke:var(--soft);stroke-dasharray:4 3}.mark{stroke:var(--soft);stroke-dasharray:2 4;opacity:.7}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.bar{fill:none;stroke-width:1.6;opacity:.75}.area{opacity:.22}.none{fill:var(--rule);opacity:.5}.win{fill:var(--c2)}.lose{fill:var(--c1)}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.8rem;color:var(--soft);margin-bottom:4px}.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;background:var(--card)}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}tr:last-child td{border-bottom:0}#gate td:nth-child(3),#gate td:last-child,#gate th:last-child{text-align:left}
.grid+h3{margin-top:18px}
.card{padding:12px;margin-bottom:12px;min-width:0}.prompt{margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere;max-width:100ch}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(230px,100%),1fr));gap:10px}.answer{border-left:3px solid var(--rule);padding-left:10px;min-width:0}.answer h4 b{color:var(--ink)}
.answer p{margin:0;font-size:.9rem;white-space:pre-wrap;overflow-wrap:anywhere}.tokens{overflow-wrap:anywhere;white-space:pre-wrap;margin:0 0 8px;line-height:1.75}.tokens em{color:var(--soft);font-size:.8rem;margin-right:4px}
#fig-heat{margin-top:14px}.tokens span{padding:2px 0;border-radius:2px}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}summary{cursor:pointer}
section:last-child{padding-bottom:48px}
@media(max-width:560px){svg text{font-size:13.5px}svg .marked{font-size:11px}}
"""
STYLE += "".join(
    f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}.b{n}{{background:var(--c{n})}}" for n in range(8)
)
STYLE += "".join(
    f".w{side}{level}{{background:rgba({colour},{0.16 * level:.2f})}}"
    for side, colour in (("p", "240,130,40"), ("m", "50,130,220"))
    for level in range(6)
)
