"""Flows - a run on paper: which artifacts it needs, in order, and which of them the store has. Nothing is built.

It is `SelfPlay` itself with hands that only look, gate and early stop included, so it cannot disagree with the run.
What lies behind an artifact that is not built has no key yet (keys hash the content of inputs): such a step is known
by its settings alone, and a policy that is not measured yet is taken to go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import digests_kept_in
from data_contracts.config import Config
from data_contracts.store import Store
from flows import hands
from flows.config import RunConfig
from flows.gate import Verdict
from flows.hands import Listener
from flows.preflight import Checked, gather, models_of
from flows.self_play import SelfPlay
from flows.tournament import merge_key
from stages.evaluation.intervals import Interval
from stages.evaluation.promotion import Measurement
from stages.stage import STAGES
from tasks.build import Built
from tasks.data.prompt_set import PromptSet
from tasks.place import Place, Purpose
from tasks.prompts import prompts_key

UNKNOWN = "not built yet"


class Step(NamedTuple):
    """One artifact that a run needs."""

    stage: str
    config: Config
    place: Place
    inputs: dict[str, ArtifactRef]
    key: str | None
    """None: not known before its inputs are built."""
    record: ArtifactRecord | None
    """None: not built."""

    @property
    def name(self) -> str:
        """As the run's view, ledger and tables show it."""
        return self.place.name_of(self.stage)

    @property
    def iteration(self) -> int:
        return self.place.iteration


class Rehearsal(NamedTuple):
    config: RunConfig
    steps: list[Step]
    num_prompts: dict[str, int]
    """Prompts that a prompts artifact holds, by its key, where they are known already."""
    start: ArtifactRef
    models: dict[str, ArtifactRef]
    final: ArtifactRef
    """The policy that the run hands out; its content is UNKNOWN while that is not built."""

    def policies(self) -> dict[int, ArtifactRef]:
        """Iteration -> its policy, of the iterations that are measured; 0 is the start model."""
        return {
            step.iteration: step.inputs["policy"]
            for step in self.steps
            if step.stage == "evaluate" and step.place.purpose == Purpose.HELDOUT and step.record is not None
        }


def rehearse(
    config: RunConfig, store: Store, checked: Checked | None = None, listener: Listener | None = None
) -> Rehearsal:
    """The steps of a run. `listener`: told of every iteration whose artifacts exist, until the first that does not.

    Raises: ConfigError for a wrong request, as the run would.
    """
    start, models = models_of(config, store)
    looking = LookingHands(store)
    until_unbuilt = UntilUnbuilt(listener)
    place = Place(str(store.root), config.name, execution=config.execution)
    loop = SelfPlay(config, checked or gather(config, store), start, models, looking, until_unbuilt)
    final = loop.play(place)
    return Rehearsal(config, looking.steps, looking.num_prompts, start, models, final)


class LookingHands:
    """Hands that find artifacts, or write down that there is nothing."""

    def __init__(self, store: Store):
        self.store = store
        self.steps: list[Step] = []
        self.num_prompts: dict[str, int] = {}

    def run(self, stage: str, config: Config, place: Place, **inputs: ArtifactRef) -> Built:
        kind = STAGES[stage].produces
        STAGES[stage].check_inputs(inputs)
        is_known = all(ref.content != UNKNOWN for ref in inputs.values())
        with digests_kept_in(self.store):
            key = STAGES[stage].key(config, inputs) if is_known else None
        ref = self.store.find(kind, key) if key else None
        record = self.store.load(kind, key) if ref and key else None
        self.steps.append(Step(stage, config, place, inputs, key, record))
        return Built(ref or self._unbuilt(kind, key), record, record is not None)

    def publish(self, prompts: PromptSet, place: Place) -> ArtifactRef:
        key = prompts_key(prompts) if prompts else UNKNOWN
        self.num_prompts[key] = len(prompts)
        return self.store.find("prompts", key) or self._unbuilt("prompts", key)

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        is_known = all(ref.content != UNKNOWN for ref in players.values())
        key = merge_key(players) if is_known else UNKNOWN
        return self.store.find("generations", key) or self._unbuilt("generations", key)

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        if answers.content != UNKNOWN:
            return hands.read_answers(answers)
        return {}

    def read_report(self, report: ArtifactRef) -> Measurement | None:
        if report.content != UNKNOWN:
            return hands.read_report(report)
        return None

    @staticmethod
    def _unbuilt(kind: str, key: str | None) -> ArtifactRef:
        return ArtifactRef(kind=kind, key=key or UNKNOWN, path="", content=UNKNOWN)


class UntilUnbuilt:
    """Passes events on to a listener until the first one whose artifacts do not all exist."""

    def __init__(self, listener: Listener | None):
        self.listener = listener

    def built(self, place: Place, **stages: Built) -> None:
        if listener := self._while_built(*stages.values()):
            listener.built(place, **stages)

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        if listener := self._while_built(answers, report):
            listener.measured(place, answers, report)

    def selected(
        self,
        place: Place,
        checkpoints: Sequence[ArtifactRef],
        measurements: Sequence[Measurement],
        gains: Sequence[Interval | None],
        chosen: int,
    ) -> None:
        if self.listener is not None:
            self.listener.selected(place, checkpoints, measurements, gains, chosen)

    def decided(self, place: Place, verdict: Verdict) -> None:
        if self.listener is not None:
            self.listener.decided(place, verdict)

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        if scored is not None and (listener := self._while_built(scored)):
            listener.compared(scorer, names, scored, prompts)

    def _while_built(self, *artifacts: Built) -> Listener | None:
        if any(artifact.signed is None for artifact in artifacts):
            self.listener = None
        return self.listener
