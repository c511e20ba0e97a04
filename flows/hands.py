"""Flows - what `play` needs from outside: hands to act with (build, find, read) and a listener to report to.

A run has hands that build (flows/run.py), a rehearsal has hands that only look (flows/forecast/rehearsal.py), an
estimate has hands that build a few prompts' worth and measure (flows/forecast/estimate.py). The algorithm is the same
for all three, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from data_contracts.artifact import ArtifactRef
from data_contracts.config import Config
from data_contracts.rows import HeldoutRow, ReportRow
from data_contracts.shards import read_shards
from flows.gate import Verdict
from stages.evaluation.intervals import Interval
from stages.evaluation.promotion import Measurement
from tasks.build import Built
from tasks.data.prompt_set import PromptSet
from tasks.place import Place


class Hands(Protocol):
    """Side effects of `play`: everything by which it builds, finds and reads artifacts."""

    def run(self, stage: str, config: Config, place: Place, **inputs: ArtifactRef) -> Built:
        """Build the stage's artifact from these inputs, or find it."""
        ...

    def publish(self, prompts: PromptSet, place: Place) -> ArtifactRef:
        """Make an artifact of these prompts, or find it."""
        ...

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        """Make one generations artifact of several policies' answers, or find it."""
        ...

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        """Return the generated text of each prompt id; {} if the answers are not built yet."""
        ...

    def read_report(self, report: ArtifactRef) -> Measurement | None:
        """Return what an evaluation measured; None if it is not built yet."""
        ...


class Listener(Protocol):
    """What a run reports to, in the order in which things happen."""

    def built(self, place: Place, **stages: Built) -> None:
        """Called when the training half of an iteration is complete, with its artifacts by stage."""
        ...

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        """Called when an iteration's policy was measured."""
        ...

    def selected(
        self,
        place: Place,
        checkpoints: Sequence[ArtifactRef],
        measurements: Sequence[Measurement],
        gains: Sequence[Interval | None],
        chosen: int,
    ) -> None:
        """Called when the best checkpoint of a training was chosen: `checkpoints[chosen]`."""
        ...

    def decided(self, place: Place, verdict: Verdict) -> None:
        """Called when the gate judged the iteration's policy."""
        ...

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        """Called when the tournament was played. `scored` is None if its judge was unreachable."""
        ...


def read_answers(answers: ArtifactRef) -> dict[str, str]:
    """Return the generated text of each prompt id."""
    return {row["prompt_id"]: row["completion"] for row in read_shards(answers.path, "generations").to_pylist()}


def read_report(report: ArtifactRef) -> Measurement:
    """Return the scores and token counts by prompt and the benchmark rows of a finished eval_report."""
    heldout = cast("list[HeldoutRow]", read_shards(report.path, "heldout", "heldout").to_pylist())
    return Measurement.from_rows(heldout, cast("list[ReportRow]", read_shards(report.path, "eval_report").to_pylist()))
