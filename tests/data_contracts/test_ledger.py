"""The ledger: what a run paid for, what it found, what no stage accounts for; across kills and re-runs."""

import csv
import json
import os

import pytest

import data_contracts.__main__ as contracts
from data_contracts import ledger as ledgers
from data_contracts.artifact import ArtifactRecord
from data_contracts.errors import ConfigError
from data_contracts.ledger import Ledger

COST = {"tokens_in": 100, "tokens_out": 20, "flops": 2.4e9, "peak_rss_bytes": 5e8, "cache_hits": 3}


def make_record(store, key, wall, start_up=1.0, **cost):
    directory = store.directory("generations", key)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.txt").write_text("x" * 50)
    seconds = {"wall": wall, "start_up": start_up, "waiting": 0.0, "busy": wall - start_up}
    return store.sign(
        ArtifactRecord(kind="generations", key=key, stage="sample", version="1", config={}, inputs={}, content="",
                       files=[], rows=1, seconds=seconds, cost=COST | cost)
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(ledgers.time, "time", lambda: now[0])
    return now


def stage(ledger, clock, record, step, name, seconds, cached=False, waited=0.0):
    began = clock[0]
    ledger.started(step, name, record.stage)
    clock[0] += seconds
    ledger.finished(step, name, record.stage, record, cached, began, waited)


@pytest.fixture
def run(store, clock):
    """One session of 30 s, launched 2 s before: a stage of 10 s, another of 8 s that waited 3 s, and time between them."""
    ledger = Ledger(store, "demo")
    ledger.begin(launched=clock[0] - 2)
    clock[0] += 4
    stage(ledger, clock, make_record(store, "a" * 16, 9.5), "iter_00", "sample", 10)
    stage(ledger, clock, make_record(store, "b" * 16, 4.5, peak_rss_bytes=9e8), "iter_01", "sample", 8, waited=3.0)
    clock[0] += 6
    ledger.end()
    return ledger


def test_stages_and_other_add_up_to_the_sessions_wall_time(store, run):
    account = ledgers.read_account(store, "demo")
    (session,) = account.sessions
    assert session.is_finished and session.wall_seconds == 30
    assert session.stage_seconds == 18 and session.other_seconds == 12
    assert "30.0 s = stages 18.0 s + other 12.0 s (40.0%)" in ledgers.session_lines(account)[0]


def test_costs_are_the_records_and_waiting_is_added(store, run):
    first, second = ledgers.cost_rows(ledgers.read_account(store, "demo"))
    assert (first["wall"], first["start_up"], first["busy"], first["waiting"]) == (9.5, 1.0, 8.5, 0.0)
    assert (second["wall"], second["waiting"]) == (7.5, 3.0)
    assert first["tokens_in"] == 100 and first["bytes"] == 50


def test_sums_add_and_peaks_do_not(store, run):
    (total,) = ledgers.sum_rows(ledgers.cost_rows(ledgers.read_account(store, "demo")))
    assert total["wall"] == 17.0 and total["flops"] == 4.8e9 and total["tokens_out"] == 40
    assert total["peak_rss_bytes"] == 9e8 and total["artifacts"] == 2 and total["found"] == 0
    assert [
        row["step"] for row in ledgers.sum_rows(ledgers.cost_rows(ledgers.read_account(store, "demo")), ("step",))
    ] == [
        "iter_00",
        "iter_01",
    ]


def test_what_another_run_built_is_saved_time_and_no_work(store, run, clock):
    other = Ledger(store, "other")
    other.begin()
    stage(other, clock, store.load("generations", "a" * 16), "iter_00", "sample", 0.1, cached=True)
    other.end()
    (row,) = ledgers.cost_rows(ledgers.read_account(store, "other"))
    assert row["cached"] and row["saved"] == 9.5 and row["wall"] == 0.0 and "flops" not in row


def test_a_second_session_of_the_same_run_still_has_paid_once(store, run, clock):
    again = Ledger(store, "demo")
    again.begin()
    for key, step in (("a", "iter_00"), ("b", "iter_01")):
        stage(again, clock, store.load("generations", key * 16), step, "sample", 0.1, cached=True)
    again.end()
    account = ledgers.read_account(store, "demo")
    assert len(account.sessions) == 2
    (total,) = ledgers.sum_rows(ledgers.cost_rows(account))
    assert total["wall"] == 17.0 and total["artifacts"] == 2 and total["saved"] == 0


def test_a_changed_setting_replaces_what_stood_at_its_place(store, run, clock):
    again = Ledger(store, "demo")
    again.begin()
    stage(again, clock, make_record(store, "c" * 16, 2.0), "iter_01", "sample", 3)
    rows = ledgers.cost_rows(ledgers.read_account(store, "demo"))
    assert [row["key"][0] for row in rows] == ["a", "c"]


def test_a_killed_session_says_what_it_was_at(store, run, clock):
    killed = Ledger(store, "demo")
    killed.begin()
    killed.started("iter_02", "train", "train")
    clock[0] += 100
    account = ledgers.read_account(store, "demo")
    assert [(line["step"], line["shown_as"]) for line in account.running] == [("iter_02", "train")]
    assert not account.sessions[-1].is_finished and "interrupted" in ledgers.session_lines(account)[-1]


def test_a_line_cut_by_a_kill_and_a_removed_artifact_do_no_harm(store, run):
    with open(run.path, "a") as file:
        file.write('{"event": "sta')
    store.discard("generations", "a" * 16)
    first, _ = ledgers.cost_rows(ledgers.read_account(store, "demo"))
    assert first["wall"] == 10  # of the session: the record is gone


def test_the_command_prints_tables_and_csv(store, run, capsys):
    assert contracts.main(["ledger", "demo", "--store", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert (
        "iter_01" in out and "tokens in" in out and "other 12.0 s" in out and "GPUs" not in out
    )  # nothing happened there
    assert contracts.main(["ledger", "demo", "--csv", "--store", str(store.root)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["wall"]) for row in rows] == [9.5, 7.5]


def test_an_estimate_is_set_beside_what_was_measured(store, run, capsys):
    steps = [{"step": "iter_00", "shown_as": "sample", "seconds": 19.0, "source": "calibration"}]
    steps.append({"step": "iter_01", "shown_as": "sample", "seconds": 0.0, "source": "built"})
    body = {"seconds": 33.0, "half_width": 4.0, "other": 10.0, "steps": steps}
    run.path.with_name("estimate.json").write_text(json.dumps(body))
    lines = ledgers.estimate_lines(store, "demo")
    assert lines[0] == "predicted for 1 stage: 19.0 s, measured 9.5 s (+100%)"
    assert lines[1] == "predicted for the run: 33.0 s +- 4.0 s, measured 30.0 s (+10%)"


def test_a_run_without_a_ledger_is_refused_with_the_runs_that_have_one(store, run):
    with pytest.raises(ConfigError, match="no run 'demmo'.*runs there: demo"):
        ledgers.read_account(store, "demmo")


def test_an_artifact_that_is_gone_or_damaged_keeps_its_line(store, run):
    (store.directory("generations", "a" * 16) / "record.json").write_text("{")
    entries = ledgers.read_account(store, "demo").entries
    assert entries[0].record is None and entries[0].seconds == 10 and entries[1].record is not None
    assert [row["step"] for row in ledgers.cost_rows(ledgers.read_account(store, "demo"))] == ["iter_00", "iter_01"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"{",
        b"5",
        b"null",
        b'{"event": ["stage"]}',
        b'{"event": "stage", "session": "x", "time": 1.0}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_left_out(store, run, garbage):
    before = ledgers.read_account(store, "demo")
    run.path.write_bytes(garbage + b"\n" + run.path.read_bytes() + garbage)
    assert ledgers.read_account(store, "demo") == before


def test_a_ledger_without_a_whole_line_is_none(store, run):
    run.path.write_bytes(b'{"event": "beg')
    with pytest.raises(ConfigError, match="the ledger of 'demo' in .* has no whole line"):
        ledgers.read_account(store, "demo")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"steps": 3}', '{"steps": [{"step": 1}]}', '{"steps": [], "seconds": "x"}']
)
def test_a_damaged_estimate_costs_its_comparison_alone(store, run, capsys, content):
    path = run.path.with_name("estimate.json")
    path.write_text(content)
    (line,) = ledgers.estimate_lines(store, "demo")
    assert str(path) in line and "is damaged" in line
    contracts.ledger(store, "demo", False)
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(("session", "cached"), [("killed", False), ("of-another-run", True), ("", True)])
def test_what_a_session_built_that_was_killed_before_its_line_counts_as_built(store, clock, session, cached):
    killed = Ledger(store, "demo", "killed")
    killed.begin()
    assert os.environ[ledgers.SESSION] == "killed"
    killed.started("iter_00", "sample", "sample")
    signed = make_record(store, "a" * 16, 9.5)
    signed = store.sign(signed.model_copy(update={"provenance": {"session": session}}))
    again = Ledger(store, "demo")
    again.begin()
    for step in ("iter_00", "iter_01"):
        stage(again, clock, signed, step, "sample", 0.1, cached=True)
    first, second = ledgers.cost_rows(ledgers.read_account(store, "demo"))
    assert first["cached"] == cached and second["cached"]
    assert first["wall"] == (0.0 if cached else 9.5)
