"""The key of an artifact: what is in it, what is not, and that it is one key everywhere.

Strategy: a small nested config stands for the stages' own. One key is computed here by hand from the text that is
hashed; another process with another hash seed computes one again; hypothesis looks for values that do not survive.
"""

import hashlib
import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_contracts.config import Config, Runtime
from data_contracts.errors import ConfigError
from data_contracts.identity import KEY_LENGTH, canonical_json, fingerprint

ROOT = Path(__file__).resolve().parents[2]


class HowToRun(Runtime):
    batch_size: int = 8


class Inner(Config):
    dtype: str = "float32"
    runtime: HowToRun = HowToRun()


class Outer(Config):
    temperature: float = 1.0
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    runtime: HowToRun = HowToRun()


class OuterWithANewField(Outer):
    NEUTRAL = {"floor": None}  # noqa: RUF012
    floor: float | None = None


def key(config, **inputs: str) -> str:
    return fingerprint("sample", "1", config, inputs)


def test_a_key_is_the_hash_of_stage_version_settings_and_inputs():
    text = '{"config":{"k":5,"name":"é"},"inputs":{"prompts":"ab12"},"stage":"sample","version":"1"}'
    assert key({"name": "é", "k": 5}, prompts="ab12") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert KEY_LENGTH == 16


def test_every_part_of_a_recipe_changes_the_key():
    keys = {
        fingerprint("sample", "1", {"k": 5}, {"prompts": "ab"}),
        fingerprint("score", "1", {"k": 5}, {"prompts": "ab"}),
        fingerprint("sample", "2", {"k": 5}, {"prompts": "ab"}),
        fingerprint("sample", "1", {"k": 6}, {"prompts": "ab"}),
        fingerprint("sample", "1", {"k": 5}, {"prompts": "cd"}),
        fingerprint("sample", "1", {"k": 5}, {"policy": "ab"}),
    }
    assert len(keys) == 6


@pytest.mark.parametrize(
    "config",
    [
        Outer(runtime=HowToRun(batch_size=9)),
        Outer(inner=Inner(runtime=HowToRun(batch_size=9))),
    ],
    ids=["own", "nested"],
)
def test_a_runtime_setting_does_not_change_the_key(config):
    assert key(config) == key(Outer())


def test_a_runtime_setting_inside_a_list_of_configs_does_not_change_the_key():
    parts = [Outer(parts=(Inner(runtime=HowToRun(batch_size=size)),)) for size in (1, 9)]
    assert key(parts[0]) == key(parts[1]) != key(Outer())


@pytest.mark.parametrize(
    "config", [Outer(temperature=0.7), Outer(inner=Inner(dtype="bfloat16")), Outer(parts=(Inner(),))]
)
def test_any_other_setting_changes_the_key(config):
    assert key(config) != key(Outer())


def test_a_field_added_later_keeps_old_keys_at_its_neutral_value_only():
    assert key(OuterWithANewField()) == key(Outer())
    assert key(OuterWithANewField(floor=-2.0)) != key(Outer())


def test_one_and_one_point_zero_are_the_same_setting():
    assert key({"temperature": 1}) == key({"temperature": 1.0})
    assert key(Outer(temperature=1)) == key(Outer(temperature=1.0))
    assert canonical_json(-0.0) == "0" and canonical_json(0.5) == "0.5" and canonical_json(1e300) == "1e+300"


def test_true_is_not_one():
    assert key({"reuse": True}) != key({"reuse": 1})


def test_the_order_in_which_settings_are_written_does_not_matter():
    left, right = {"a": 1, "b": {"x": 1, "y": [2]}}, {"b": {"y": [2], "x": 1}, "a": 1}
    assert key(left) == key(right)
    assert fingerprint("s", "1", {}, {"a": "1", "b": "2"}) == fingerprint("s", "1", {}, {"b": "2", "a": "1"})


def test_the_order_of_a_list_matters():
    assert key({"tasks": ["a", "b"]}) != key({"tasks": ["b", "a"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_place(value):
    with pytest.raises(ValueError, match=r"\$\.config\.inner\.x\[1\] is (nan|inf|-inf)"):
        key({"inner": {"x": [1, value]}})
    with pytest.raises(ValidationError, match="finite"):
        Outer(temperature=value)


@pytest.mark.parametrize(
    "value", [len, lambda: 1, object(), {1, 2}, b"bytes", 1j, Path("x"), Config], ids=lambda value: type(value).__name__
)
def test_what_another_process_would_write_differently_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match=r"\$\.config\.scorer is a .*, which cannot be part of an identity"):
        key({"scorer": value})


def test_a_key_that_is_not_text_is_refused():
    with pytest.raises(TypeError, match=r"\$\.config\.weights has the key 1 of type int"):
        key({"weights": {1: 0.5}})


def test_another_process_computes_the_same_key():
    code = (
        "from data_contracts.identity import fingerprint\n"
        "print(fingerprint('sample', '1', {'stop': ['é', None, True], 'a': {'z': 0.1, 'b': 1e-7}}, {'p': 'x', 'a': 'y'}))"
    )
    expected = fingerprint("sample", "1", {"a": {"b": 1e-7, "z": 0.1}, "stop": ["é", None, True]}, {"a": "y", "p": "x"})
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_a_key_survives_the_record_it_is_written_to(value):
    # verify and explain compute it again from record.json.
    assert canonical_json(json.loads(json.dumps(value))) == canonical_json(value)


def test_a_setting_chosen_from_an_enumeration_is_its_value_or_refused():
    class Plain(Enum):
        A = "a"

    with pytest.raises(TypeError):
        key({"x": Plain.A})


def test_an_unknown_setting_is_refused_and_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Outer(temprature=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        Outer().temperature = 2.0


def test_every_problem_of_a_config_is_a_line_with_its_dotted_path():
    from data_contracts.config import parse

    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"temperature": "hot", "inner": {"dtpye": "x"}}, "run.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "run.yaml cannot be used because of 2 problems:"
    assert lines[1].startswith("  temperature: Input should be a valid number") and lines[1].endswith("(got 'hot')")
    assert lines[2] == "  inner.dtpye: unknown key; did you mean dtype?"
