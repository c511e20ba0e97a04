"""python -m flows.cli.doctor [--store DIR]: what is wrong with this machine, environment, store and Prefect server.

    zombie runs            a flow run that Prefect calls Running and whose process is gone
    leaked slots           a concurrency limit whose slots nobody holds
    locks                  who builds what; a builder that is on another machine, or stopped
    damage, litter         artifacts that are not what was signed; interrupted builds; temporary files of dead writers
    versions               packages that cannot live together (fastapi, prefect, vllm), or are not what is declared
    machine                compiler, memory, disk, /dev/shm, open files, the GPU and the build of torch

Each with its cure. Reads only. Exit codes: 0 nothing blocks a run, 1 something does, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence

from data_contracts.errors import PipelineError
from data_contracts.store import Store
from data_contracts.streams import open_standard_streams
from data_contracts.words import plural
from flows.cli.diagnosis import Finding
from flows.cli.diagnosis.environment import compiler, gpu, memory, open_files, versions
from flows.cli.diagnosis.server import server
from flows.cli.diagnosis.store import artifacts, disk, locks


def doctor(store: Store, api: str | None = None) -> list[Finding]:
    """Every finding, part by part. api: the Prefect server to ask; None: PREFECT_API_URL, and no server without it."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        compiler,
        memory,
        lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        gpu,
        lambda: disk(store),
        lambda: locks(store),
        lambda: artifacts(store),
        lambda: server(api or os.environ.get("PREFECT_API_URL")),
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except PipelineError as error:
            findings.append(Finding("bad", str(error), "set it as the message says"))
    return findings


def summary(findings: Sequence[Finding]) -> str:
    """The last line: 2 problems block runs, 3 notes."""
    if not findings:
        return "nothing is wrong"
    levels = [finding.level for finding in findings]
    problems, notes = levels.count("bad"), plural(levels.count("note"), "note")
    verb = "blocks" if problems == 1 else "block"
    if problems:
        return f"{plural(problems, 'problem')} {verb} runs, {notes}"
    return f"nothing blocks runs, {notes}"


def main(arguments: list[str]) -> int:
    """Print the findings, the worst first, each with its cure; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.cli.doctor", description="What is wrong here, and the command that mends it."
    )
    parser.add_argument("--store", metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store")
    parser.add_argument("--api", metavar="URL", help="Prefect server to ask; default: $PREFECT_API_URL")
    options = parser.parse_args(arguments)
    findings = doctor(Store(options.store), options.api)
    for finding in sorted(findings, key=lambda finding: ("bad", "note", "ok").index(finding.level)):
        print(f"{finding.level.upper():4}  {finding.message}")
        if finding.cure:
            print(f"      -> {finding.cure}")
    print(summary(findings))
    if any(finding.level == "bad" for finding in findings):
        return 1
    return 0


if __name__ == "__main__":
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))
