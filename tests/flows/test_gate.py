"""Which policy goes on: off, on, after a worse iteration, and at the end of the patience."""

import json
from types import SimpleNamespace

import pytest

from data_contracts.artifact import ArtifactRef
from flows.gate import Gate
from stages.evaluation.promotion import GateConfig, Measurement


def ref(iteration):
    return ArtifactRef(kind="checkpoint", key=f"c{iteration}", path="", content=f"{iteration}")


@pytest.fixture
def walk(tmp_path):
    """walk(values, **gate) -> what the gate answers after each iteration, and what it recorded."""

    def go(values, **gate):
        names = [f"p{i}" for i in range(40)]
        known = [
            Measurement({name: v + 0.001 * (i % 7) for i, name in enumerate(names)}, dict.fromkeys(names, 5.0))
            for v in values
        ]
        history = SimpleNamespace(
            rows=[{}],
            decisions=[],
            directory=tmp_path / "runs" / "x",
            measured_at=lambda i: known[len(history.rows) - 1 if i < 0 else i],
        )
        history.decided = history.decisions.append
        gatekeeper = Gate(GateConfig(**gate), history, ref(0))
        answers = []
        for iteration in range(1, len(values)):
            history.rows.append({})
            policy, stop = gatekeeper.next(ref(iteration))
            answers.append((policy.key, stop))
            if stop:
                break
        return answers, gatekeeper, json.loads((tmp_path / "runs" / "x" / "gate.json").read_text())

    return go


def test_off_it_records_and_changes_nothing(walk):
    answers, gate, recorded = walk([0.5, 0.6, 0.4, 0.3])
    assert answers == [("c1", False), ("c2", False), ("c3", False)]
    assert [one["outcome"] for one in recorded] == ["promote", "roll back", "stop"]
    assert gate.final(ref(3)) == ref(3)


def test_on_a_worse_policy_is_left_and_the_best_one_goes_on(walk):
    answers, gate, recorded = walk([0.5, 0.6, 0.4, 0.7], enabled=True)
    assert answers == [("c1", False), ("c1", False), ("c3", False)]
    assert [one["against"] for one in recorded] == [0, 1, 1]
    assert gate.final(ref(3)) == ref(3)


def test_on_it_stops_at_the_end_of_its_patience_with_the_best_policy(walk):
    answers, gate, recorded = walk([0.5, 0.6, 0.6, 0.6, 0.9], enabled=True)
    assert answers == [("c1", False), ("c2", False), ("c1", True)]
    assert recorded[-1]["outcome"] == "stop"
    assert gate.final(ref(3)).key == "c1"


def test_if_nothing_is_ever_better_the_start_model_is_what_is_handed_out(walk):
    answers, gate, _ = walk([0.5, 0.3], enabled=True, patience=1)
    assert answers == [("c0", True)]
    assert gate.final(ref(1)).key == "c0"
