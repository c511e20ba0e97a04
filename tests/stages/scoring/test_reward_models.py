"""Reward models, pair encoders, ArmoRM and the teacher's log-probs, on tiny random weights.

Strategy: each score is computed once more in the plainest way - one text, no padding, one forward, formulas written out
- and compared.
"""

# ruff: noqa: RUF001 - full-width letters and signs are part of the cases

import json
import math
import shutil

import numpy as np
import pytest
import torch

from data_contracts.errors import ConfigError, ContractError
from stages.scoring import SCORERS
from stages.scoring.armorm import last_occurrence
from stages.scoring.base import Services
from stages.scoring.reward_model import CUT

ANSWERS = ["the sea", "a fox jumps over the lazy dog and then over another one, for sure", "wood", ""]


def conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model):
    """A Llama with a score head; no padding id, as many released ones."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("rm") / "llama"
    shutil.copytree(tiny_model, directory)
    (directory / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=2, pad_token_id=None)
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return directory


def plain_reward(directory, prompt, answer, output=0, limit=None):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    ids = tokenizer(
        tokenizer.apply_chat_template(conversation(prompt, answer), tokenize=False), add_special_tokens=False
    ).input_ids
    model = AutoModelForSequenceClassification.from_pretrained(str(directory)).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids[-limit:] if limit else ids])).logits[0, output])


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_a_reward_model_scores_as_if_each_text_were_alone(scoring, reward_model, budget):
    scorer = scoring.scorer({"name": "reward_model", "model": {"path": str(reward_model)}, "output": 1}, budget)
    (scores,) = scorer.score([scoring.candidates("Say a word.", ANSWERS)])
    expected = [plain_reward(reward_model, "Say a word.", answer, 1) for answer in ANSWERS]
    assert np.abs(scores.scores - expected).max() < 1e-5 and scores.preference_logits is None


def test_prompts_with_different_numbers_of_candidates(scoring, reward_model):
    scorer = scoring.scorer({"name": "reward_model", "model": {"path": str(reward_model)}})
    found = scorer.score([scoring.candidates(f"Say {k}.", ANSWERS[:k]) for k in (1, 3, 2)])
    assert [len(scores.scores) for scores in found] == [1, 3, 2]
    assert found[1].scores[2] == pytest.approx(plain_reward(reward_model, "Say 3.", "wood"), abs=1e-5)


def test_what_is_too_long_loses_the_beginning_of_its_prompt(scoring, reward_model):
    settings = {"name": "reward_model", "model": {"path": str(reward_model)}, "max_tokens": 24, "max_cut_share": 1}
    (scores,) = scoring.scorer(settings).score([scoring.candidates("Once upon a time, " * 5, ["the end"])])
    assert scores.scores[0] == pytest.approx(
        plain_reward(reward_model, "Once upon a time, " * 5, "the end", limit=24), abs=1e-5
    )
    (other,) = scoring.scorer(settings).score(
        [scoring.candidates("In another world, but " + "Once upon a time, " * 5, ["the end"])]
    )
    assert other.scores[0] == pytest.approx(scores.scores[0], abs=1e-6)
    assert other.reasons == scores.reasons == [CUT]


def test_the_role_mark_stays_before_an_answer_that_is_too_long(scoring, reward_model):
    settings = {"name": "reward_model", "model": {"path": str(reward_model)}, "max_tokens": 24, "max_cut_share": 1}
    scorer = scoring.scorer(settings)
    scorer.score([scoring.candidates("p", ["a"])])  # loads
    prompt = [{"role": "user", "content": "Say a word."}]
    whole = scorer.encode(prompt, "wood " * 3)
    assert not whole.is_cut and HEADER[0] in whole.ids
    cut = scorer.encode(prompt, "wood " * 60)
    assert cut.is_cut and len(cut.ids) == 24
    assert cut.ids[0] == HEADER[0] and HEADER[0] not in cut.ids[1:]
    assert cut.ids[1:] == scorer.turns.conversation(conversation("Say a word.", "wood " * 60))[-23:]


@pytest.mark.parametrize(("question", "share", "is_refused"), [(200, 0.1, True), (200, 0.5, False), (2, 0.0, False)])
def test_texts_that_are_cut_are_counted_and_too_many_refused(
    reward_model, tmp_path, scoring, question, share, is_refused
):
    lines = []
    scorer = SCORERS.get("reward_model")(
        SCORERS.config(
            {"name": "reward_model", "model": {"path": str(reward_model)}, "max_tokens": 64, "max_cut_share": share}
        ),
        "cpu",
    )
    scorer.prepare(Services(tmp_path, 1000, lines.append))
    batch = [scoring.candidates("word " * question, ["the sea"]), scoring.candidates("Say a word.", ["wood"])]
    if is_refused:
        with pytest.raises(ConfigError, match=r"1 of 2 texts .* 64 tokens .*max_cut_share"):
            scorer.score(batch)
        return
    first, second = scorer.score(batch)
    is_cut = question == 200
    assert first.reasons == [CUT if is_cut else ""] and second.reasons == [""]
    assert scorer.metrics() == ({"cut_texts": 1.0} if is_cut else {})
    assert len(lines) == is_cut and all("lose the beginning" in line for line in lines)


def test_a_model_without_a_trained_head_is_refused(scoring, tiny_model):
    with pytest.raises(ConfigError, match="it is no reward model"):
        scoring.scorer({"name": "reward_model", "model": {"path": str(tiny_model)}}).score(
            [scoring.candidates("p", ["a"])]
        )


def test_an_output_that_is_not_there_is_refused(scoring, reward_model):
    with pytest.raises(ConfigError, match="has 2 output"):
        scoring.scorer({"name": "reward_model", "model": {"path": str(reward_model)}, "output": 2}).score(
            [scoring.candidates("p", ["a"])]
        )


def test_a_model_with_code_of_its_own_is_refused_unless_switched_on(reward_model, tmp_path):
    shutil.copytree(reward_model, tmp_path / "rm")
    settings = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "theirs.Model"}}))
    config = SCORERS.config({"name": "reward_model", "model": {"path": str(tmp_path / "rm")}})
    with pytest.raises(ConfigError, match="trust_remote_code"):
        SCORERS.get("reward_model").check_prompts(config, [])
    SCORERS.get("reward_model").check_prompts(config.model_copy(update={"trust_remote_code": True}), [])


@pytest.mark.parametrize("name", ["reward_model", "pair_encoder"])
def test_prompts_that_leave_no_room_for_an_answer_are_refused_before_anything_is_sampled(
    reward_model, encoder, scoring, name
):
    directory = {"reward_model": reward_model, "pair_encoder": encoder}[name]
    settings = {"name": name, "model": {"path": str(directory)}, "max_tokens": 64}
    prompts = [scoring.candidates(text, ["a"]).prompt for text in ("look down " * 60, "look down", "oil", "sea")]
    check = SCORERS.get(name).check_prompts
    with pytest.raises(ConfigError, match=r"1 of 4 prompts have 64 tokens and more.*max_cut_share = 0\.1"):
        check(SCORERS.config(settings), prompts)
    check(SCORERS.config(settings | {"max_cut_share": 0.25}), prompts)
    check(SCORERS.config(settings | {"max_tokens": 2000}), prompts)
    check(SCORERS.config(settings), prompts[1:])


def test_damaged_weights_are_no_score(scoring, reward_model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(reward_model, tmp_path / "rm")
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    tensors["score.weight"][:] = math.nan
    save_file(tensors, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContractError, match="NaN or infinity"):
        scoring.scorer({"name": "reward_model", "model": {"path": str(tmp_path / "rm")}}).score(
            [scoring.candidates("p", ["a"])]
        )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, checkpoints):
    """A DeBERTa-v2 classifier, like OpenAssistant's."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    directory = tmp_path_factory.mktemp("rm") / "deberta"
    config = json.loads((checkpoints["backbone"] / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "architectures"}
    torch.manual_seed(4)
    DebertaV2ForSequenceClassification(DebertaV2Config(**config, num_labels=1)).save_pretrained(directory)
    shutil.copy(checkpoints["backbone"] / "spm.model", directory)
    return directory


@pytest.mark.parametrize(("limit", "cut"), [(None, False), (20, True)])
def test_a_pair_encoder_reads_prompt_and_answer(scoring, encoder, limit, cut):
    from transformers import AutoModelForSequenceClassification

    scorer = scoring.scorer(
        {"name": "pair_encoder", "model": {"path": str(encoder)}, "max_tokens": limit, "max_cut_share": 1}, 64
    )
    prompt, answers = "what can people find in the water now", ["oil", "the ｆirst number", "", "look down " * 30]
    (scores,) = scorer.score([scoring.candidates(prompt, answers)])
    model, room = AutoModelForSequenceClassification.from_pretrained(str(encoder)).eval(), (limit or 10_000) - 3
    backend = scorer.tokenizer.backend
    for answer, score in zip(answers, scores.scores, strict=True):
        end = backend.encode(answer, add_special_tokens=False).ids[-room:]
        start = backend.encode(prompt, add_special_tokens=False).ids
        start = start[len(start) - min(len(start), room - len(end)) :]
        ids = [1, *start, 2, *end, 2]
        assert not cut or len(ids) <= 20
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=torch.tensor([ids])).logits[0, 0]), abs=1e-5)
    # The NFKC map that transformers 5 drops: full-width letters are letters.
    assert backend.encode("ｆirst").ids[1:-1] == backend.encode("first").ids[1:-1]


HEADER = [4]
"""<|assistant|> of the tiny tokenizer."""


@pytest.fixture(scope="module")
def armo(tmp_path_factory, tiny_model):
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("rm") / "armo"
    shutil.copytree(tiny_model, directory)
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {
        key: value for key, value in load_file(directory / "model.safetensors").items() if key.startswith("model.")
    }
    sizes = [64, 16, 16, 16, 19]
    tensors |= {f"gating.layers.{i}.weight": normal(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5 for i in range(4)}
    tensors |= {f"gating.layers.{i}.bias": normal(sizes[i + 1]) for i in range(4)}
    tensors |= {
        "gating.logit_scale": torch.tensor([1.7]),
        "regression_layer.weight": normal(19, 64),
        "reward_transform_matrix": normal(19, 19),
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 16, "gating_n_hidden": 3}
    settings |= {"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Gone"}}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def armo_settings(directory, **more):
    return {"name": "armorm", "model": {"path": str(directory)}, "assistant_header": HEADER, "dtype": "float32"} | more


@pytest.mark.parametrize("budget", [1, 10_000])
def test_armorm_by_its_formulas(scoring, armo, budget):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    (scores,) = scoring.scorer(armo_settings(armo), budget).score([scoring.candidates("Say a word.", ANSWERS)])
    t = load_file(armo / "model.safetensors")
    llama = LlamaModel(
        LlamaConfig(**{k: v for k, v in json.loads((armo / "config.json").read_text()).items() if k != "auto_map"})
    )
    llama.load_state_dict({k.removeprefix("model."): torch.tensor(v) for k, v in t.items() if k.startswith("model.")})
    tokenizer = AutoTokenizer.from_pretrained(str(armo))
    for answer, score in zip(ANSWERS, scores.scores, strict=True):
        text = tokenizer.apply_chat_template(conversation("Say a word.", answer), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            hidden = llama.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
        x = hidden[max(i for i, token in enumerate(ids) if token == 4)]
        for i in range(3):
            x = np.maximum(t[f"gating.layers.{i}.weight"] @ x + t[f"gating.layers.{i}.bias"], 0)
        x = np.exp((t["gating.layers.3.weight"] @ x + t["gating.layers.3.bias"]) / 10)
        gates = 1.7 * x / x.sum()
        rewards = t["regression_layer.weight"] @ hidden[-1]
        assert score == pytest.approx(gates @ (rewards @ t["reward_transform_matrix"]), abs=1e-4)


def test_an_answer_that_leaves_no_room_for_the_gate_is_unscored(scoring, armo):
    (scores,) = scoring.scorer(armo_settings(armo, max_tokens=16, max_cut_share=1)).score(
        [scoring.candidates("Say a word.", ["wood", "word " * 60])]
    )
    assert math.isfinite(scores.scores[0]) and math.isnan(scores.scores[1])
    assert scores.reasons == ["", "the answer fills the reward model's context"]


def test_armorm_refuses_other_models_and_damaged_ones(scoring, armo, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match="not an ArmoRM model"):
        scoring.scorer(armo_settings(tiny_model)).score([scoring.candidates("p", ["a"])])
    shutil.copytree(armo, tmp_path / "armo")
    tensors = load_file(tmp_path / "armo" / "model.safetensors")
    del tensors["gating.logit_scale"]
    save_file(tensors, tmp_path / "armo" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 missing, e.g. \['gating.logit_scale'\]"):
        scoring.scorer(armo_settings(tmp_path / "armo")).score([scoring.candidates("p", ["a"])])


def test_the_last_header_is_taken():
    assert last_occurrence([7, 1, 2, 7, 1, 2, 9], [1, 2]) == 4 and last_occurrence([1, 1, 1], [1, 1]) == 1
    assert (
        last_occurrence([1, 2], [1, 2]) == 0
        and last_occurrence([1], [1, 2]) is None
        and last_occurrence([3, 2], [1]) is None
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_the_teachers_log_probs(scoring, tiny_model, tmp_path, normalise):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"name": "teacher_logp", "model": {"path": str(tiny_model)}, "dtype": "float32", "normalise": normalise}
    scorer = scoring.scorer(settings, root=tmp_path / "store")
    items = [
        scoring.candidates("Say a word.", [*ANSWERS, "wood"]),
        scoring.candidates("Say a word.", ["", "wood"], finished=False),
    ]
    ended, cut = scorer.score(items)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(str(tiny_model)),
        AutoModelForCausalLM.from_pretrained(str(tiny_model)).eval(),
    )
    prompt = tokenizer("<|user|>Say a word.<|end|><|assistant|>", add_special_tokens=False).input_ids

    def expected(answer, end):
        ids = tokenizer(answer, add_special_tokens=False).input_ids + [1] * end
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + ids])).logits[0], dim=-1)
        values = [float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)]
        return sum(values) / (len(values) if normalise else 1)

    for answer, score in zip([*ANSWERS, "wood"], ended.scores, strict=True):
        assert score == pytest.approx(expected(answer, True), abs=2e-4)
    assert math.isnan(cut.scores[0]) and cut.reasons == ["empty completion", ""]
    assert cut.scores[1] == pytest.approx(expected("wood", False), abs=2e-4)
    assert scorer.metrics() == {"teacher/misses": 5, "teacher/hits": 1}
    again = scoring.scorer(settings, root=tmp_path / "store")
    assert again.score(items)[0].scores == pytest.approx(ended.scores) and again.metrics()["teacher/misses"] == 0


def test_beyond_the_teachers_context_there_is_no_score(scoring, tiny_model):
    settings = {"name": "teacher_logp", "model": {"path": str(tiny_model)}, "dtype": "float32"}
    (scores,) = scoring.scorer(settings).score([scoring.candidates("Say a word.", ["sea " * 300, "sea"])])
    assert math.isnan(scores.scores[0]) and scores.reasons == ["longer than the teacher's context", ""]


def test_the_stage_is_told_of_the_tokens_it_read(tmp_path, scoring, reward_model):
    told = []
    scorer = SCORERS.get("reward_model")(
        SCORERS.config({"name": "reward_model", "model": {"path": str(reward_model)}}), "cpu"
    )
    scorer.prepare(Services(tmp_path, 100, print, used=lambda model, count: told.append((model, count))))
    scorer.score([scoring.candidates("Say a word.", ANSWERS)])
    prompt = [{"role": "user", "content": "Say a word."}]
    assert told == [(reward_model, sum(len(scorer.encode(prompt, answer).ids) for answer in ANSWERS))]
