"""Flows - the promotion gate of a run: which policy goes on.

It judges every iteration's policy; it acts only if enabled.
"""

from __future__ import annotations

from typing import NamedTuple

from data_contracts.artifact import ArtifactRef
from stages.evaluation.promotion import PROMOTE, ROLL_BACK, STOP, Decision, GateConfig, Measurement, decide


class Verdict(NamedTuple):
    """What the gate says of one iteration's policy."""

    decision: Decision
    iteration: int
    against: int
    """Iteration of the best policy before, which this one was compared with."""
    enabled: bool
    """Whether the gate acts; else the verdict is only recorded."""
    best: ArtifactRef
    best_iteration: int
    goes_on: ArtifactRef
    """The policy that the next iteration starts from."""
    stops: bool


class Gate:
    """Follows a run: the start model is the best policy until a candidate is promoted."""

    def __init__(self, config: GateConfig, start: ArtifactRef):
        self.config = config
        self.best, self.best_iteration = start, 0
        self.best_measured: Measurement | None = None
        self.without_promotion = 0

    def begin(self, measured: Measurement | None) -> None:
        """Take the start model's measurement as the one to beat."""
        self.best_measured = measured

    def judge(self, candidate: ArtifactRef, measured: Measurement | None, iteration: int) -> Verdict | None:
        """Compare a candidate with the best policy. None where one of them is not measured yet: on paper it goes on."""
        if measured is None or self.best_measured is None:
            self.best, self.best_iteration, self.best_measured = candidate, iteration, measured
            return None
        against, before = self.best_iteration, self.best
        decision = decide(self.config, self.best_measured, measured, self.without_promotion)
        if decision.outcome == PROMOTE:
            self.best, self.best_iteration, self.best_measured = candidate, iteration, measured
            self.without_promotion = 0
        else:
            self.without_promotion += 1
        acts = self.config.enabled
        rolls_back = acts and decision.outcome in (ROLL_BACK, STOP)
        return Verdict(
            decision=decision,
            iteration=iteration,
            against=against,
            enabled=acts,
            best=self.best,
            best_iteration=self.best_iteration,
            goes_on=before if rolls_back else candidate,
            stops=acts and decision.outcome == STOP,
        )

    def final(self, last: ArtifactRef) -> ArtifactRef:
        """What the run hands out: the best policy if the gate acts, else the last one."""
        if self.config.enabled:
            return self.best
        return last
