"""Flows - the promotion gate of a run: which policy goes on. It decides and records after every iteration; it acts only if enabled."""

from __future__ import annotations

import json
from typing import Any

from data_contracts.artifact import ArtifactRef
from data_contracts.store import write_atomic
from flows.report.history import History
from stages.evaluation.promotion import PROMOTE, ROLL_BACK, STOP, GateConfig, decide


class Gate:
    """Follows a run: the best policy so far starts as the start model; each candidate is compared with it."""

    def __init__(self, config: GateConfig, history: History, start: ArtifactRef):
        self.config, self.history = config, history
        self.best, self.best_iteration = start, 0
        self.without_promotion = 0

    def next(self, candidate: ArtifactRef) -> tuple[ArtifactRef, bool]:
        """Decide about the policy that was measured last. Returns the policy to go on from, and whether to stop.

        Off, this is the candidate, and never a stop.
        """
        before, after = self.history.measured_at(self.best_iteration), self.history.measured_at(-1)
        decision = decide(self.config, before, after, self.without_promotion)
        iteration = len(self.history.rows) - 1
        against = self.best_iteration
        if decision.outcome == PROMOTE:
            self.best, self.best_iteration, self.without_promotion = candidate, iteration, 0
        else:
            self.without_promotion += 1
        self._record(
            {
                "iteration": iteration,
                "against": against,
                "enabled": self.config.enabled,
                **decision._asdict(),
                "gain": decision.gain and decision.gain._asdict(),
                "plain": decision.plain and decision.plain._asdict(),
                "best": {"iteration": self.best_iteration, "kind": self.best.kind, "key": self.best.key},
            }
        )
        if not self.config.enabled:
            return candidate, False
        return (self.best if decision.outcome in (ROLL_BACK, STOP) else candidate), decision.outcome == STOP

    def final(self, last: ArtifactRef) -> ArtifactRef:
        """What the run hands out: the best policy if the gate is on, else the last one."""
        return self.best if self.config.enabled else last

    def _record(self, decision: dict[str, Any]) -> None:
        """`runs/<name>/gate.json`, the report and the tracker."""
        self.history.decided(decision)
        path = self.history.directory / "gate.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(self.history.decisions, indent=1) + "\n")
