"""Which policy goes on: off, on, after a worse iteration, and at the end of the patience."""

from data_contracts.artifact import ArtifactRef
from flows.config import load_run
from flows.gate import Gate
from stages.evaluation.promotion import GateConfig, Measurement
from stages.stage import STAGES


def ref(iteration):
    return ArtifactRef(kind="checkpoint", key=f"c{iteration}", path="", content=f"{iteration}")


def walk(values, **gate):
    """What the gate lets go on after each iteration, the gate, and its verdicts; every prompt scores about `values[iteration]`."""
    names = [f"p{i}" for i in range(40)]
    measurements = [
        Measurement({name: v + 0.001 * (i % 7) for i, name in enumerate(names)}, dict.fromkeys(names, 5.0))
        for v in values
    ]
    gatekeeper = Gate(GateConfig(**gate), ref(0))
    gatekeeper.begin(measurements[0])
    answers, verdicts = [], []
    for iteration in range(1, len(values)):
        verdicts.append(gatekeeper.judge(ref(iteration), measurements[iteration], iteration))
        answers.append((verdicts[-1].goes_on.key, verdicts[-1].stops))
        if verdicts[-1].stops:
            break
    return answers, gatekeeper, verdicts


def test_off_it_records_and_changes_nothing():
    answers, gate, verdicts = walk([0.5, 0.6, 0.4, 0.3])
    assert answers == [("c1", False), ("c2", False), ("c3", False)]
    assert [verdict.decision.outcome for verdict in verdicts] == ["promote", "roll back", "stop"]
    assert gate.final(ref(3)) == ref(3)


def test_on_a_worse_policy_is_left_and_the_best_one_goes_on():
    answers, gate, verdicts = walk([0.5, 0.6, 0.4, 0.7], enabled=True)
    assert answers == [("c1", False), ("c1", False), ("c3", False)]
    assert [verdict.against for verdict in verdicts] == [0, 1, 1]
    assert gate.final(ref(3)) == ref(3)


def test_on_it_stops_at_the_end_of_its_patience_with_the_best_policy():
    answers, gate, verdicts = walk([0.5, 0.6, 0.6, 0.6, 0.9], enabled=True)
    assert answers == [("c1", False), ("c2", False), ("c1", True)]
    assert verdicts[-1].decision.outcome == "stop"
    assert gate.final(ref(3)).key == "c1"


def test_if_nothing_is_ever_better_the_start_model_is_what_is_handed_out():
    answers, gate, _ = walk([0.5, 0.3], enabled=True, patience=1)
    assert answers == [("c0", True)]
    assert gate.final(ref(1)).key == "c0"


def test_on_paper_a_policy_that_is_not_measured_goes_on():
    gatekeeper = Gate(GateConfig(enabled=True), ref(0))
    gatekeeper.begin(Measurement({}, {}))
    assert gatekeeper.judge(ref(1), None, 1) is None and gatekeeper.judge(ref(2), Measurement({}, {}), 2) is None
    assert gatekeeper.final(ref(2)) == ref(2)


def test_the_gate_enters_no_key(make_run):
    def run_with(**gate):
        return load_run(make_run("gated", gate=gate))

    off, on = run_with(), run_with(enabled=True, patience=5)
    assert on.gate.patience == 5 and off.gate != on.gate
    for stage in STAGES.values():
        assert getattr(off, stage.section).identity() == getattr(on, stage.section).identity()
