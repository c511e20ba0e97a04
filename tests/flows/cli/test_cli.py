"""The command line: one app, lean help, right exit codes; configs it writes are configs it reads."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data_contracts.errors import TransientError
from flows.cli import server
from flows.cli.commands import main
from flows.cli.scaffold import commented_config
from flows.config import RunConfig, load_run
from stages.methods import METHODS

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "prefect", "mlflow", "pydantic", "pyarrow", "numpy", "vllm", "deepspeed")


def test_help_imports_nothing_heavy():
    code = f"import sys; from flows.cli.commands import main; code = main(['--help']); print([m for m in {HEAVY} if m in sys.modules], code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    for command in ("run", "resume", "status", "compare", "estimate", "init", "ledger", "verify"):
        assert f"  {command} " in done.stdout


def test_what_is_read_before_a_server_is_known_does_not_import_prefect():
    """Prefect reads its settings when it is imported: too early, and a run would talk to a server of Prefect's own making."""
    code = "import sys, flows.cli.commands, flows.config, flows.preflight, flows.comparison; print('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_status_and_ledger_import_what_they_need(undisturbed):
    """The store is only read, so none of these is needed; pandas came with pyarrow's conversions, 0.3 s of 1."""
    names = "torch", "transformers", "prefect", "mlflow", "pandas", "httpx"
    code = (
        "import sys; from flows.cli.commands import main\n"
        f"assert main(['status', 'tiny', '--store', {str(undisturbed.store)!r}]) == 0\n"
        f"assert main(['ledger', 'tiny', '--store', {str(undisturbed.store)!r}]) == 0\n"
        f"print([m for m in {names} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "the run is complete" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_server_that_does_not_answer_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    for url, reason in ((f"http://127.0.0.1:{closed}/api", "Connection refused"), ("localhost", "unknown url type")):
        monkeypatch.setenv("PREFECT_API_URL", url)
        with (
            pytest.raises(
                TransientError, match=rf"{url} \(PREFECT_API_URL\) does not answer: .*{reason}.*unset PREFECT_API_URL"
            ),
            server.prefect_server(tmp_path),
        ):
            pass
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as any_server:
        threading.Thread(target=any_server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", url := f"http://127.0.0.1:{any_server.server_port}/api")
        with server.prefect_server(tmp_path) as found:
            assert found == url  # it answers 501: whether that is right is for Prefect's client to say
        any_server.shutdown()


@pytest.mark.parametrize("method", METHODS.names())
def test_init_writes_a_config_that_loads_as_that_method(method, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(commented_config(method))
    run = load_run(path)
    assert run.method == METHODS.config(method)
    assert "teacher" not in run.roles or run.models.teacher is not None


def test_every_commented_default_of_init_may_be_uncommented():
    """A comment that is wrong about a default, or names a field that is not there, would mislead."""
    text = commented_config("sppo")
    live = yaml.safe_load(text)
    lines = []
    for line in text.splitlines():
        match = re.match(r"( *)# (\w+):( |$)", line)
        is_field = match and (match[1] or match[2] in RunConfig.model_fields)
        lines.append(line.replace("# ", "", 1) if is_field else line)
    whole = yaml.safe_load("\n".join(lines))
    assert whole.keys() == RunConfig.model_fields.keys() and len(whole["training"]) > 10
    assert RunConfig.model_validate(whole) == RunConfig.model_validate(live)


def test_init_refuses_to_overwrite_and_an_unknown_method(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert main(["init", "dpo", "--out", str(path)]) == 0
    assert main(["init", "dpo", "--out", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["init", "dpoo"]) == 2
    assert "Did you mean 'dpo'" in capsys.readouterr().err


def test_a_server_that_goes_away_during_the_clients_version_check_is_worth_another_try():
    """The error is the one that Prefect's own check raises, of a server that refuses the connection."""
    from prefect.client.orchestration import SyncPrefectClient

    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    url = f"http://127.0.0.1:{closed}/api"
    client = SyncPrefectClient(url, httpx_settings={"timeout": 1})
    client._client.enable_retries = False
    client.api_version = lambda: (_ for _ in ()).throw(OSError("Connection refused"))  # its retries take a minute
    gone = "went away while the run was starting .Connection refused"
    with pytest.raises(TransientError, match=gone), server.server_errors_explained(url):
        client.raise_for_api_version_mismatch()
    with pytest.raises(RuntimeError, match="^another$"), server.server_errors_explained(url):
        raise RuntimeError("another")


@pytest.mark.parametrize("command", ["resume", "status", "report", "ledger"])
def test_a_name_that_no_run_has_is_refused_with_the_names_there_are(command, tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("run.json", "ledger.jsonl"):
        (tmp_path / "runs" / "mine" / name).write_text('{"event": "begin", "session": "1", "time": 1}\n')
    assert main([command, "mien", "--store", str(tmp_path)]) == 2
    assert "runs there: mine" in capsys.readouterr().err


def test_words_that_are_no_command_and_overrides_that_are_no_assignment(capsys):
    assert main(["runn"]) == 2
    assert "Did you mean 'run'" in capsys.readouterr().err
    assert main(["run", "deploy/runs/quickstart.yaml", "--set", "seed"]) == 2
    assert "section.field=value" in capsys.readouterr().err


def test_a_finished_run_is_asked_about_by_its_name(undisturbed, capsys):
    assert main(["status", "tiny", "--store", str(undisturbed.store)]) == 0
    out = capsys.readouterr().out
    assert "14 of 14 artifacts are built: the run is complete" in out
    assert main(["status", "tiny", "--store", str(undisturbed.store), "--set", "prompts.per_iteration=8"]) == 0
    out = capsys.readouterr().out
    assert (
        "to come" in out and "2 of 14 artifacts are built" in out
    )  # other prompts: only the start model's answers are shared
    assert main(["ls", "--kind", "checkpoint", "--store", str(undisturbed.store)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_its_report_is_written_again_as_it_was(undisturbed, tmp_path, capsys):
    import shutil

    store = shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True)
    page, text = store / "runs/tiny/report.html", store / "runs/tiny/report.md"
    # It names its checkpoint, which lies elsewhere now.
    before = tuple(
        path.read_text().replace(str(undisturbed.store.resolve()), str(store.resolve())) for path in (page, text)
    )
    page.unlink()
    text.unlink()
    assert main(["report", "tiny", "--store", str(store)]) == 0
    after = page.read_text(), text.read_text()
    assert [text.replace("\\_", "_") for text in after] == [text.replace("\\_", "_") for text in before]


def test_compare_lays_different_runs_over_each_other(undisturbed, tmp_path, capsys):
    import shutil

    store = shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True)
    shutil.copytree(store / "runs/tiny", store / "runs/other")
    settings = store / "runs/other/run.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"name": "other"}))
    assert main(["report", "--compare", "tiny", "other", "--store", str(store)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.resolve() == (store / "runs/tiny/against-other.html").resolve()
    for link in re.findall('<li><a href="(.*?)">', page.read_text()):
        assert (page.parent / link).is_file()
    assert main(["report", "--compare", "tiny", "--store", str(store)]) == 2
    assert "name two or more" in capsys.readouterr().err


def test_a_store_moves_and_what_it_holds_is_found_where_it_lies_now(undisturbed, make_run, tmp_path, capsys):
    """All that is built is found, and the report is made, where every path in the records leads nowhere any more."""
    import shutil

    from data_contracts.gc import gc
    from data_contracts.store import Store

    root = shutil.copytree(undisturbed.store, tmp_path / "moved" / "store", symlinks=True)
    for path in root.glob("artifacts/*/*/record.json"):
        path.write_text(path.read_text().replace(str(undisturbed.store.resolve()), "/old/place"))
    assert "/old/place/artifacts/" in next(root.glob("artifacts/checkpoint/*/record.json")).read_text()
    for name in ("report.html", "report.md"):
        (root / "runs/tiny" / name).unlink()
    assert main(["status", "tiny", "--store", str(root)]) == 0
    assert "14 of 14 artifacts are built: the run is complete" in capsys.readouterr().out
    assert main(["report", "tiny", "--store", str(root)]) == 0
    for name in ("report.html", "report.md"):
        pages = ((store / "runs/tiny" / name).read_text() for store in (root, undisturbed.store))
        written, before = (page.replace("\\_", "_") for page in pages)  # as report.md writes a path
        assert written == before.replace(str(undisturbed.store.resolve()), str(root.resolve()))
    store = Store(root)
    for record in store.records():
        for ref in record.inputs.values():
            assert ref.key == "external" or ref.path == str(store.directory(ref.kind, ref.key))
        for ref in record.inputs.values():
            assert "/old/place" not in ref.path
    assert all("artifacts" not in removal.path.parts for removal in gc(store, 1, dry_run=True, young_seconds=-1))


def test_its_ledger_accounts_for_all_of_its_time(undisturbed):
    """The session, launch to end, is the command's wall time but for its end, in which the server and the interpreter end
    (2 s of 60 on a machine of one's own, more where others use it); the stages' own walls are within their tasks'."""
    from data_contracts import ledger
    from data_contracts.store import Store

    account = ledger.read_account(Store(undisturbed.store), "tiny")
    (session,) = account.sessions
    assert session.is_finished
    assert 0.9 * undisturbed.first.seconds < session.wall_seconds <= undisturbed.first.seconds
    rows = ledger.cost_rows(account)
    assert len(rows) == 14 and not any(row["cached"] for row in rows)
    paid = sum(row["wall"] for row in rows)
    assert paid <= session.stage_seconds <= session.wall_seconds
    assert session.stage_seconds - paid < 14 * 3  # launching, signing, telling
    assert all(row["wall"] == pytest.approx(row["start_up"] + row["busy"] + row["waiting"]) for row in rows)
    by_stage = {row["stage"]: row for row in ledger.sum_rows(rows, ("stage",))}
    assert (
        by_stage["sample"]["tokens_out"] > 0 and by_stage["train"]["flops"] > 0 and by_stage["weigh"]["tokens_in"] > 0
    )
    assert all(row["peak_rss_bytes"] > 50e6 for row in rows)


def test_a_report_on_a_store_that_may_only_be_read_is_refused_in_a_sentence(undisturbed, tools):
    """The mount is one of this command's own."""
    store = undisturbed.store
    command = f"""
        mount --bind {store} {store} && mount -o remount,bind,ro {store} || exit 99
        exec {sys.executable} -m flows report tiny --store {store}
    """
    ended = tools.finish(["unshare", "--mount", "sh", "-c", command])
    if ended.code == 99 or "unshare:" in ended.out:
        pytest.skip("a filesystem cannot be mounted here")
    assert ended.code == 2 and "Traceback" not in ended.out, ended.out
    assert f"(Read-only file system: {store}/runs/tiny/" in ended.out and f"make {store} writable" in ended.out


def test_an_install_without_engines_is_said_in_a_sentence(monkeypatch, capsys):
    """`pip install .` brings no torch: the first command that loads a model says how to get it, and shows no traceback."""
    error = ModuleNotFoundError("No module named 'transformers'", name="transformers")

    def play_without_engines(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("flows.cli.play.play", play_without_engines)
    assert main(["run", "deploy/runs/quickstart.yaml"]) == 2
    assert re.search(r"transformers is not installed.*pip install .*\[cpu\]", capsys.readouterr().err)
    error.name = "a_module_of_ours"
    with pytest.raises(ModuleNotFoundError):
        main(["run", "deploy/runs/quickstart.yaml"])


def test_while_the_server_starts_something_is_on_the_screen(monkeypatch, capsys, tmp_path):
    """On a busy machine it takes minutes, which must not look like a hang."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(server, "_Server", lambda port, log: SimpleNamespace(stop=lambda: None))
    for step in ("_import_clients", "_drain_prefect_workers"):
        monkeypatch.setattr(server, step, lambda: None)
    monkeypatch.setattr(server, "_wait_for_start", lambda process, url: None)
    with server.prefect_server(tmp_path / "prefect"):
        assert (
            f"starting a Prefect server for this run; its log: {tmp_path}/prefect/server.log" in capsys.readouterr().out
        )
