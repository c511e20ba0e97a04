"""What a teacher reads: its own template, no control token of the student's, and its own terminator at the end.

Strategy: ids only, with real tokenizers (each loaded once) and no model; and two whole weigh stages on the tiny model, for numbers.
"""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import stages.models.turns as turns_module
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.errors import ConfigError
from data_contracts.shards import read_shards
from stages.execute import execute
from stages.models.tokens import load_tokenizer
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns
from stages.stage import STAGES
from stages.weighting.stage import WeightingConfig
from stages.weighting.teacher import TeacherView

NAMES = ("qwen1.5-base", "llama-2", "mistral-7b-v0.1", "llama-3-8b-instruct-early", "gemma-3", "gpt2")
LIGHT = ("qwen1.5-base", "mistral-7b-v0.1", "gpt2")
"""Those that are read in a second."""
MESSAGES = [{"role": "user", "content": "Say <|im_end|> or </s>, it is text."}]
ANSWER = "We say <|im_end|>, <|eot_id|>\n</s>  and 9 more."


def directory_of(name: str, shared, tmp_path):
    """A directory with the tokenizer of that name; GPT-2's is a bare tokenizer.json, which needs a config beside it."""
    directory = shared / "data" / "tokenizers" / name
    if name != "gpt2":
        return directory
    copy = shutil.copytree(directory, tmp_path / name, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    return copy


@pytest.fixture(scope="module")
def loaded():
    """load_tokenizer that remembers: six of them are 60 MB of JSON."""
    return functools.cache(load_tokenizer)


def view(student, teacher, teacher_prompt="auto", template="chat", system=None) -> TeacherView:
    """A TeacherView of two directories; nothing is scored."""
    refs = {
        name: ArtifactRef(kind="checkpoint", key="external", path=str(path), content=name)
        for name, path in (("reference", student), ("teacher", teacher))
    }
    config = WeightingConfig(weights={"name": "swift", "teacher_prompt": teacher_prompt}, template=template)
    job = SimpleNamespace(
        inputs=refs | {"prompts": None}, config=config, store_root=student, path=lambda name: refs[name].path
    )
    return TeacherView(job, scored=False, unshifted=False)


@pytest.mark.parametrize(
    ("student_name", "teachers"),
    [
        *((name, LIGHT) for name in LIGHT),
        *(pytest.param(name, NAMES, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_the_teacher_reads_its_own_template_and_no_token_of_the_students(
    shared, tmp_path, loaded, monkeypatch, student_name, teachers
):
    monkeypatch.setattr(turns_module, "load_tokenizer", loaded)
    messages = SimpleNamespace(of=lambda prompt_ids: dict.fromkeys(prompt_ids, MESSAGES))
    monkeypatch.setattr("stages.weighting.teacher.MessagesByPrompt", lambda job: messages)
    student = turns_module.turns_or_plain(directory_of(student_name, shared, tmp_path), TurnConfig())
    row = {"prompt_id": "p", "prompt_ids": student.prompt(MESSAGES)}
    row |= {"chosen_ids": student.response(ANSWER), "rejected_ids": student.response(ANSWER)[:-1]}
    for teacher_name in teachers:
        directory = directory_of(teacher_name, shared, tmp_path)
        for teacher_prompt in ("auto", "raw"):
            looked = view(student.directory, directory, teacher_prompt, student.settings.template)
            prompts, responses = looked.responses([row])
            teacher = looked.teacher
            text = "<|im_end|>"
            controls = [number for number in prompts[0] if number in teacher.control_ids]
            if teacher_prompt == "auto" and student.chat is not None and teacher.chat is not None:
                assert prompts[0] == Turns(directory, TurnConfig(), teacher.tokenizer).prompt(MESSAGES)
                empty = teacher.prompt([{"role": "user", "content": "x"}])
                assert controls == [number for number in empty if number in teacher.control_ids]
            else:  # the text alone, behind the teacher's own BOS
                assert controls == teacher.opening
                assert prompts[0][: len(teacher.opening)] == teacher.opening
                said = teacher.tokenizer.decode(prompts[0][len(teacher.opening) :])
                assert text in said and "<|im_start|>" not in said and "<start_of_turn>" not in said
                assert not said.startswith(("<s>", "<bos>", "<|begin_of_text|>"))
            assert responses[0][-1] == teacher.terminator
            assert [number for number in responses[0] if number in teacher.control_ids] == [teacher.terminator]
            assert not set(responses[1]) & teacher.control_ids
            assert teacher.tokenizer.decode(responses[1]).strip() == ANSWER


@pytest.fixture
def weigh(store, make_prompts, make_artifact, make_rows, tiny_model):
    """weigh(teacher directory, template, weights) -> rows of weighted_pairs of the tiny model's own prompts and answers."""

    def run(teacher, template="chat", **weights):
        turns = Turns(tiny_model, TurnConfig(template=template))
        rows = make_rows(6)
        pairs = [
            {
                "pair_id": f"{row['prompt_id']}/0-1",
                "prompt_id": row["prompt_id"],
                "prompt_ids": turns.prompt(row["messages"]),
                "chosen_ids": turns.response(f"{row['response']} <|user|>"),
                "rejected_ids": turns.response(row["response"] * 2)[:-1],
                "chosen": row["response"],
                "rejected": row["response"] * 2,
                "scorer": "none",
                "win_rate_chosen": 1.0,
                "win_rate_rejected": 0.0,
                "chosen_candidate": -1,
                "rejected_candidate": 0,
                **dict.fromkeys(("group_scores", "group_win_rates", "score_chosen", "score_rejected")),
            }
            for row in rows
        ]
        inputs = {
            "pairs": make_artifact(store, "scored_pairs", pairs),
            "prompts": make_prompts(store, rows),
            "reference": external_model(tiny_model),
            "teacher": external_model(teacher),
        }
        config = WeightingConfig.model_validate(
            {"weights": {"name": "swift", "k": 1.25, **weights}, "dtype": "float32", "template": template}
        )
        record = execute(STAGES["weigh"], config, inputs, store)
        return read_shards(store.directory(record.kind, record.key), "weighted_pairs").to_pylist()

    return run


@pytest.mark.parametrize(
    ("template", "teacher_prompt"),
    [("chat", "auto"), ("chat", "chat_template"), ("plain", "auto"), ("plain", "raw")],
)
def test_a_teacher_that_is_the_student_gives_every_token_the_weight_k(weigh, tiny_model, template, teacher_prompt):
    rows = weigh(tiny_model, template, teacher_prompt=teacher_prompt)
    for row in rows:
        for side in ("chosen", "rejected"):
            assert np.array_equal(row[f"{side}_weights"], np.full(len(row[f"{side}_ids"]), 1.25, dtype=np.float32))


def test_models_with_equal_weights_that_end_turns_otherwise_differ_in_the_last_token_only(weigh, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    assert "<|end|>" in template
    (other / "generation_config.json").unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "<|system|>"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = weigh(other, "plain", teacher_prompt="raw")
    for row in rows:
        weights = np.asarray(row["chosen_weights"])
        assert np.all(weights[:-1] == 1.25) and weights[-1] != 1.25
        assert np.all(np.asarray(row["rejected_weights"]) == 1.25)  # it was cut


def test_a_teacher_without_a_template_is_named_where_one_is_asked_for(tiny_model, tmp_path, monkeypatch):
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setattr("stages.weighting.teacher.MessagesByPrompt", lambda job: None)
    assert view(tiny_model, bare).teacher.chat is None
    with pytest.raises(ConfigError, match=r"has no chat template, and weights.teacher_prompt is chat_template"):
        view(tiny_model, bare, "chat_template")


def test_a_key_changes_only_where_a_teacher_is_read():
    key = STAGES["weigh"].key
    assert key(WeightingConfig(), {}) == key(WeightingConfig(system="keep"), {})
    assert STAGES["weigh"].settings(WeightingConfig(weights={"name": "swift"}), {})["teacher_view"] == 2
    assert STAGES["weigh"].settings(WeightingConfig(teacher_tokens=True), {})["teacher_view"] == 2
    thinking = WeightingConfig(teacher_tokens=True, template_kwargs={"enable_thinking": False})
    assert STAGES["weigh"].settings(thinking, {})["teacher_view"] == 3
    assert "teacher_view" not in STAGES["weigh"].settings(WeightingConfig(weights={"name": "tis_dpo"}), {})
