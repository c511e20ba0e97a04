"""Tasks - where in a run a piece of work belongs: its iteration, and what it is made for. Never part of a key."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from tasks.execution.config import ExecutionConfig

LOCAL = ExecutionConfig()


class Purpose(StrEnum):
    """What an artifact is made for in its iteration."""

    TRAINING = "training"
    """The iteration's own chain: prompts, generations, pairs, weights, checkpoint."""
    WARM_START = "warm_start"
    """Train the start model on given responses, before the first iteration."""
    HELDOUT = "heldout"
    """Measure the iteration's policy on the held-out prompts."""
    CHECKPOINT = "checkpoint"
    """Measure a checkpoint from the middle of a training; subject: its number."""
    PREVIOUS = "previous"
    """The previous iteration's pairs, weighed once more under the new reference."""
    TEACHER = "teacher"
    """Answers that the teacher writes for the prompts."""
    AUXILIARY = "auxiliary"
    """A model that the method's weights need; subject: its role."""
    BASELINE = "baseline"
    """Another model's answers for the tournament; subject: its name."""
    TOURNAMENT = "tournament"
    """Compare the policies of all iterations with each other and with the baselines."""


NAMES = {
    (Purpose.WARM_START, "prompts"): "warm_start_prompts",
    (Purpose.WARM_START, "score"): "warm_start_responses",
    (Purpose.WARM_START, "weigh"): "warm_start_rows",
    (Purpose.WARM_START, "train"): "warm_start",
    (Purpose.HELDOUT, "prompts"): "heldout_prompts",
    (Purpose.HELDOUT, "sample"): "heldout_generations",
    (Purpose.CHECKPOINT, "sample"): "checkpoint_{subject}_heldout_generations",
    (Purpose.CHECKPOINT, "evaluate"): "checkpoint_{subject}",
    (Purpose.PREVIOUS, "weigh"): "weigh_previous",
    (Purpose.TEACHER, "sample"): "teacher_answers",
    (Purpose.TEACHER, "prompts"): "prompts_with_answers",
    (Purpose.AUXILIARY, "weigh"): "{subject}_pairs",
    (Purpose.AUXILIARY, "train"): "{subject}",
    (Purpose.BASELINE, "sample"): "{subject}_heldout_generations",
    (Purpose.TOURNAMENT, "score"): "tournament",
}
"""(purpose, stage) -> the name that a run shows; a stage that is not listed is shown by its own name."""


class Place(NamedTuple):
    """Position of a task in a run, and where it executes. It names task runs, links and ledger lines."""

    store: str
    run: str
    iteration: int = 0
    """0: the start model is trained, where the run has a warm start, and measured; from 1 on: rounds of self-play."""
    session: str = ""
    """Ledger session of the process that plays the run."""
    execution: ExecutionConfig = LOCAL
    purpose: Purpose = Purpose.TRAINING
    subject: str = ""
    """Which checkpoint, role or baseline, where the purpose has several."""

    @property
    def step(self) -> str:
        """The iteration as paths, ledgers and the UI write it: iter_02."""
        return f"iter_{self.iteration:02d}"

    def serving(self, purpose: Purpose, subject: str | int = "") -> Place:
        """The same position, for another purpose."""
        return self._replace(purpose=purpose, subject=str(subject))

    def name_of(self, stage: str) -> str:
        """The name under which the run shows this stage's artifact, e.g. heldout_generations."""
        return NAMES.get((self.purpose, stage), stage).format(subject=self.subject)
