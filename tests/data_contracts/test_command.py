"""`python -m data_contracts`: its output is enough to find an artifact, to know why it was built again, and to trust it.

Strategy: a store of four small artifacts; the command is called as a function, and once as a process for its exit code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.__main__ import main
from data_contracts.artifact import RECORD, ArtifactRecord, ArtifactRef
from data_contracts.gc import gc
from data_contracts.identity import fingerprint
from data_contracts.shards import shard_path
from data_contracts.store import Store
from flows.cli.diagnosis.store import artifacts

ROOT = Path(__file__).resolve().parents[2]
COLD = {"temperature": 0.7, "backend": {"name": "vllm", "dtype": "float32"}, "stop": [1, 2]}


def make(
    store: Store,
    config: dict,
    policy: str = "ab" * 32,
    version: str = "1",
    time: str = "2026-01-02T03:04:05+0000",
    **inputs,
) -> str:
    """A signed artifact of a few bytes; its key."""
    inputs |= {"policy": ArtifactRef(kind="checkpoint", key="external", path="/models/tiny", content=policy)}
    key = fingerprint("sample", version, config, {name: ref.content for name, ref in inputs.items()})
    directory = store.directory("generations", key)
    directory.mkdir(parents=True)
    (directory / "part-00000.parquet").write_text("twelve bytes")
    record = ArtifactRecord(
        kind="generations", key=key, stage="sample", version=version, config=config, inputs=inputs, content="",
        files=[], rows=12, metrics={"finished_rate": 0.123456789}, facts={"versions": {"torch": "2.13"}},
        seconds={"wall": 3.25}, provenance={"time": time, "host": "here"},
    )  # fmt: skip
    store.sign(record)
    return key


@pytest.fixture
def command(store, capsys):
    """command("ls", ...) -> (exit code, stdout, stderr)."""

    def call(*arguments: str):
        code = main([*arguments, "--store", str(store.root)])
        return code, *capsys.readouterr()

    return call


# --- ls, show


def test_ls_is_one_line_per_finished_artifact(store, command, make_prompts):
    prompts = make_prompts(store, 3)
    key = make(store, COLD)
    code, out, _ = command("ls")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0] == ["kind", "key", "rows", "when", "seconds"]
    assert lines[1] == ["prompts", prompts.key, "3", "?", "0.0"]
    assert lines[2] == ["generations", key, "12", "2026-01-02", "03:04:05", "3.2"]
    assert [line.split()[0] for line in command("ls", "--kind", "prompts")[1].splitlines()[1:]] == ["prompts"]


def test_ls_of_an_empty_store_says_so_and_makes_none(store, command):
    assert command("ls") == (0, f"no artifact in {store.root}\n", "")
    assert not store.root.exists()


def test_show_prints_settings_inputs_metrics_and_files(store, command):
    key = make(store, COLD)
    code, out, _ = command("show", key[:6])
    assert code == 0 and out.startswith(f"generations {key}  (stage sample, version 1)\n")
    flat = " ".join(out.split())
    for text in (
        "temperature 0.7", "backend.dtype 'float32'", "stop [1, 2]", "finished_rate 0.123457", "versions.torch '2.13'",
        "policy checkpoint/external with content abababababababab (/models/tiny)", "wall 3.25",
        "part-00000.parquet 12 ", "12 rows",
    ):  # fmt: skip
        assert text in flat


@pytest.mark.parametrize("verb", ["show", "explain", "verify"])
def test_a_key_that_is_not_there_is_a_wrong_request(command, verb):
    code, out, err = command(verb, "beef")
    assert (code, out) == (2, "")
    assert err.startswith("ConfigError: no artifact in") and err.count("\n") == 1


# --- explain


def test_explain_names_the_field_in_which_the_nearest_sibling_differs(store, command):
    make(store, COLD | {"temperature": 0.9, "stop": [1]})
    near = make(store, COLD | {"temperature": 1.0})
    key = make(store, COLD)
    assert command("explain", key)[1].splitlines() == [
        f"generations/{key} differs from the most similar generations, {near} of 2026-01-02 03:04:05, in 1 field:",
        "  config.temperature is 0.7, not 1",
    ]


def test_explain_sees_nested_settings_added_ones_versions_and_inputs(store, command, make_prompts):
    old, new_prompts = make_prompts(store, 1), make_prompts(store, 2)
    make(store, COLD, prompts=old)
    new = COLD | {"backend": {"name": "vllm", "dtype": "bfloat16"}, "top_p": 0.9, "tasks": [{"path": "x"}]}
    key = make(store, new, version="2", policy="cd" * 32, prompts=new_prompts)
    out = command("explain", key)[1]
    assert "in 7 fields:" not in out and "in 6 fields:" in out
    for line in (
        "  version is '2', not '1'",
        "  config.backend.dtype is 'bfloat16', not 'float32'",
        "  config.top_p is 0.9, not absent",
        "  config.tasks.0.path is 'x', not absent",
        f"  input prompts is prompts/{new_prompts.key} with content {new_prompts.content[:16]}, "
        f"not prompts/{old.key} with content {old.content[:16]}",
        f"  input policy is checkpoint/external with content {'cd' * 8} (/models/tiny), "
        f"not checkpoint/external with content {'ab' * 8} (/models/tiny)",
        f"  (why prompts differs: selfplay explain prompts/{new_prompts.key})",
    ):
        assert line in out.splitlines()


def test_explain_of_the_first_of_its_kind_says_so(store, command, make_prompts):
    make_prompts(store, 1)
    assert "is the only generations in" in command("explain", make(store, COLD))[1]


# --- verify


def test_verify_of_an_intact_store_is_one_line_and_code_0(store, command, make_prompts):
    make_prompts(store, 1)
    make(store, COLD)
    assert command("verify") == (0, "intact: 2 of 2 finished artifacts\n", "")


def flip(path: Path) -> None:
    path.write_text("twelve bytez")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "part-00000.parquet is missing"),
        (lambda path: path.write_text("few"), "part-00000.parquet has 3 bytes, not 12"),
        (flip, "part-00000.parquet has other content than was signed"),
        (lambda path: shard_path(path.parent, 1).write_text("more"), "part-00001.parquet is not in the record"),
        (lambda path: (path.parent / RECORD).write_text("{"), "record.json is damaged"),
        (lambda path: edit(path.parent / RECORD, "0.7", "0.8"), "its settings and inputs make the key"),
        (
            lambda path: edit(path.parent / RECORD, '\n "content": "', '\n "content": "0'),
            "record.json was changed: its content digest is not that of the files",
        ),
    ],
    ids=["missing", "size", "content", "extra", "record", "settings", "digest"],
)
def test_verify_names_every_kind_of_damage_and_ends_with_4(store, command, damage, message):
    whole, key = make(store, COLD | {"temperature": 1.0}), make(store, COLD)
    damage(shard_path(store.directory("generations", key), 0))
    code, out, err = command("verify")
    assert code == 4
    assert [line for line in out.splitlines() if line.startswith(f"generations/{key}: ") and message in line]
    assert whole not in out and "intact: 1 of 2 finished artifacts" in out
    assert err.startswith("ArtifactError: 1 damaged artifact in")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_verify_of_named_artifacts_leaves_the_others_alone(store, command):
    whole, broken = make(store, COLD | {"temperature": 1.0}), make(store, COLD)
    flip(shard_path(store.directory("generations", broken), 0))
    assert command("verify", whole)[0] == 0
    assert command("verify", whole, broken[:10])[0] == 4


def test_verify_lists_unfinished_work_which_is_no_damage(store, command):
    directory = store.directory("generations", "f" * 16)
    directory.mkdir(parents=True)
    shard_path(directory, 0).write_text("a shard")
    code, out, _ = command("verify")
    assert code == 0
    assert out.startswith(f"generations/{'f' * 16}: unfinished (1 shard, last written 20")


def test_verify_leaves_a_record_of_a_newer_program_alone(store, command):
    key = make(store, COLD)
    edit(store.directory("generations", key) / RECORD, '"format": 1', '"format": 2')
    code, out, _ = command("verify")
    assert code == 0 and out.startswith(f"generations/{key}: not verified: ") and "written by a newer version" in out
    assert out.endswith("intact: 0 of 0 finished artifacts\n")


def test_the_command_uses_the_store_of_the_environment_and_its_exit_code(store):
    key = make(store, COLD)
    flip(shard_path(store.directory("generations", key), 0))
    command = [sys.executable, "-m", "data_contracts", "verify"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"SELFPLAY_STORE": str(store.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4 and "other content" in done.stdout


def test_a_directory_that_no_artifact_can_be_is_named_and_left_alone(store, command, make_prompts):
    ref = make_prompts(store, 3)
    odd = store.root / "artifacts" / "a b" / "k"
    odd.mkdir(parents=True)
    (odd / RECORD).write_text("{}")
    code, out, _ = command("verify")
    assert code == 0 and "artifacts/a b/k: no artifact has such a name; it is left alone" in out
    assert "intact: 1 of 1 finished artifact" in out
    assert [record.key for record in store.records()] == [ref.key] and store.strangers() == [odd]
    assert list(artifacts(store)) == [] and gc(store, 0, young_seconds=-1)
    assert (odd / RECORD).is_file() and not Path(ref.path).exists()
