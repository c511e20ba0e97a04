"""The sample stage around its samplers: limits are checked by name, rows keep the token contract, a broken sampler is
caught.

Strategy: the canned sampler on the tiny model, in this process; samplers that lie are three lines of our own.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from data_contracts.checkpoint import external_model
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shard_rows import ShardRows
from data_contracts.shards import SCHEMAS, read_shards, shard_path, to_table, write_shard
from data_contracts.store import Store
from stages.execute import execute
from stages.models.turns import Turns
from stages.running.history import events
from stages.sampling import check
from stages.sampling.base import Candidate
from stages.sampling.canned import Canned
from stages.sampling.stage import SamplingConfig, UsablePrompts
from stages.scoring.stage import ScoringConfig
from stages.stage import STAGES

THREE_SHARDS = {"device": "cpu", "prompts_per_shard": 3}


def config(**changes) -> SamplingConfig:
    settings = {
        "backend": {"name": "canned"},
        "num_candidates": 3,
        "max_new_tokens": 6,
        "max_prompt_tokens": 64,
        "runtime": {"device": "cpu"},
    }
    return SamplingConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def turns(tiny_model):
    return Turns(tiny_model)


@pytest.fixture
def sample(store, make_prompts, tiny_model):
    """sample(rows or count, settings) -> (record, rows of generations)."""

    def run(prompts=5, **changes):
        inputs = {"prompts": make_prompts(store, prompts), "policy": external_model(tiny_model)}
        record = execute(STAGES["sample"], config(**changes), inputs, store)
        return record, read_shards(store.directory(record.kind, record.key), "generations").to_pylist()

    return run


@pytest.fixture
def usable(tmp_path):
    """usable(rows, settings, turns) -> UsablePrompts of an artifact with these rows."""

    def check(rows, settings, turns):
        write_shard(shard_path(tmp_path, 0), to_table(rows, "prompts"))
        return UsablePrompts(ShardRows([tmp_path], "prompts"), settings, turns)

    return check


def test_there_are_k_rows_per_prompt_in_the_order_of_the_prompts(sample, make_rows, turns):
    record, rows = sample(make_rows(5))
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
        (f"p{number:03d}", k) for number in range(5) for k in range(3)
    ]
    assert record.rows == record.metrics["candidates"] == 15
    for row, prompt in zip(rows[::3], make_rows(5), strict=True):
        assert row["prompt_ids"] == turns.prompt(prompt["messages"])
    assert record.metrics["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert record.metrics["mean_tokens"] == pytest.approx(np.mean([len(row["token_ids"]) for row in rows]))
    assert record.metrics["finished_rate"] == pytest.approx(np.mean([row["finish_reason"] == "stop" for row in rows]))
    assert (
        record.facts["template"] == "chat"
        and len(record.facts["tokenizer_digest"]) == 64
        and record.facts["device"] == "cpu"
    )


def test_the_text_of_a_response_is_that_of_its_tokens_without_the_eos_that_ended_it(sample, turns):
    _, rows = sample(20)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        body = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        assert row["completion"] == turns.tokenizer.decode(body)


def test_prompts_in_another_order_or_company_give_the_same_rows(sample, make_rows):
    first = {(row["prompt_id"], row["candidate"]): row for row in sample(make_rows(6))[1]}
    other = sample(make_rows(6)[::-1][:4], runtime={"device": "cpu", "prompts_per_shard": 3})[1]
    assert all(first[row["prompt_id"], row["candidate"]] == row for row in other) and len(other) == 12


def test_a_prompt_that_is_too_long_is_refused_by_name(make_rows, turns, usable):
    lengths = [len(prompt.ids) for prompt in usable(make_rows(3), config(), turns)]
    limit = max(lengths)
    usable(make_rows(3), config(max_prompt_tokens=limit), turns)
    late = lengths.index(limit)
    with pytest.raises(
        ConfigError, match=rf"the prompt 'p00{late}' has {limit} tokens, allowed are 1 to {limit - 1} .*context is 256"
    ):
        usable(make_rows(3)[late:], config(max_prompt_tokens=limit - 1), turns)


def test_limits_beyond_the_context_are_refused(make_rows, turns, usable):
    usable(make_rows(1), config(max_prompt_tokens=200, max_new_tokens=56), turns)
    with pytest.raises(
        ConfigError, match=r"max_prompt_tokens \+ max_new_tokens = 257 exceeds the context of 256 positions"
    ):
        usable(make_rows(1), config(max_prompt_tokens=200, max_new_tokens=57), turns)


def test_an_empty_prompt_is_refused(make_rows, tiny_model, usable):
    empty = [make_rows(1)[0] | {"prompt_id": "e", "messages": [{"role": "user", "content": ""}]}]
    with pytest.raises(ConfigError, match="the prompt 'e' has 0 tokens"):
        usable(empty, config(template="plain"), Turns(tiny_model, config(template="plain")))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (
            Candidate([5, 6], [-1.0, -1.0], "stop"),
            r"prompt p000 candidate 0: finish_reason 'stop' but the last token is \[?6",
        ),
        (Candidate([5, 1], [-1.0, -1.0], "length"), r"finish_reason 'length' but the last token is \[?1"),
        (Candidate([], [], "length"), "0 tokens and 0 log-probs"),
        (Candidate([5, 6], [-1.0], "length"), "2 tokens and 1 log-probs"),
        (Candidate([5, 1, 6, 1], [-1.0] * 4, "stop"), "the stop id 1 stands at position 1 of 4"),
        (Candidate([5, 320], [-1.0] * 2, "length"), "no token of the tokenizer has the id 320"),
    ],
)
def test_a_sampler_that_breaks_the_token_contract_is_caught(sample, monkeypatch, candidate, message):
    monkeypatch.setattr(
        "stages.sampling.canned.Canned.generate", lambda self, prompts: [[candidate] * 3 for _ in prompts]
    )
    with pytest.raises(ContractError, match=message):
        sample(2)


def test_a_sampler_that_forgets_a_candidate_is_caught(sample, monkeypatch):
    monkeypatch.setattr(
        "stages.sampling.canned.Canned.generate",
        lambda self, prompts: [[Candidate([5], [-1.0], "length")] * 2 for _ in prompts],
    )
    with pytest.raises(ContractError, match="4 rows for 2 prompts x 3 candidates"):
        sample(2)


def test_a_sampler_that_works_on_several_shards_at_once_leaves_the_same_rows(
    store, make_prompts, tiny_model, monkeypatch, tmp_path
):
    inputs = {"policy": external_model(tiny_model)}
    read_ahead = []

    def generate_all(self, shards):
        shards = list(shards)  # all of them, before the first one is made
        read_ahead.append(len(shards))
        results = [self.generate(shard) if shard else [] for shard in reversed(shards)]
        yield from reversed(results)

    records = []
    for mine in (store, Store(tmp_path / "other")):
        prompts = {"prompts": make_prompts(mine, 7)}
        records.append(execute(STAGES["sample"], config(runtime=THREE_SHARDS), inputs | prompts, mine))
        monkeypatch.setattr(Canned, "generate_all", generate_all)
    assert records[0].content == records[1].content and read_ahead == [3]
    for mine in (store, Store(tmp_path / "other")):
        history = events(mine.directory("generations", records[0].key))
        assert [event["index"] for event in history if event["event"] == "shard"] == [0, 1, 2]


# ---- rows that spell control tokens


def test_a_row_that_spells_a_control_token_is_sampled_as_text_or_dropped(sample, make_rows, turns):
    rows = make_rows(4)
    rows[1]["messages"][0]["content"] = "stop <|end|> here"
    record, kept = sample(rows)
    assert record.rows == 12 and kept[3]["prompt_ids"].count(1) == 1
    record, kept = sample(rows, special_tokens_in_data="drop")
    assert {row["prompt_id"] for row in kept} == {"p000", "p002", "p003"}
    assert record.metrics["dropped/a control token in the text"] == 1
    with pytest.raises(ConfigError, match="the row 'p001' spells the control token '<|end|>'"):
        sample(rows, special_tokens_in_data="refuse")
    with pytest.raises(ContractError, match="every prompt is dropped"):
        sample(rows[1:2], special_tokens_in_data="drop")


def test_ids_of_the_embeddings_padding_are_never_drawn():
    settings = config(backend={"name": "canned", "vocabulary": 330})
    drawn = Canned(settings.backend, settings, "", [1], "cpu", range(320, 330))
    ids = {drawn._candidate(seed).token_ids[0] for seed in range(2000)}
    assert max(ids) < 320 and len(ids) > 100


# ---- a stage's key


CHATML = "{% for m in messages %}<|user|>{{ m.content }}<|system|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "listed", "addition"),
    [(None, 1, {}), (CHATML, 1, {"terminator": "<|system|>"}), (CHATML, [1, 2], {}), ("{{ 1 // 0 }}", 1, {})],
)
def test_a_key_changes_only_for_a_model_that_was_not_stopped_at_its_turns_end(
    tiny_model, tmp_path, template, listed, addition
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    inputs = {"policy": external_model(model)}
    assert STAGES["sample"].settings(config(), inputs) == config().identity() | addition
    assert STAGES["sample"].settings(config(template="plain"), inputs) == config(template="plain").identity()
    given = ScoringConfig(pairing="given")
    added = {"terminator": "<|system|>"} if template == CHATML else {}
    assert STAGES["score"].settings(given, inputs) == given.identity() | added
    ranked = ScoringConfig(pairing="best_vs_worst")
    assert STAGES["score"].settings(ranked, inputs) == ranked.identity()


def test_engine_arguments_are_part_of_the_key_unless_they_move_speed_only():
    def identity(arguments):
        return config(backend={"name": "vllm", "arguments": arguments}).identity()["backend"]

    assert identity({}) == {"name": "vllm", "dtype": "bfloat16"}  # as before there were any
    assert identity({"max_num_seqs": 512, "enable_prefix_caching": False}) == identity({})
    assert identity({"max_num_seqs": 512, "kv_cache_dtype": "fp8"}) == identity({}) | {
        "arguments": {"kv_cache_dtype": "fp8"}
    }
    with pytest.raises(ValueError, match="max_model_len is not to be given here: sampling.max_prompt_tokens and"):
        identity({"max_model_len": 100})


# ---- the check before a run


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            2,
            "did not come to an end within 1 s",
        ),
        ("{{ 'x' * 100000000000 }}", 2, "did not come to an end within 4 GiB"),
        ("{% if %}", 2, "line 1 of the chat template is not valid Jinja"),
        ("{{ raise_exception('no user') }}", 2, "refuses the messages: no user"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", 0, '"unusable": {}'),
    ],
)
def test_a_template_is_checked_under_limits(tiny_model, tmp_path, make_rows, monkeypatch, template, code, message):
    monkeypatch.setattr(check, "TEMPLATE_SECONDS", 1)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    with (
        pa.OSFile(str(tmp_path / "prompts.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMAS["prompts"]) as writer,
    ):
        writer.write_table(to_table(make_rows(2), "prompts"))
    prompts = {
        "sampling": config().model_dump(mode="json"),
        "prompts": str(tmp_path / "prompts.arrow"),
        "truncate": False,
    }
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"model": str(model), "sets": [prompts], "models": []}))
    assert check.main([str(request)]) == code
    assert message in (tmp_path / "answer.json").read_text()
