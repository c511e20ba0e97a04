"""Flows - a run on paper: which artifacts it needs, in order, and which of them the store has. Nothing is built, no stage is started.

It is `play` itself with hands that only look, so it cannot disagree with the run. What lies behind an artifact that is not built has no key
yet (keys hash the content of inputs): such a step is known by its settings alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import Config
from data_contracts.identity import canonical_json, digest_text, fingerprint
from data_contracts.store import Store
from flows.config import RunConfig
from flows.preflight import Checked, gather
from flows.self_play import Hands, models_of, play, read_answers, read_report
from flows.tournament import merge_key
from stages.evaluation.promotion import Measurement
from stages.stage import STAGES
from tasks.build import Built
from tasks.prompts import VERSION
from tasks.stages import Place

UNKNOWN = "not built yet"


class Step(NamedTuple):
    stage: str
    config: Config
    step: str
    shown_as: str
    inputs: dict[str, ArtifactRef]
    key: str | None
    """None: not known before its inputs are built."""
    record: ArtifactRecord | None
    """If it is there."""

    @property
    def iteration(self) -> int:
        return int(self.step.removeprefix("iter_"))


class Rehearsal(NamedTuple):
    config: RunConfig
    steps: list[Step]
    num_prompts: dict[str, int]
    """Prompts that a prompts artifact holds, by its key, where they are known already."""
    start: ArtifactRef
    models: dict[str, ArtifactRef]


def rehearse(config: RunConfig, store: Store, checked: Checked | None = None, history: Any = None) -> Rehearsal:
    """`history`: what shall hear of the artifacts that are there (report.History); None: nobody.

    Raises: ConfigError for a wrong request, as the run would.
    """
    start, models = models_of(config, store)
    looker = _Looker(store)
    teller = _Teller(history)
    hands = Hands(looker.run, looker.publish, looker.read_answers, looker.read_report, looker.merge)
    play(
        config,
        checked or gather(config),
        Place(str(store.root), config.name, "iter_00"),
        start,
        models,
        teller,
        hands=hands,
    )
    return Rehearsal(config, looker.steps, looker.num_prompts, start, models)


class _Looker:
    """The hands: they find, or say that there is nothing."""

    def __init__(self, store: Store):
        self.store = store
        self.steps: list[Step] = []
        self.num_prompts: dict[str, int] = {}

    def run(
        self, stage: str, config: Config, place: Place, shown_as: str | None = None, **inputs: ArtifactRef
    ) -> Built:
        kind = STAGES[stage].produces
        STAGES[stage].check_inputs(inputs)
        known = all(ref.content != UNKNOWN for ref in inputs.values())
        key = STAGES[stage].key(config, inputs) if known else None
        found = self.store.find(kind, key) if key else None
        record = self.store.load(kind, key) if found and key else None
        self.steps.append(Step(stage, config, place.step, shown_as or stage, inputs, key, record))
        return Built(
            found or ArtifactRef(kind=kind, key=key or UNKNOWN, path="", content=UNKNOWN), record, record is not None
        )

    def publish(self, rows: list[dict[str, Any]], place: Place, shown_as: str = "prompts") -> ArtifactRef:
        key = fingerprint("prompts", VERSION, {"rows": digest_text(canonical_json(rows))}, {}) if rows else UNKNOWN
        self.num_prompts[key] = len(rows)
        return self.store.find("prompts", key) or ArtifactRef(kind="prompts", key=key, path="", content=UNKNOWN)

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        return read_answers(answers) if answers.content != UNKNOWN else {}

    def read_report(self, report: ArtifactRef) -> Measurement:
        return read_report(report) if report.content != UNKNOWN else Measurement({}, {})

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        key = merge_key(players) if all(ref.content != UNKNOWN for ref in players.values()) else UNKNOWN
        return self.store.find("generations", key) or ArtifactRef(kind="generations", key=key, path="", content=UNKNOWN)


class _Teller:
    """Hands on what is complete, until the first thing that is not."""

    def __init__(self, history: Any):
        self.history = history

    def built(self, place: Place, **stages: Built) -> None:
        if self.history is not None and all(one.record for one in stages.values()):
            self.history.built(place, **stages)
        else:
            self.history = None

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        if self.history is not None and report.record and answers.record:
            self.history.measured(place, answers, report)
        else:
            self.history = None

    def selected(
        self, place: Place, checkpoints: Sequence[ArtifactRef], found: Sequence[Measurement], *more: Any
    ) -> None:
        if self.history is not None and all(one.tokens for one in found):
            self.history.selected(place, checkpoints, found, *more)
        else:
            self.history = None

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        if self.history is not None and scored is not None and scored.record:
            self.history.compared(scorer, names, scored, prompts)
