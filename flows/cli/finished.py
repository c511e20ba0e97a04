"""Flows - a run that was played, read from its artifacts: its history, and the policy of each iteration.

Nothing is built, and nothing is written but the history's own small files (gate.json), into `directory` if one is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_contracts.artifact import RECORD, ArtifactRef, parse_record
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import RunConfig
from flows.forecast.rehearsal import UNKNOWN, Rehearsal, rehearse
from flows.preflight import Checked, gather
from flows.report.channels import Nowhere
from flows.report.history import History


class PlayedRun(NamedTuple):
    """A run with at least one complete iteration."""

    config: RunConfig
    checked: Checked
    rehearsal: Rehearsal
    history: History

    def policy(self, iteration: int | None) -> tuple[int, ArtifactRef]:
        """Return a policy of the run, and its iteration. None: the policy that the run hands out.

        Raises: ConfigError for an iteration that is not measured yet, and for a run that is not complete.
        """
        policies = self.rehearsal.policies()
        measured = ", ".join(map(str, policies))
        if iteration is None:
            final = self.rehearsal.final
            iterations = [number for number, policy in policies.items() if policy == final]
            if final.content == UNKNOWN or not iterations:
                raise ConfigError(
                    f"the run {self.config.name} is not complete, so it has no final policy yet: finish it with "
                    f"`selfplay resume {self.config.name}`, or name an iteration with --iteration (measured: {measured})"
                )
            return iterations[-1], final
        if iteration not in policies:
            raise ConfigError(
                f"the run {self.config.name} has no measured iteration {iteration}: --iteration takes {measured}"
            )
        return iteration, policies[iteration]


def read_run(config: RunConfig, store: Store, directory: Path | None = None) -> PlayedRun:
    """Return what is built of a run. directory: where the history writes, in place of the run's own.

    Raises: ConfigError if no iteration is complete.
    """
    history = History(config, store, Nowhere(), Nowhere())
    if directory is not None:
        history.directory = directory
    checked = gather(config, store)
    history.data = checked.data.lines() if checked.data else ()
    rehearsal = rehearse(config, store, checked, history)
    if not history.rows:
        raise ConfigError(
            f"run {config.name}: no iteration is complete in {store.root}, not even the start model's; "
            "see `selfplay status`"
        )
    return PlayedRun(config, checked, rehearsal, history)


def measured_policies(store: Store, run: str) -> dict[int, ArtifactRef]:
    """Return iteration -> policy, of what a run shows as measured (`runs/<run>/iter_NN/evaluate`); 0 is the start model.

    Needs neither the run's prompts nor today's keys, so a run of an earlier version of the program is found too.
    """
    policies: dict[int, ArtifactRef] = {}
    for path in sorted(store.run_directory(run).glob(f"iter_*/evaluate/{RECORD}")):
        record = parse_record(path.read_bytes(), str(path))
        policies[int(path.parent.parent.name.removeprefix("iter_"))] = store.here(record.inputs["policy"])
    return policies
