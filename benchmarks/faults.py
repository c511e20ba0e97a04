"""Benchmark - faults: strike builds with faults and print what came of each.

    python -m benchmarks.faults [--count 280] [--seed 1] [--jobs 2] [--only WORD] [--whole]
    python -m benchmarks.faults --smoke

The harness is tests/faults/harness.py; docs/reliability.md shows the table (kind x stage x outcome). Exit code 1 if a
fault was not survived. `--smoke` kills the score stage once.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._smoke import add_smoke
from data_contracts.artifact import ArtifactRef
from data_contracts.store import Store
from tests.conftest import build_model, prompt_rows
from tests.faults import harness, whole
from tests.faults.harness import Fault, Scene, Verdict, plan, prepare, strike


def publish(store: Store) -> ArtifactRef:
    """Six prompts, as an artifact of the store."""
    from tasks.data.prompt_set import PromptSet
    from tasks.prompts import publish

    return publish(PromptSet.of(prompt_rows(6)), store)


def table(verdicts: list[Verdict], scenes: Iterable[str]) -> str:
    """Markdown: a line per kind of fault, a column per stage; cells count `resumed`, `unaffected` and `failed`."""
    stages = [name for name in scenes if any(verdict.fault.scene == name for verdict in verdicts)]
    cells: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        outcome = "failed" if verdict.problems else verdict.outcome
        cells[verdict.fault.kind, verdict.fault.scene][outcome] += 1
    struck = [verdict.fault.kind for verdict in verdicts]
    order = list(dict.fromkeys([*harness.INSIDE, *harness.ANYTIME, *harness.ELSEWHERE, *harness.AT_REST, *struck]))
    lines = ["| fault | " + " | ".join(stages) + " |", "|---|" + "---|" * len(stages)]
    for kind in order:
        row = [cells[kind, stage] for stage in stages]
        if any(row):
            lines.append(f"| {kind} | " + " | ".join(_cell(cell) for cell in row) + " |")
    return "\n".join(lines)


def _cell(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "-"


def show(title: str, verdict: Verdict) -> None:
    """Print a verdict, and what is wrong if something is."""
    print(f"{title}: {verdict.outcome}, {verdict.seconds:.0f} s", flush=True)
    if verdict.problems:
        print("     " + "\n     ".join([*verdict.problems, *verdict.how.splitlines()]), flush=True)


def strike_stages(scenes: dict[str, Scene], faults: list[Fault], jobs: int, root: Path) -> Iterator[Verdict]:
    """Verdicts in the order of the faults. The store of a fault that was survived is removed."""

    def strike_one(number: int) -> Verdict:
        work = root / f"fault-{number}"
        verdict = strike(scenes[faults[number].scene], faults[number], work)
        if not verdict.problems:
            shutil.rmtree(work, ignore_errors=True)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        for number, verdict in enumerate(pool.map(strike_one, range(len(faults))), 1):
            fault = verdict.fault
            show(f"{number:4d} {fault.scene}: {fault.kind} (seed {fault.seed})", verdict)
            yield verdict


def strike_whole_runs(only: str, seed: int, root: Path) -> Iterator[Verdict]:
    """Verdicts on whole runs with their servers."""
    model, directory = build_model(root / "whole-model"), root / "whole"
    scene = whole.prepare(directory, model, prompt_rows(6), prompt_rows(3, first=100))
    kinds = [kind for kind in (*whole.KINDS, *whole.DEPLOYED) if only in f"{kind} at {whole.WHOLE}"]
    for number, kind in enumerate(kinds):
        verdict = whole.strike(scene, Fault(whole.WHOLE, kind, seed + number), root / "whole-fault")
        show(f"whole run: {kind}", verdict)
        yield verdict


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--count", type=int, default=280)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="kinds and stages that contain this word")
    parser.add_argument("--whole", action="store_true", help="also whole runs with their servers, two minutes each")
    parser.add_argument("--one-rank", action="store_true", help="leave out training on two ranks, half a minute each")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, help="work here and keep the stores of what failed")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.count, options.only, options.one_rank = 1, "kill at score", True
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    root = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    stages = ("sample", "score") if options.smoke else tuple(harness.STEPS)
    try:
        began = time.monotonic()
        shutil.rmtree(root / "scenes", ignore_errors=True)
        scenes: dict[str, Scene] = {}
        if options.count:
            scenes = prepare(root / "scenes", build_model, publish, two_ranks=not options.one_rank, stages=stages)
        for scene in scenes.values():
            touched = f"{len(scene.changes)} changes of the disk, {scene.seconds:.1f} s undisturbed"
            print(f"{scene.name}: {touched}", flush=True)
        candidates = plan(scenes, options.count * (200 if options.only else 1), options.seed) if scenes else []
        faults = [fault for fault in candidates if options.only in f"{fault.kind} at {fault.scene}"][: options.count]
        verdicts = list(strike_stages(scenes, faults, options.jobs, root))
        if options.whole:
            verdicts += strike_whole_runs(options.only, options.seed, root)
        text = table(verdicts, [*scenes, whole.WHOLE])
        failed = [verdict for verdict in verdicts if verdict.problems]
        struck = [verdict for verdict in verdicts if verdict.outcome != "not reached"]
        print(
            f"\n{text}\n\n{len(struck)} faults struck, {len(verdicts) - len(struck)} came too late, "
            f"{len(failed)} not survived; {time.monotonic() - began:.0f} s"
        )
        if options.out:
            options.out.write_text(text + "\n")
        return 1 if failed else 0
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
