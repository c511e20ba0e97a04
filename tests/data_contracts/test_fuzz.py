"""Whatever a file holds, its reader returns its content or raises an error of the pipeline: no other exception, no garbage.

Strategy: hypothesis makes up texts and bytes, and spoils good files: a piece cut out, doubled, overwritten.
"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_contracts.artifact import RECORD, ArtifactRecord
from data_contracts.checkpoint import check_model_directory, check_safetensors
from data_contracts.config import load_yaml
from data_contracts.errors import ArtifactError, ConfigError, ContractError, PipelineError
from data_contracts.files import bytes_from_environment
from data_contracts.lease import LockOwner, _read_state
from data_contracts.shards import read_shard, seal_path, shard_path, to_table, write_shard
from data_contracts.store import Store
from flows.config import RunConfig, load_run, parse_assignment
from stages.__main__ import _read as read_spec
from stages.running.history import events
from stages.scoring.endpoint import Reply
from stages.training.replay import replay_batch
from stages.training.resume import sealed
from tasks.data.reading import read_source
from tasks.data.source import Source

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["prompt", "messages", "role", "content", "checks"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@st.composite
def spoilt(draw, good: bytes) -> bytes:
    """A good file with one thing wrong in it."""
    start = draw(st.integers(0, len(good) - 1))
    end = min(len(good), start + draw(st.integers(0, 40)))
    middle = draw(st.sampled_from([b"", good[start:end] * 2]) | st.binary(max_size=20))
    return good[:start] + middle + good[end:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300)
@given(text=st.text(max_size=60) | st.text("{}[]:-? \n\t'\"&*!|>%@`#,abc019.~<=", max_size=40))
def test_yaml(text):
    try:
        load_yaml(text, "x.yaml")
        parse_assignment(f"a={text}")
    except ConfigError:
        pass


RUN = b"""name: tiny
policy: {path: model}
iterations: 2
prompts: {train: a.jsonl, heldout: b.jsonl}
method: {name: sppo, eta: 20}
sampling: {backend: {name: canned}, temperature: 0.7}
scoring: {scorer: {name: length}}
evaluation: {scorer: {name: length}}
"""


@settings(max_examples=150)
@given(data=spoilt(RUN))
def test_run_configs(directory, data):
    path = directory / "run.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(load_run(path), RunConfig)
    except ConfigError as error:
        assert "run.yaml" in str(error) or "extends" in str(error) or "cannot read" in str(error)


@settings(max_examples=200)
@given(lines=st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_prompts(directory, lines):
    path = directory / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        prompts = read_source(Source(path=str(path))).prompts
    except ConfigError as error:
        assert "prompts.jsonl" in str(error)
    else:
        assert to_table(list(prompts), "prompts").num_rows > 0


def generations() -> bytes:
    import io

    import pyarrow.parquet as pq

    row = {
        "prompt_id": "p", "candidate": 0, "prompt_ids": [1], "token_ids": [2, 3], "token_logps": [-1.0, -2.0], "finish_reason": "stop", "seed": 1,
        "completion": "x",
    }  # fmt: skip
    file = io.BytesIO()
    pq.write_table(to_table([row], "generations"), file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


@settings(max_examples=250)
@given(data=spoilt(generations()) | st.binary(max_size=100))
def test_shards(directory, data):
    path = shard_path(directory, 0)
    path.write_bytes(data)
    try:
        read_shard(path, "generations")
    except (ArtifactError, ContractError) as error:
        assert "part-00000.parquet" in str(error)


RECORD_BYTES = ArtifactRecord(
    kind="generations", key="k", stage="s", version="1", config={}, inputs={}, content="", files=[], rows=0
).model_dump_json(indent=1).encode()  # fmt: skip


@settings(max_examples=200)
@given(data=spoilt(RECORD_BYTES) | st.binary(max_size=60))
def test_records(directory, data):
    store = Store(directory / "store")
    directory = store.directory("generations", "k")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_bytes(data)
    try:
        record = store.load("generations", "k")
        assert (record.kind, record.key) == ("generations", "k")
    except ArtifactError as error:
        assert str(directory) in str(error)
    assert [record.key for record in store.records()] in ([], ["k"])


@settings(max_examples=200)
@given(
    data=st.binary(max_size=40)
    | st.tuples(st.integers(0, 2**64 - 1), JSON).map(
        lambda one: one[0].to_bytes(8, "little") + json.dumps(one[1]).encode()
    )
)
def test_safetensors(directory, data):
    path = directory / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="model.safetensors"):
        check_safetensors(path)


@settings(max_examples=150)
@given(
    name=st.sampled_from(
        [
            "config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
        ]
    ),
    data=st.data(),
)
def test_model_directories(directory, tiny_model, name, data):
    model = directory / "model"
    if not model.is_dir():
        shutil.copytree(tiny_model, model)
    path = model / name
    good = path.read_bytes() if path.exists() else None
    path.write_bytes(
        data.draw(
            spoilt(good or b'{"weight_map": {"a": "model.safetensors"}}')
            | JSON.map(lambda value: json.dumps(value).encode())
        )
    )
    try:
        check_model_directory(model)
    except ConfigError as error:
        assert str(model) in str(error)
    finally:
        path.unlink()
        if good is not None:
            path.write_bytes(good)


HISTORY = b'{"event": "start", "time": 1.5, "pid": 3}\n{"event": "shard", "time": 2.5, "index": 0}\n'


@settings(max_examples=150)
@given(data=spoilt(HISTORY) | st.binary(max_size=60))
def test_what_is_beside_the_data(directory, data):
    """The history of a build, a lease, the marker of a checkpoint to resume from: damaged, they say nothing."""
    for name in (".events.jsonl", "latest", "lease"):
        (directory / name).write_bytes(data)
    assert all(isinstance(event["event"], str) and event["time"] for event in events(directory))
    assert sealed(directory) is None
    assert isinstance(_read_state(directory / "lease").owner, LockOwner)


@settings(max_examples=150)
@given(value=JSON)
def test_specs_and_saved_batches(directory, value):
    for name in ("spec.json", "batch.json"):
        (directory / name).write_text(json.dumps(value))
    try:
        spec = read_spec(directory / "spec.json")
        assert isinstance(spec["inputs"], dict)
    except ConfigError as error:
        assert "spec.json" in str(error)
    with pytest.raises(PipelineError, match="holds no batch"):
        replay_batch(directory)


@settings(max_examples=200)
@given(
    body=JSON
    | JSON.map(lambda value: {"choices": [{"message": {"content": value}}]})
    | JSON.map(lambda value: {"choices": value})
)
def test_a_judges_reply_is_text(body):
    assert isinstance(Reply(body, "").text, str)


@settings(max_examples=100)
@given(text=st.text(max_size=8).filter(lambda text: "\0" not in text and text.isprintable()))
def test_amounts(text):
    import os

    os.environ["FUZZ_AMOUNT"] = text
    try:
        assert bytes_from_environment("FUZZ_AMOUNT", 3) >= 0
    except ConfigError:
        pass
    finally:
        del os.environ["FUZZ_AMOUNT"]


def test_a_seal_of_any_bytes_lets_a_whole_shard_be_read_or_made_again(tmp_path):
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([], "dropped"))
    for data in (b"", b"\xff" * 64, b"0" * 63, b"\n"):
        seal_path(path).write_bytes(data)
        try:
            read_shard(path, "dropped")
        except ArtifactError as error:
            assert "its content is not what was written" in str(error)
