"""A model directory: refused before anything loads if a part is missing, addressed by its bytes and by nothing else.

Strategy: copies of the tiny model with one file taken away; safetensors headers written by hand where a real file would
be big.
"""

import json
import os
import shutil
import struct
import time

import pytest

import data_contracts.checkpoint
from data_contracts.checkpoint import ModelRef, check_model_directory, external_model, has_chat_template, weight_files
from data_contracts.config import parse
from data_contracts.errors import ConfigError


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes) -> None:
    data = json.loads(path.read_text())
    data |= {name: value for name, value in changes.items() if value is not None}
    path.write_text(
        json.dumps({name: value for name, value in data.items() if name not in changes or changes[name] is not None})
    )


# --- complete or refused


def test_a_complete_directory_passes(model):
    check_model_directory(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: shutil.rmtree(model), "the model directory .*model does not exist"),
        (lambda model: (model / "config.json").unlink(), "has no config.json: not a Hugging Face model directory"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda model: edit(model / "config.json", architectures=None), "config.json names no `architectures`"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer file"),
        (
            lambda model: (model / "chat_template.jinja").unlink(),
            "has no chat template .*set `sampling.template: plain`",
        ),
        (lambda model: (model / "model.safetensors").unlink(), "has no \\*.safetensors weights"),
        (
            lambda model: os.truncate(model / "model.safetensors", 50_000),
            "has 50000 bytes, its header promises .* truncated or damaged",
        ),
        (lambda model: os.truncate(model / "model.safetensors", 100), "is not a readable safetensors file"),
        (lambda model: os.truncate(model / "model.safetensors", 3), "is not a readable safetensors file"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x" * 100), "is not a readable safetensors file"),
        (
            lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"),
            "is not a readable safetensors file",
        ),
    ],
    ids=[
        "directory",
        "config",
        "json",
        "architectures",
        "tokenizer",
        "template",
        "weights",
        "cut",
        "header",
        "length",
        "noise",
        "empty",
    ],
)
def test_what_is_missing_is_named(model, spoil, message):
    spoil(model)
    with pytest.raises(ConfigError, match=message):
        check_model_directory(model)


def test_a_plain_prompt_needs_no_chat_template(model):
    (model / "chat_template.jinja").unlink()
    assert not has_chat_template(model)
    check_model_directory(model, chat_template=False)


def test_a_chat_template_in_the_tokenizer_settings_counts(model):
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", chat_template="{{ messages }}")
    assert has_chat_template(model)


def test_every_shard_of_an_indexed_model_must_be_there(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(model)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with pytest.raises(
        ConfigError, match="model-00002-of-00002.safetensors is not a readable safetensors file .*No such file"
    ):
        check_model_directory(model)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ConfigError, match="does not exist"):
        check_model_directory(tmp_path / "model")


# --- named


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give exactly one of `path`"),
        ({"path": "x", "hub_id": "a/b"}, "give exactly one of `path`"),
        ({"path": "x", "revision": "main"}, "`revision` goes with `hub_id`"),
    ],
)
def test_a_model_has_one_source(data, message):
    with pytest.raises(ConfigError, match=message):
        parse(ModelRef, data, "policy")


# --- addressed


def test_the_address_is_the_content_wherever_it_lies(model, tiny_model, tmp_path):
    original, copy = external_model(tiny_model), external_model(model)
    assert original.content == copy.content and original.path != copy.path
    os.symlink(tiny_model, tmp_path / "link")
    assert external_model(tmp_path / "link") == original


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_any_byte_of_any_file_changes_the_address(model, name):
    before = external_model(model).content
    raw = bytearray((model / name).read_bytes())
    raw[-1] ^= 1
    (model / name).write_bytes(raw)
    assert external_model(model).content != before


def test_a_readme_is_no_part_of_the_model(model):
    before = external_model(model).content
    (model / "README.md").write_text("Mine.")
    assert external_model(model).content == before


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    names = []
    real = data_contracts.checkpoint.digest_file
    monkeypatch.setattr(data_contracts.checkpoint, "digest_file", lambda path: names.append(path.name) or real(path))
    return names


@pytest.fixture
def large(model):
    """A model with a file large enough to be remembered."""
    (model / "large.safetensors").write_bytes(b"\1" * (1 << 20))
    return model


def test_a_large_file_is_hashed_once(large, tmp_path, hashed):
    first = external_model(large, tmp_path / "digests")
    second = external_model(large, tmp_path / "digests")
    assert first == second == external_model(large)
    assert hashed.count("large.safetensors") == 2  # the last call had no memory


@pytest.mark.parametrize("keep_times", [False, True], ids=["edited", "edited and back-dated"])
def test_a_remembered_digest_is_not_used_for_a_changed_file(large, tmp_path, keep_times):
    path, before = large / "large.safetensors", external_model(large, tmp_path / "digests")
    stat = path.stat()
    time.sleep(0.02)  # ctime advances by jiffies
    with open(path, "r+b") as file:
        file.write(b"\2")
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = external_model(large, tmp_path / "digests")
    assert after.content != before.content
    assert after == external_model(large)


def test_a_remembered_digest_is_not_used_for_another_file_of_that_name(large, tmp_path):
    before = external_model(large, tmp_path / "digests")
    (large / "new").write_bytes(b"\2" * (1 << 20))
    os.replace(large / "new", large / "large.safetensors")
    assert external_model(large, tmp_path / "digests").content != before.content


def test_a_cut_memory_is_written_again(large, tmp_path):
    good = external_model(large, tmp_path / "digests")
    for memo in (tmp_path / "digests").iterdir():
        memo.write_text("abc")
    assert external_model(large, tmp_path / "digests") == good
