"""What a number is called in tables: two suites with one task keep two columns."""

from stages.evaluation.promotion import Measurement
from stages.evaluation.rows import column_names, report_row


def test_a_task_of_several_suites_is_named_with_its_suite_and_others_are_not():
    rows = [
        report_row(suite, task, "acc", 0.5, 10)
        for suite, task in (("v1", "mmlu"), ("tidpo", "mmlu"), ("v1", "arc"), ("v1", "mmlu"))
    ]
    assert column_names(rows) == ["v1/mmlu/acc", "tidpo/mmlu/acc", "arc/acc", "v1/mmlu/acc (2)"]
    assert column_names(rows[1:3]) == ["mmlu/acc", "arc/acc"]


def test_the_gate_looks_at_both():
    rows = [report_row(suite, "mmlu", "acc", value, 10, stderr=0.1) for suite, value in (("v1", 0.4), ("tidpo", 0.6))]
    assert Measurement.from_rows([], rows).benchmarks == {"v1/mmlu/acc": (0.4, 0.1), "tidpo/mmlu/acc": (0.6, 0.1)}
