"""Benchmark - the papers' claims, tried small: every comparison of deploy/runs/claims, and docs/evidence.md from them.

    make claims                                     every comparison that is not finished in ./store, then the page
    make claims ARGS="--only swift tidpo"           some of them; the page shows all that are finished
    make claims ARGS="--size gpu"                   with the models and data of their `sizes.gpu`

On a CPU the comparisons are played in this process, stage after stage: a stage's own process costs seconds, and
training a model of 0.26 M parameters hardly any. The keys are those of `selfplay compare`, so that command finds the
results and goes on from them. With `--size` it is that command which plays. Whatever is built is found again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import numpy as np

import stages.training.engine
import tasks.data.lengths
from benchmarks._cycle import worst_win_rate
from benchmarks._smoke import ROOT, add_smoke, tiny_model
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.store import Store
from flows.claims import MEASURES, claims_table, difference, results_of, verdict
from flows.comparison import START, Comparison, Outcome, Variant, cells_of, load_comparison, outcomes, table
from flows.comparison_page import write_report
from flows.preflight import models_of, preflight
from flows.self_play import SelfPlay
from stages.running.cost import before_fork
from stages.running.hardware import hardware
from tasks.place import Place
from tests.flows.in_process import HandsInProcess, History, check_here

CLAIMS = ROOT / "deploy" / "runs" / "claims"
FILES = {
    "swift": CLAIMS / "swift.yaml",
    "sppo": CLAIMS / "sppo.yaml",
    "tgdpo": CLAIMS / "tgdpo.yaml",
    "tidpo": CLAIMS / "tidpo.yaml",
    "tidpo_noise": CLAIMS / "tidpo_noise.yaml",
    "self_play_2026": ROOT / "deploy" / "runs" / "compare" / "self_play_2026.yaml",
}
TITLES = {
    "swift": "SWIFT",
    "sppo": "SPPO",
    "tgdpo": "TGDPO",
    "tidpo": "TI-DPO and TIS-DPO",
    "tidpo_noise": "TI-DPO with swapped labels",
    "self_play_2026": "Self-play methods of 2024 to 2026",
}
POLICY = ROOT / "models" / "stories260K"


class Made(NamedTuple):
    """When and on what a comparison was made first; kept beside its report as made.json."""

    results: str
    """Digest of the keys of all artifacts: other results are another making."""
    commit: str
    date: str
    machine: str
    minutes: float
    """Of processor time, of all stages; what several variants share counts once."""


class HandsThatCount(HandsInProcess):
    """Hands that build in this process; a record's processor seconds are its stage's own."""

    def run(self, stage, config, place, **inputs):
        spent = os.times()
        before_fork.seconds = -(spent.user + spent.system + spent.children_user + spent.children_system)
        return super().run(stage, config, place, **inputs)


def play(comparison: Comparison, store: Store) -> None:
    """Play every variant and seed in this process; what is built is found."""
    for variant in comparison.variants:
        began = time.monotonic()
        play_variant(variant, store)
        print(f"{variant.config.name}: {time.monotonic() - began:.0f} s", flush=True)
        gc.freeze()  # what was imported stays; each stage would look through it again, half a second each


def play_variant(variant: Variant, store: Store) -> None:
    """Play one run in this process, without Prefect."""
    config = variant.config
    checked = preflight(config, store)
    start, models = models_of(config, store)
    SelfPlay(config, checked, start, models, HandsThatCount(), History()).play(Place(str(store.root), config.name))


def compare(path: Path, store: Store, size: str) -> None:
    """Play a comparison by `selfplay compare`, a process per stage."""
    command = [sys.executable, "-m", "flows", "compare", str(path), "--store", str(store.root), "--size", size]
    subprocess.run(command, cwd=ROOT, check=True)


def made(comparison: Comparison, finished: list[Outcome], store: Store) -> Made:
    """As made.json has it; written anew if the results are not those that it is about."""
    records = {step.key: step.record for outcome in finished for step in outcome.steps if step.record is not None}
    results = hashlib.sha256(" ".join(sorted(map(str, records))).encode()).hexdigest()
    path = store.run_directory(comparison.config.name) / "made.json"
    if path.is_file() and (old := json.loads(path.read_text())) and old["results"] == results:
        return Made(**old)
    last = max(records.values(), key=lambda record: record.provenance.get("time", ""))
    seconds = sum(record.cost.get("cpu_seconds", 0.0) for record in records.values())
    new = Made(
        results, commit(), last.provenance["time"][:10], last.provenance.get("hardware", ""), round(seconds / 60, 1)
    )
    write_atomic(path, json.dumps(new._asdict(), indent=1) + "\n")
    return new


def commit() -> str:
    """The checkout's commit; a plus sign for changes to files that git knows."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


# --- docs/evidence.md ---

HEAD = """# Do the papers' claims hold, tried small?

Made by `make claims`, never by hand: the comparisons of deploy/runs/claims and `deploy/runs/compare/self_play_2026.yaml`, each on identical shards and
with three seeds. Nothing is left out because it failed. A row that is not as claimed speaks of these small models and few steps first, of the paper second.

The policy is stories260K (0.26 M parameters, which writes children's stories), the teacher SmolLM2-135M-Instruct, the prompts are
openings of stories of ours (deploy/prompts/README.md): 64 of them are held out. Learning rates are far above the papers', so that a few steps
visibly move so small a model.

**How it is decided.** A claim orders variants by one measure. *As claimed*: the 95 % interval of every neighbouring pair's difference lies above 0.
*Against*: one lies below 0. *Not decided*: anything else. Intervals are over seeds and prompts, both resampled (crossed bootstrap, 5,000
draws); a measure of a whole training has one number per seed, and its interval is Student's. Three seeds are few: an effect of a percent
stays undecided. No correction is made for the number of claims: of forty true zeros, two would be decided by chance.
"""


def what_weights_cost() -> list[str]:
    """SWIFT's Table 3, as docs/costs.md has it from `make table3`."""
    lines = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8").splitlines()
    measured = [line for line in lines if line.startswith(("- Weights, TIS-DPO", "- SWIFT's weights / training"))]
    words = "What the weights cost (SWIFT, Table 3; `make table3`, seconds in [Costs](costs.md)):"
    return ["", words, "", *measured] if measured else []


class Shown(NamedTuple):
    """What the page shows of a comparison."""

    title: str
    intro: str
    seeds: int
    how: Made
    claims: list[dict[str, str]]
    """As `claims_table` gives them."""
    more: list[str]
    """Lines below the claims: readings, and the table of the variants."""


def page(results: dict[str, Shown]) -> str:
    """The page, from what is finished, by name."""
    parts = [HEAD, "## All claims", "", *summary(results), *what_weights_cost()]
    for shown in results.values():
        parts += ["", f"## {shown.title}", "", shown.intro, "", row(["claim", "measure", "what came", "means", ""])]
        parts += ["|---|---|---|---|---|"]
        for cells in shown.claims:
            columns = [cells["claim"], cells["measure"], cells["what came"], cells["means"], f"**{cells['verdict']}**"]
            parts.append(row(columns))
        parts += shown.more
    return "\n".join(parts) + "\n"


def summary(results: dict[str, Shown]) -> list[str]:
    """One row per claim."""
    lines = ["| claim | source | expected | came | command | seeds | commit, date |", "|---|---|---|---|---|---|---|"]
    for name, shown in results.items():
        made_by = [f'`make claims ARGS="--only {name}"`', str(shown.seeds), f"{shown.how.commit}, {shown.how.date}"]
        for cells in shown.claims:
            verdict_ = f"**{cells['verdict']}**"
            lines.append(row([cells["claim"], cells["source"], cells["expected"], verdict_, *made_by]))
    return lines


def shown_comparison(name: str, comparison: Comparison, finished: list[Outcome], store: Store) -> Shown:
    """What a finished comparison showed: its claims with their figures, and its variants."""
    config, came, how = comparison.config, results_of(comparison, finished, store), made(comparison, finished, store)
    file = FILES[name]
    intro = (
        f"{len(config.variants)} variants, {len(config.seeds)} seeds: "
        f"`{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}`. Commit {how.commit}, {how.date}, "
        f"{how.machine}; {how.minutes:g} minutes of processor time. Plots: `store/runs/{config.name}/comparison.html`."
    )
    more = [f"\n{result.claim.statement}: {result.claim.reading}" for result in came if result.claim.reading]
    variants = cells_of(table(comparison, finished))
    columns = ["variant", "start", "final", "gain", f"against {variants[0]['variant']}", "start_logp"]
    more += ["", row([*columns[:3], "gain over the start", *columns[4:]]), "|---" * len(columns) + "|"]
    more += [row([cells[column] for column in columns]) for cells in variants]
    return Shown(TITLES.get(name, name), intro, len(config.seeds), how, claims_table(came), more)


def shown_cycle(store: Store) -> Shown:
    """The planted cycle, played now or found as it was played."""
    path = store.run_directory("claims-cycle") / "cycle.json"
    if not path.is_file():
        rates = {name: [worst_win_rate(name, seed) for seed in range(5)] for name in ("sppo", "dpo", START)}
        how = Made("", commit(), time.strftime("%Y-%m-%d"), hardware(), round(time.process_time() / 60, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"rates": rates, "made": how._asdict()}) + "\n")
    saved = json.loads(path.read_text())
    rates = {name: np.array(values)[:, None] for name, values in saved["rates"].items()}
    pairs = [(above, below, difference(rates[above], rates[below])) for above, below in pairwise(rates)]
    cells = {
        "claim": "Where preferences go round in a circle, SPPO comes near the equilibrium, DPO on Bradley-Terry does not",
        "source": "SPPO, section 1 and Theorem 4.1",
        "measure": "win rate of the mean policy against the answer that beats it most (1/2: equilibrium)",
        "expected": " > ".join(rates),
        "what came": "; ".join(f"{a} - {b} {interval.text()}" for a, b, interval in pairs),
        "means": ", ".join(f"{name} {values.mean():.3f}" for name, values in rates.items()),
        "verdict": verdict([interval for _, _, interval in pairs]),
    }
    how = Made(**saved["made"])
    intro = (
        "A table policy over three answers of which each beats the next nine times out of ten, trained by the two losses "
        "with exact expectations, 100 iterations from 5 random starts (`benchmarks/_cycle.py`). "
        f"Commit {how.commit}, {how.date}, {how.machine}."
    )
    return Shown("SPPO on a planted cycle", intro, 5, how, [cells], [])


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def gather(names: list[str], store: Store, size: str | None) -> dict[str, Shown]:
    """What is finished of these; the reports of the comparisons are written."""
    results = {}
    for name in names:
        comparison = load_comparison(FILES[name], size=size)
        try:
            finished = outcomes(comparison, store)
        except ConfigError as error:
            print(f"{name} is not on the page: {error}", flush=True)
            continue
        write_report(comparison, finished, store)
        results[name] = shown_comparison(name, comparison, finished, store)
    return results


def smoke(directory: Path) -> tuple[Path, Store]:
    """A comparison of two methods on four stories with a random model."""
    tiny = tiny_model(directory / "model")
    path = directory / "smoke.yaml"
    settings = {
        "policy": {"path": tiny}, "method": {"name": "dpo"}, "iterations": 1, "prompts": {"limit": 4, "reuse": True}, "models": {"teacher": None},
        "sampling": {"num_candidates": 2, "max_new_tokens": 8, "max_prompt_tokens": 160}, "training": {"learning_rate": 1e-3},
        "scoring": {"pairing": "given", "scorer": None},
    }  # fmt: skip
    claims = [
        {"source": "-", "statement": measure, "measure": measure, "order": ["dpo", "ipo"]} for measure in MEASURES
    ]
    body = {
        "name": "smoke", "base": str(CLAIMS / "base.yaml"), "set": settings, "seeds": [0, 1], "vary": ["method"],
        "variants": {"dpo": {}, "ipo": {"method": {"name": "ipo"}}}, "claims": claims,
    }  # fmt: skip
    path.write_text(json.dumps(body))
    return path, Store(directory / "store")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims")
    parser.add_argument("--only", nargs="+", default=list(FILES), choices=[*FILES, "cycle"], metavar="NAME")
    parser.add_argument("--size", help="one of the comparisons' sizes, e.g. gpu; default: what fits a CPU")
    parser.add_argument("--store", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence.md")
    parser.add_argument("--page-only", action="store_true", help="play nothing; write the page of what is finished")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    tasks.data.lengths.run_check = check_here
    # DeepSpeed keeps the first process group for ever; the trainings of this process share it.
    stages.training.engine.Engine.close = lambda self: None
    if not (options.smoke or options.page_only or POLICY.exists()):
        parser.error(
            f"{POLICY} is missing: it is the 260 K model of llama2.c (karpathy/tinyllamas on the hub) as a Hugging Face "
            "directory. Name yours: make claims STORIES=DIR"
        )
    with tempfile.TemporaryDirectory() as directory:
        store = Store(options.store)
        if options.smoke:
            FILES["smoke"], store = smoke(Path(directory))
            options.only, options.out = ["smoke"], None
        for name in options.only if not options.page_only else ():
            if name == "cycle":
                continue
            if options.size is not None:
                compare(FILES[name], store, options.size)
                continue
            comparison = load_comparison(FILES[name])
            play(comparison, store)
        results = gather(["smoke"] if options.smoke else list(FILES), store, options.size)
        if not options.smoke and options.size is None:
            results["cycle"] = shown_cycle(store)
        text = page(results)
        print(text)
        if options.out:
            options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's end prints warnings
