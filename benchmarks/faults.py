"""python -m benchmarks.faults [--count 240] [--seed 1] [--jobs 2] [--only WORD] [--whole]: strike builds with faults and print what came of it.

The harness is tests/faults/harness.py; the table (kind x stage x outcome) is what docs/reliability.md shows. Exit code 1 if one fault was not survived.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import build_model, prompt_rows
from tests.faults import harness, whole
from tests.faults.harness import Fault, Verdict, plan, prepare, strike


def publish(store):
    from tasks.prompts import publish

    return publish(prompt_rows(6), store)


def table(verdicts: list[Verdict], scenes: Iterable[str]) -> str:
    """Markdown: a line per kind of fault, a column per stage, `resumed/unaffected/failed` counted."""
    stages = [name for name in scenes if any(verdict.fault.scene == name for verdict in verdicts)]
    cells: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        cells[verdict.fault.kind, verdict.fault.scene][verdict.outcome if not verdict.problems else "failed"] += 1
    order = list(
        dict.fromkeys([*harness.INSIDE, *harness.ANYTIME, *harness.AT_REST, *(v.fault.kind for v in verdicts)])
    )
    lines = ["| fault | " + " | ".join(stages) + " |", "|---|" + "---|" * len(stages)]
    for kind in order:
        row = [cells[kind, stage] for stage in stages]
        if any(row):
            lines.append(f"| {kind} | " + " | ".join(_cell(cell) for cell in row) + " |")
    return "\n".join(lines)


def _cell(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "-"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="kinds and stages that contain this word")
    parser.add_argument("--whole", action="store_true", help="also whole runs with their servers, two minutes each")
    parser.add_argument("--one-rank", action="store_true", help="leave out training on two ranks, half a minute each")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, help="work here and keep the stores of what failed")
    options = parser.parse_args(arguments)
    root = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        began = time.monotonic()
        shutil.rmtree(root / "scenes", ignore_errors=True)
        scenes = prepare(root / "scenes", build_model, publish, two_ranks=not options.one_rank) if options.count else {}
        for scene in scenes.values():
            print(
                f"{scene.name}: {len(scene.changes)} changes of the disk, {scene.seconds:.1f} s undisturbed", flush=True
            )
        faults = [
            fault
            for fault in plan(scenes, options.count * (20 if options.only else 1), options.seed)
            if options.only in f"{fault.kind} at {fault.scene}"
        ]
        faults = faults[: options.count]
        verdicts = []
        with ThreadPoolExecutor(options.jobs) as pool:
            works = (root / f"fault-{number}" for number in range(len(faults)))
            for number, verdict in enumerate(
                pool.map(lambda one: _strike(scenes, *one), zip(faults, works, strict=True)), 1
            ):
                verdicts.append(verdict)
                fault = verdict.fault
                print(
                    f"{number:4d} {fault.scene}: {fault.kind} (seed {fault.seed}): {verdict.outcome}, {verdict.seconds:.0f} s",
                    flush=True,
                )
                if verdict.problems:
                    print("     " + "\n     ".join([*verdict.problems, *verdict.how.splitlines()]), flush=True)
        if options.whole:
            scene = whole.prepare(
                root / "whole", build_model(root / "whole-model"), prompt_rows(6), prompt_rows(3, first=100)
            )
            for number, kind in enumerate(
                kind for kind in (*whole.KINDS, *whole.DEPLOYED) if options.only in f"{kind} at {whole.WHOLE}"
            ):
                verdicts.append(
                    verdict := whole.strike(
                        scene, Fault(whole.WHOLE, kind, options.seed + number), root / "whole-fault"
                    )
                )
                print(f"whole run: {kind}: {verdict.outcome}, {verdict.seconds:.0f} s", flush=True)
                if verdict.problems:
                    print("     " + "\n     ".join([*verdict.problems, *verdict.how.splitlines()]), flush=True)
        print()
        print(text := table(verdicts, [*scenes, whole.WHOLE]))
        bad = [verdict for verdict in verdicts if verdict.problems]
        struck = [verdict for verdict in verdicts if verdict.outcome != "not reached"]
        print(
            f"\n{len(struck)} faults struck, {len(verdicts) - len(struck)} came too late, {len(bad)} not survived; {time.monotonic() - began:.0f} s"
        )
        if options.out:
            options.out.write_text(text + "\n")
        return 1 if bad else 0
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)


def _strike(scenes, fault, work):
    verdict = strike(scenes[fault.scene], fault, work)
    if not verdict.problems:
        shutil.rmtree(work, ignore_errors=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
