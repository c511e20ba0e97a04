"""The algorithm alone: what each step reads, which policy goes on, and that a rehearsal takes the path that the run took.

Strategy: hands that make references out of what they are asked for, and measure each policy as the test says. No stage runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import Config
from data_contracts.prompts import prompt_row
from flows.config import load_run
from flows.forecast.rehearsal import UntilUnbuilt
from flows.preflight import Checked
from flows.self_play import SelfPlay
from stages.evaluation.promotion import Measurement
from stages.stage import STAGES
from tasks.build import Built
from tasks.data.prompt_set import PromptSet
from tasks.place import Place

PROMPTS = PromptSet.of(
    [prompt_row([{"role": "user", "content": f"Question {i}"}], prompt_id=f"p{i}") for i in range(40)]
)


class Hands:
    """Remembers what was asked for; the policy of iteration i scores `scores[i]`, the start model `scores[0]`."""

    def __init__(self, scores: list[float], last_built: int = 99):
        self.scores, self.last_built = scores, last_built
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.measured: dict[str, float] = {}

    def run(self, stage: str, config: Config, place: Place, **inputs: ArtifactRef) -> Built:
        name = f"{place.name_of(stage)}{place.iteration}"
        STAGES[stage].check_inputs(inputs)
        self.calls.append((name, {role: ref.key for role, ref in inputs.items()}))
        ref = ArtifactRef(kind=STAGES[stage].produces, key=name, path="", content=name)
        if stage == "evaluate":
            self.measured[name] = self.scores[place.iteration]
        if place.iteration > self.last_built:
            return Built(ref, None, False)
        record = ArtifactRecord(
            kind=ref.kind, key=name, stage=stage, version="1", config={}, inputs=inputs, content=name, files=[], rows=1
        )
        return Built(ref, record, True)

    def publish(self, prompts: PromptSet, place: Place) -> ArtifactRef:
        return ArtifactRef(kind="prompts", key=place.name_of("prompts"), path="", content="c")

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        self.calls.append(("merge", {name: ref.key for name, ref in players.items()}))
        return ArtifactRef(kind="generations", key="merged", path="", content="m")

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        return {row["prompt_id"]: "answer" for row in PROMPTS}

    def read_report(self, report: ArtifactRef) -> Measurement | None:
        if int(report.key.removeprefix("evaluate")) > self.last_built:
            return None
        names, value = [row["prompt_id"] for row in PROMPTS], self.measured[report.key]
        return Measurement({name: value + 0.001 * i for i, name in enumerate(names)}, dict.fromkeys(names, 5.0))

    def of(self, name: str) -> dict[str, str]:
        return next(inputs for called, inputs in self.calls if called == name)


class Events:
    """Remembers what it is told."""

    def __init__(self):
        self.told: list[str] = []

    def built(self, place, **stages):
        self.told.append(f"built {place.iteration} {' '.join(stages)}")

    def measured(self, place, answers, report):
        self.told.append(f"measured {place.iteration}")

    def selected(self, place, checkpoints, measurements, gains, chosen):
        self.told.append("selected")

    def decided(self, place, verdict):
        self.told.append(f"{verdict.decision.outcome} {verdict.iteration}")

    def compared(self, scorer, names, scored, prompts):
        self.told.append(f"compared {' '.join(names)}")


@pytest.fixture
def play(make_run):
    """play(scores, last_built=99, **settings) -> (final policy's key, hands, what the listener was told)"""

    def go(scores, last_built=99, models=None, **settings):
        config = load_run(make_run("loop", iterations=len(scores) - 1, **settings))
        start = ArtifactRef(kind="checkpoint", key="external", path="", content="start")
        hands, events = Hands(scores, last_built), Events()
        checked = Checked(PROMPTS, PROMPTS, config.evaluation)
        final = SelfPlay(config, checked, start, models or {}, hands, UntilUnbuilt(events)).play(Place("store", "loop"))
        return final.key, hands, events.told

    return go


def test_the_checkpoint_is_the_next_policy_and_its_own_reference(play):
    final, hands, events = play([0.5, 0.6, 0.7], prompts={"per_iteration": 8})
    assert final == "train2"
    names = [name for name, _ in hands.calls]
    assert names == [
        "heldout_generations0", "evaluate0",
        "sample1", "score1", "weigh1", "train1", "heldout_generations1", "evaluate1",
        "sample2", "score2", "weigh2", "train2", "heldout_generations2", "evaluate2",
    ]  # fmt: skip
    assert hands.of("sample2") == {"prompts": "prompts", "policy": "train1"}
    assert hands.of("weigh2")["reference"] == "train1" and hands.of("score2")["start"] == "external"
    assert events == [
        "measured 0", "built 1 sample score weigh train", "measured 1", "promote 1",
        "built 2 sample score weigh train", "measured 2", "promote 2",
    ]  # fmt: skip


def test_a_method_against_the_start_model_keeps_it_as_reference(play):
    _, hands, _ = play([0.5, 0.6, 0.7], method={"name": "tdpo"}, prompts={"per_iteration": 8})
    assert hands.of("weigh2")["reference"] == ("external" if load_reference("tdpo") == "start" else "train1")


def test_what_a_warm_start_trains_is_the_start_model_of_all_that_follows(play):
    settings = {"warm_start": {"method": "sft"}, "prompts": {"per_iteration": 8}}
    _, hands, events = play([0.5, 0.6, 0.7], **settings)
    assert [name for name, _ in hands.calls][:5] == [
        "warm_start_responses0", "warm_start_rows0", "warm_start0", "heldout_generations0", "evaluate0"
    ]  # fmt: skip
    assert hands.of("warm_start_responses0") == {
        "prompts": "warm_start_prompts", "policy": "external", "start": "external"
    }  # fmt: skip
    assert hands.of("warm_start0") == {"pairs": "warm_start_rows0", "policy": "external"}
    assert [hands.of(f"{stage}")["policy"] for stage in ("evaluate0", "sample1", "train1")] == ["warm_start0"] * 3
    assert {hands.of(f"{stage}")["start"] for stage in ("score1", "score2", "evaluate0", "evaluate2")} == {
        "warm_start0"
    }
    assert hands.of("weigh1")["reference"] == "warm_start0" and hands.of("weigh2")["reference"] == "train1"
    assert events[:2] == ["built 0 score weigh train", "measured 0"]
    _, hands, _ = play([0.5, 0.6, 0.7], reference="start", **settings)
    assert hands.of("weigh2")["reference"] == "warm_start0"
    final = play([0.5, 0.2, 0.2], gate={"enabled": True, "length_controlled": False, "patience": 1}, **settings)[0]
    assert final == "warm_start0", "the best policy under a gate"
    _, hands, events = play([0.5, 0.6, 0.7], last_built=-1, **settings)
    assert events == [] and hands.of("train2")["policy"] == "train1"


def test_the_reference_is_a_setting_of_the_run(play):
    def references_of(**settings) -> list[str]:
        hands = play([0.5, 0.6, 0.7, 0.8, 0.9], prompts={"per_iteration": 8}, **settings)[1]
        return [hands.of(f"weigh{iteration}")["reference"] for iteration in (1, 2, 3, 4)]

    assert references_of() == references_of(reference="iterate") == references_of(reference={"every": 1})
    assert references_of(reference="iterate") == ["external", "train1", "train2", "train3"]
    assert references_of(reference="start") == ["external"] * 4 == references_of(method={"name": "inpo"})
    comal = {"method": {"name": "inpo"}, "reference": {"every": 2}}
    assert references_of(**comal) == ["external", "external", "train2", "train2"]
    assert references_of(method={"name": "grpo"}, scoring={"pairing": "each"}, reference="iterate")[1] == "train1"


def test_a_fixed_model_is_the_reference_of_every_iteration_where_training_holds_it_too(play):
    fixed = ArtifactRef(kind="checkpoint", key="fixed", path="", content="fixed")
    settings = {"method": {"name": "tdpo"}, "reference": {"path": "somewhere"}, "prompts": {"per_iteration": 8}}
    _, hands, _ = play([0.5, 0.6, 0.7], models={"reference": fixed}, **settings)
    assert [hands.of(f"{stage}{i}")["reference"] for stage in ("weigh", "train") for i in (1, 2)] == ["fixed"] * 4
    assert hands.of("weigh2")["policy"] == "train1"


def test_the_last_policies_are_inputs_of_the_weights_as_far_as_there_are_any(play):
    def earlier(hands, iteration: int) -> list[str]:
        return [hands.of(f"weigh{iteration}").get(f"earlier_policy_{number}", "") for number in (1, 2, 3)]

    settings = {"method": {"name": "mnpo"}, "prompts": {"per_iteration": 8}}
    _, hands, _ = play([0.5, 0.6, 0.7, 0.8, 0.9], history=3, **settings)
    assert [earlier(hands, iteration) for iteration in (1, 2, 3, 4)] == [
        ["", "", ""], ["external", "", ""], ["train1", "external", ""], ["train2", "train1", ""]
    ]  # fmt: skip
    assert hands.of("weigh4")["policy"] == "train3" and hands.of("weigh4")["reference"] == "external"
    assert earlier(play([0.5, 0.6, 0.7, 0.8], **settings)[1], 3) == ["train1", "", ""], "two policies by default"
    gate = {"enabled": True, "length_controlled": False, "patience": 3}
    _, hands, _ = play([0.5, 0.6, 0.2, 0.7], gate=gate, **settings)
    assert hands.of("weigh3")["policy"] == "train1" and earlier(hands, 3)[0] == "external"


def load_reference(method: str) -> str:
    from stages.methods import METHODS

    return METHODS.get(method).REFERENCE


def test_after_a_roll_back_the_next_iteration_starts_from_the_best_policy(play):
    gate = {"enabled": True, "length_controlled": False, "patience": 3}
    final, hands, events = play([0.5, 0.6, 0.2, 0.7], gate=gate, prompts={"per_iteration": 8})
    assert [event for event in events if event.split()[0] in ("promote", "roll")] == [
        "promote 1", "roll back 2", "promote 3"
    ]  # fmt: skip
    assert hands.of("sample3")["policy"] == "train1" and hands.of("train3")["policy"] == "train1"
    assert final == "train3"


def test_the_gate_stops_the_run_and_hands_out_the_best_policy(play):
    gate = {"enabled": True, "length_controlled": False, "patience": 1}
    final, hands, events = play([0.5, 0.6, 0.2, 0.9], gate=gate, prompts={"per_iteration": 8})
    assert final == "train1" and events[-1] == "stop 2" and not any("3" in name for name, _ in hands.calls)


def test_on_paper_the_path_is_the_runs_as_far_as_it_is_built_and_straight_on_from_there(play):
    gate = {"enabled": True, "length_controlled": False, "patience": 3}
    scores = [0.5, 0.6, 0.2, 0.7, 0.8]
    whole = play(scores, gate=gate, prompts={"per_iteration": 8})[1]
    final, half, events = play(scores, last_built=2, gate=gate, prompts={"per_iteration": 8})
    assert half.calls == whole.calls and half.of("sample3")["policy"] == "train1"
    assert events[-1] == "roll back 2" and final == "train4"
    assert half.of("sample4")["policy"] == "train3", "what is not measured yet goes on"


def test_the_previous_iterations_pairs_are_weighed_again_under_the_new_reference(play):
    _, hands, _ = play([0.5, 0.6, 0.7], mix_previous=True, prompts={"per_iteration": 8})
    assert hands.of("weigh_previous2") == hands.of("weigh2") | {"pairs": "score1"}
    assert hands.of("train2")["more_pairs"] == "weigh_previous2" and "more_pairs" not in hands.of("train1")


def test_the_tournament_holds_every_iteration(play):
    _, hands, events = play([0.5, 0.6, 0.7], tournament={"scorer": {"name": "length"}}, prompts={"per_iteration": 8})
    assert hands.of("merge") == {str(i): f"heldout_generations{i}" for i in range(3)}
    assert events[-1] == "compared 0 1 2"


def test_settings_in_their_old_place_are_read_with_a_note(make_run):
    old = make_run("old", evaluation={"gate": {"patience": 7}, "tournament": {"scorer": {"name": "length"}}})
    with pytest.warns(FutureWarning, match="`evaluation.gate` is `gate` now"):
        config = load_run(old)
    assert config.gate.patience == 7 and config.tournament is not None
    with pytest.raises(Exception, match="`evaluation.gate` is the old place of `gate`, which is given too"):
        load_run(make_run("both", evaluation={"gate": {}}, gate={}))
