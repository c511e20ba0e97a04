"""Nothing expensive is deleted because something small beside it is odd: it is set aside with the reason, repaired, or
left alone.

Strategy: a checkpoint with large weights and small files, trained from a model directory; a generations artifact of
three shards.
"""

import json
from pathlib import Path

import pytest

import tasks.build
from data_contracts.artifact import RECORD, ArtifactRecord, ArtifactRef
from data_contracts.errors import ArtifactError, NewerRecordError
from data_contracts.gc import gc
from data_contracts.repair import set_damaged_aside
from data_contracts.set_aside import list_set_aside
from data_contracts.store import Store

KEY = "0123456789abcdef"


def sign(store: Store, kind: str, files: dict[str, str], **inputs: ArtifactRef) -> ArtifactRecord:
    directory = store.directory(kind, KEY)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return store.sign(
        ArtifactRecord(
            kind=kind, key=KEY, stage="test", version="1", config={}, inputs=inputs, content="", files=[], rows=1
        )
    )


@pytest.fixture
def checkpoint(store, tmp_path) -> ArtifactRecord:
    """A checkpoint whose chat template is that of the model it was trained from."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "chat_template.jinja").write_text("template")
    policy = ArtifactRef(kind="checkpoint", key="external", path=str(tmp_path / "policy"), content="p")
    files = {"model.safetensors": "weights " * 1000, "chat_template.jinja": "template", "config.json": "{}"}
    return sign(store, "checkpoint", files, policy=policy)


def find(store: Store, kind: str) -> tuple[ArtifactRecord | None, list[str]]:
    """What the next run does with the artifact, and its log."""
    log: list[str] = []
    return tasks.build._find(store, kind, KEY, log.append), log


def test_an_edited_small_file_comes_back_from_the_input_it_was_copied_from(store, checkpoint):
    directory = store.directory("checkpoint", KEY)
    (directory / "chat_template.jinja").write_text("edited")
    record, log = find(store, "checkpoint")
    assert record == checkpoint and store.problems(checkpoint, deep=True) == []
    assert "chat_template.jinja was replaced by" in log[0]
    (entry,) = list_set_aside(store.root)
    assert (entry.path / "chat_template.jinja").read_text() == "edited" and entry.reason["why"] == "not what was signed"
    assert find(store, "checkpoint") == (checkpoint, [])


def test_a_small_file_that_is_gone_comes_back_too(store, checkpoint):
    (store.directory("checkpoint", KEY) / "chat_template.jinja").unlink()
    assert find(store, "checkpoint")[0] == checkpoint and list_set_aside(store.root) == []


@pytest.mark.parametrize("damage", ["another file is odd", "unknown field", "half a record"])
def test_what_cannot_be_repaired_is_set_aside_whole(store, checkpoint, damage):
    directory = store.directory("checkpoint", KEY)
    path = directory / RECORD
    if damage == "another file is odd":
        (directory / "config.json").write_text("edited")
    elif damage == "unknown field":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "good"}))
    else:
        path.write_text(path.read_text()[:40])
    (directory / "stage.log").write_text("log")
    record, log = find(store, "checkpoint")
    assert record is None and "nothing of it is deleted; building it again" in log[0]
    (entry,) = list_set_aside(store.root)
    assert (entry.path / "model.safetensors").read_text() == "weights " * 1000
    assert entry.reason["was"] == f"artifacts/checkpoint/{KEY}" and str(entry.path) in log[0]
    assert sorted(path.name for path in directory.iterdir()) == ["stage.log"]


def test_whole_shards_of_a_damaged_artifact_are_used_again(store):
    files = {f"part-0000{i}.parquet": f"shard {i}" for i in range(3)} | {"scores-00001.parquet": "s", ".plan": "plan"}
    sign(store, "generations", files)
    directory = store.directory("generations", KEY)
    (directory / "part-00001.parquet").write_text("odd")
    assert find(store, "generations")[0] is None
    assert sorted(path.name for path in directory.iterdir()) == [".plan", "part-00000.parquet", "part-00002.parquet"]
    (entry,) = list_set_aside(store.root)
    assert {path.name for path in entry.path.glob("*.parquet")} == {name for name in files if name.endswith("parquet")}


def test_a_newer_programs_record_is_refused_by_name_and_nothing_is_touched(store, checkpoint):
    path = store.directory("checkpoint", KEY) / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "mood": "good"}))
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    calls = [
        lambda: find(store, "checkpoint"),
        lambda: store.find("checkpoint", KEY),
        lambda: set_damaged_aside(store, "checkpoint", KEY, "odd"),
        lambda: store.load("checkpoint", KEY),
    ]
    for call in calls:
        with pytest.raises(NewerRecordError, match="newer version of this program .record format 2, this one reads 1"):
            call()
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
    with pytest.raises(ArtifactError, match="Nothing was changed: update the program"):
        gc(store, 0, young_seconds=-1)
    assert (path.parent / "model.safetensors").is_file()


def test_a_record_without_a_format_is_of_the_first(store, checkpoint):
    path = store.directory("checkpoint", KEY) / RECORD
    data = json.loads(path.read_text())
    assert data.pop("format") == 1
    path.write_text(json.dumps(data))
    assert store.load("checkpoint", KEY) == checkpoint and Path(path).is_file()
