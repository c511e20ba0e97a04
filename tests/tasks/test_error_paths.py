"""What is said, and what is left, when something below a build fails: the disk, the hub, the UI, an input that is not what was signed."""

import errno
import json
import os
import struct
import subprocess

import pyarrow as pa
import pytest

import tasks.build
import tasks.stages
from data_contracts.checkpoint import ModelRef, check_safetensors, external_model, has_chat_template
from data_contracts.config import read_yaml
from data_contracts.errors import ArtifactError, ConfigError, ContractError, StageError, TransientError
from data_contracts.files import disk_errors_explained, is_abandoned
from data_contracts.repair import set_damaged_aside
from data_contracts.shards import shard_path, to_table
from stages.sampling.stage import SamplingConfig
from tasks.build import build
from tasks.data.reading import read_source
from tasks.data.source import Source
from tasks.launch import Progress
from tasks.models import locate


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"), (errno.EDQUOT, "Free some space"), (errno.EROFS, "Mount it writable"), (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "dmesg"),
    ],
)  # fmt: skip
def test_what_the_disk_refuses_becomes_a_sentence(tmp_path, number, advice):
    with (
        pytest.raises(ArtifactError, match=f"the store {tmp_path} cannot be written: .*x.*{advice}.*then run again"),
        disk_errors_explained(tmp_path),
    ):
        raise OSError(number, "no", "x")


def test_a_writer_that_is_dead_and_not_reaped_is_no_more(tmp_path):
    path = tmp_path / f".x.tmp-{os.uname().nodename}-"
    with subprocess.Popen(["sleep", "60"]) as process:
        mine = path.with_name(path.name + str(process.pid))
        assert not is_abandoned(mine)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert is_abandoned(mine)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(ConnectionRefusedError), disk_errors_explained(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")


SETTINGS = SamplingConfig.model_validate({"backend": {"name": "canned"}, "runtime": {"device": "cpu"}})


@pytest.mark.parametrize("error", [ArtifactError("cannot be read"), StageError("died")])
def test_a_failed_stage_whose_input_is_damaged_sets_the_input_back(store, tiny_model, make_prompts, monkeypatch, error):
    inputs = {"prompts": make_prompts(store, 3), "policy": external_model(tiny_model)}

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tasks.build, "run_work", fail)
    with pytest.raises(type(error), match=f"^{error}$"):
        build("sample", SETTINGS, inputs, store)
    path = shard_path(store.directory("prompts", inputs["prompts"].key), 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ArtifactError,
        match=r"Its input is damaged: prompts .* \(part-00000.parquet has \d+ bytes, not \d+\). Run again",
    ):
        build("sample", SETTINGS, inputs, store)
    assert not path.exists() and store.find("prompts", inputs["prompts"].key) is None


def test_a_damaged_record_of_an_input_is_set_back_by_whoever_looks_for_it(store, make_prompts):
    ref = make_prompts(store, 3)
    record = store.directory("prompts", ref.key) / "record.json"
    record.write_text("{")
    set_damaged_aside(store, "prompts", ref.key, "odd")
    assert (
        not record.exists() and shard_path(store.directory("prompts", ref.key), 0).is_file()
    )  # its shard is sealed by itself


def hub(monkeypatch, error):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_model_that_the_hub_does_not_have_is_the_requests_fault(monkeypatch):
    from httpx import Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    hub(monkeypatch, RepositoryNotFoundError("404", response=Response(404, request=Request("GET", "https://x"))))
    with pytest.raises(ConfigError, match="the hub has no model a/b at revision main, or it is gated"):
        locate(ModelRef(hub_id="a/b"), True)


@pytest.mark.parametrize("error", [OSError("disk"), ConnectionError("away")])
def test_a_hub_that_does_not_answer_is_worth_another_try(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(
        TransientError, match="the model a/b could not be fetched .* Give `path:` of a directory instead"
    ):
        locate(ModelRef(hub_id="a/b", revision="v1"), True)


def test_a_progress_bar_is_never_worth_a_run(monkeypatch):
    said = []

    class Logger:
        def debug(self, *words):
            said.append(words)

    def away(**_):
        raise RuntimeError("server away")

    monkeypatch.setattr(tasks.stages, "create_progress_artifact", away)
    monkeypatch.setattr(tasks.stages, "get_run_logger", Logger)
    progress = Progress()
    progress.done, progress.total = 1, 2
    tasks.stages._ProgressArtifact("k", "d")(progress)
    assert "server away" in str(said[0][1])


def test_names_that_no_file_can_have():
    with pytest.raises(ConfigError, match="cannot read the run config .*null byte"):
        read_yaml("a\0b")
    with pytest.raises(ConfigError, match="cannot read the prompts .*null byte"):
        read_source(Source(path="a\0b"))


def test_headers_and_settings_of_the_wrong_shape(tmp_path):
    header = json.dumps({"a": {"data_offsets": [0, 1.5]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match="an offset is not a whole number"):
        check_safetensors(tmp_path / "m.safetensors")
    assert not has_chat_template(tmp_path)
    for text in ("[]", "{", "{}"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        assert not has_chat_template(tmp_path)


def test_a_table_that_arrow_refuses_as_a_whole(monkeypatch):
    class Table:
        @staticmethod
        def from_pylist(*_, **__):
            raise pa.ArrowInvalid("too much")

    monkeypatch.setattr("data_contracts.shards.pa.Table", Table)
    with pytest.raises(ContractError, match="dropped: too much"):
        to_table([{"prompt_id": "p", "reason": "r"}], "dropped")


def test_a_bar_shows_no_question_marks_while_a_stage_starts(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with tasks.stages._TerminalBar("iter_01 sample") as bar:
        bar(progress := Progress())
        shown = capsys.readouterr().err
        assert "iter_01 sample: starting, 00:00" in shown and "?" not in shown
        progress.done, progress.total, progress.unit = 1, 2, "shards"
        bar(progress)
        shown = capsys.readouterr().err.splitlines()[-1]
        assert "50%" in shown and "1/2" in shown and "starting" not in shown
