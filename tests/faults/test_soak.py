"""The soak benchmark can say no: growth of anything but what a run must keep is named."""

from benchmarks.soak import judge


def looks(**slopes: float) -> list[dict[str, float]]:
    base = {
        "flow MB": 300.0,
        "server MB": 200.0,
        "flow files": 40,
        "server files": 60,
        "processes": 3,
        "temporary files": 0,
        "prefect.db MB": 1.0,
    }
    return [
        {name: value + slopes.get(name.replace(" ", "_"), 0.0) * number for name, value in base.items()}
        | {"iterations": number / 2}
        for number in range(80)
    ]


def test_what_a_run_keeps_may_grow():
    problems, table = judge(looks(**{"prefect.db_MB": 0.2, "flow_MB": 0.2}))
    assert problems == [] and "| prefect.db MB | " in table


def test_a_leak_is_named():
    for name, slope in (
        ("flow_MB", 1.0),
        ("server_MB", 1.0),
        ("flow_files", 0.5),
        ("server_files", 0.5),
        ("processes", 0.1),
        ("temporary_files", 0.1),
    ):
        problems, _ = judge(looks(**{name: slope}))
        assert len(problems) == 1 and problems[0].startswith(name.replace("_", " ") + " grew from "), (name, problems)
