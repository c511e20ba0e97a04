"""A request whose prompts passed the tokenizer's check is not asked again, and any other is.

Strategy: the process that asks is counted instead of started; whole run configs go through `preflight`, forgotten between tries as by a new process.
"""

import json

import pytest

import flows.preflight
import tasks.data.lengths
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import load_run
from flows.preflight import preflight

NOTHING_WRONG = {"overlong": {}, "truncated": {}, "dropped": {}, "unusable": {}}


@pytest.fixture
def ask(make_run, tmp_path, monkeypatch):
    """ask(**settings) -> how often a tokenizer was asked by one more command."""
    state = {"asked": 0, "code": 0}

    def answer(python, request):
        state["asked"] += 1
        content = "a prompt is too long" if state["code"] else [NOTHING_WRONG, NOTHING_WRONG]
        request.with_name("answer.json").write_text(json.dumps(content))
        return state["code"], ""

    monkeypatch.setattr(tasks.data.lengths, "run_check", answer)

    def once(code: int = 0, **overrides) -> int:
        before, state["code"] = state["asked"], code
        flows.preflight._preflight.cache_clear()
        preflight(load_run(make_run("checked"), overrides), Store(tmp_path / "store"))
        return state["asked"] - before

    return once


def test_a_check_alone_makes_no_store_and_remembers_nothing(ask, tmp_path):
    assert ask() == 1 and ask() == 1
    assert not (tmp_path / "store").exists()


def test_the_same_request_is_asked_once_in_a_store_and_another_one_again(ask, tmp_path):
    (tmp_path / "store").mkdir()
    assert ask() == 1 and ask() == 0
    assert ask(**{"sampling.max_new_tokens": 7}) == 1


def test_a_request_that_was_refused_is_asked_again(ask, tmp_path):
    (tmp_path / "store").mkdir()
    for _ in range(2):
        with pytest.raises(ConfigError, match="too long"):
            ask(code=ConfigError.exit_code)
    assert ask() == 1
