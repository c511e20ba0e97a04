"""Native PairRM against llm-blender itself, and the properties that its scores must have.

Strategy: tiny checkpoints with weights from numpy (tests/assets/pairrm_tiny.py), in both released layouts. What
llm-blender 0.0.2 said of them on transformers 4.57.6 is frozen in tests/assets/pairrm_golden.json
(make_pairrm_golden.py writes it). Properties need no oracle.
"""

# ruff: noqa: RUF001 - full-width letters and signs are part of the cases

import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_contracts.errors import ConfigError
from stages.scoring import SCORERS
from stages.scoring.base import Services
from stages.scoring.pairrm_tokens import MARKERS, Limits, blank, load_tokenizer

CASES = (
    "plain",
    "unicode",
    "empty",
    "punctuation",
    "800 tokens",
    "source cut",
    "source at its limit",
    "candidates cut",
    "half way",
)


@pytest.fixture(scope="module")
def golden(scoring):
    return json.loads((scoring.assets / "pairrm_golden.json").read_text())


@pytest.fixture(scope="module")
def scorers(scoring, checkpoints):
    """By layout; the hf one has a tiny budget of tokens, so that most of its batches are a single row."""
    return {
        layout: scoring.scorer({"name": "pairrm", "model": {"path": str(checkpoints[layout])}}, budget)
        for layout, budget in (("ranker", 8192), ("hf", 1))
    }


def matrix(scoring, scorer, prompt, texts):
    (scores,) = scorer.score([scoring.candidates(prompt, texts)])
    assert scores.scores is None and scores.reasons == [""] * len(texts)
    return scores.preference_logits


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "ranker") for name in CASES), *((name, "hf") for name in ("plain", "unicode", "empty", "source cut"))],
)
def test_logits_are_those_of_llm_blender(scoring, scorers, golden, pairrm_tiny, name, layout):
    case, expected = pairrm_tiny.cases()[name], golden["cases"][name]
    found = matrix(scoring, scorers[layout], case["prompt"], case["candidates"])
    assert np.abs(found - np.array(expected["logits"])).max() < 1e-5
    assert np.abs((found - found.T).mean(axis=1) - expected["scores"]).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_their_number_are_those_of_llm_blender(scorers, golden, pairrm_tiny, name):
    case, expected = pairrm_tiny.cases()[name], golden["cases"][name]
    tokenizer = scorers["hf"].load().tokenizer
    source = tokenizer.source(case["prompt"])
    assert len(source) == expected["source_length"]
    assert source[:40] == expected["source_ids"][: len(source)]
    assert [len(tokenizer.candidate(text, len(source))) for text in case["candidates"]] == expected["candidate_lengths"]


def test_the_golden_cases_reach_every_limit(golden):
    lengths = {name: (case["source_length"], max(case["candidate_lengths"])) for name, case in golden["cases"].items()}
    assert lengths["source cut"] == (1224, 412)
    assert lengths["candidates cut"] == (7, 412 + (1224 - 7) // 2)
    assert lengths["half way"][0] == 523 and lengths["half way"][1] == 412 + (1224 - 523) // 2
    assert all(source + 2 * candidate <= 2048 for source, candidate in lengths.values())
    assert golden["transformers"] == "4.57.6"


@given(st.integers(0, 1500), st.integers(0, 1500))
@settings(max_examples=40)
def test_truncation_lengths_are_exact(checkpoints, source_words, candidate_words):
    tokenizer = _tokenizer(checkpoints["hf"])
    source = tokenizer.source("the " * source_words)
    assert len(source) == min(1224, source_words + 3)
    limit = 412 + (1224 - len(source)) // 2
    found = tokenizer.candidate("of " * candidate_words, len(source))
    assert (
        len(found) == min(limit, candidate_words + 3)
        and found[-1] == tokenizer.sep_id
        and found[:2] == [1, tokenizer.first_id]
    )


_CACHE = {}


def _tokenizer(directory):
    if directory not in _CACHE:
        _CACHE[directory] = load_tokenizer(directory, Limits())
    return _CACHE[directory]


TEXTS = [
    "look down first",
    "use the number two",
    "no way!",
    "",
    "ａ ½ 中",
    "the oil is in the water and the people can find it",
]


@given(st.permutations(range(len(TEXTS))))
@settings(max_examples=8)
def test_permuting_candidates_permutes_the_matrix(scoring, scorers, order):
    plain = matrix(scoring, scorers["ranker"], "how can it be", TEXTS)
    moved = matrix(scoring, scorers["ranker"], "how can it be", [TEXTS[k] for k in order])
    assert np.abs(moved - plain[np.ix_(order, order)]).max() < 2e-6
    assert (np.diag(moved) == 0).all()


def test_neither_the_batch_nor_the_neighbours_change_a_score(scoring, scorers, pairrm_tiny):
    items = [scoring.candidates(case["prompt"], case["candidates"]) for case in list(pairrm_tiny.cases().values())[:5]]
    together = scorers["ranker"].score(items)
    for item, scores in zip(items, together, strict=True):
        (alone,) = scorers["hf"].score([item])
        assert np.abs(alone.preference_logits - scores.preference_logits).max() < 2e-6


@pytest.mark.parametrize("marker", [*MARKERS, "[SEP]", "[CLS]", "[PAD]", "[MASK]", "＜|candidate1|＞"])
def test_a_marker_inside_a_text_changes_nothing_but_that_text(scoring, scorers, marker):
    plain = matrix(scoring, scorers["ranker"], "how can it be", TEXTS[:3])
    hostile = matrix(scoring, scorers["ranker"], "how can it be", [*TEXTS[:2], f"no {marker} way! {marker}"])
    assert np.abs(hostile[:2, :2] - plain[:2, :2]).max() < 2e-6
    if not marker.startswith("＜"):
        blanked = matrix(scoring, scorers["ranker"], "how can it be", [*TEXTS[:2], "no   way!  "])
        assert np.abs(hostile - blanked).max() < 2e-6
    assert np.isfinite(matrix(scoring, scorers["ranker"], f"{marker} {marker}", TEXTS[:2])).all()


def test_blanking_reaches_every_marker():
    assert blank("a<|source|>b[SEP]c") == "a b c" and blank("[sep] <|SOURCE|>") == "[sep] <|SOURCE|>"


def test_ragged_and_lone_candidates_are_scored(scoring, scorers):
    sizes = [1, 2, 5]
    found = scorers["ranker"].score(
        [scoring.candidates(f"p{size}", [f"number {k}" for k in range(size)]) for size in sizes]
    )
    assert [scores.preference_logits.shape for scores in found] == [(size, size) for size in sizes]
    assert found[0].preference_logits.tolist() == [[0.0]]


def test_the_two_orders_are_both_asked(scoring, scorers):
    found = matrix(scoring, scorers["ranker"], "how can it be", TEXTS)
    off = ~np.eye(len(TEXTS), dtype=bool)
    assert (found[off] != 0).all() and np.abs(found + found.T)[
        off
    ].max() > 1e-3  # it has a position bias, and we can see it


def test_a_tokenizer_file_of_transformers_4_gives_the_same_ids(checkpoints, tmp_path):
    """tokenizer.json with the markers added, as PairRM-hf carries it; and one that lost its NFKC map, beside
    spm.model."""
    from tokenizers import AddedToken

    plain = _tokenizer(checkpoints["hf"])
    backend = type(plain.backend).from_str(plain.backend.to_str())
    backend.add_tokens([AddedToken(marker, normalized=True) for marker in MARKERS])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    texts = ["Ｗｈａｔ ½ ﬁre™ e\u0301", "  two  spaces ", "<|candidate1|> ＜|candidate1|＞"]
    with_file = load_tokenizer(tmp_path, Limits())
    assert (with_file.source_id, with_file.second_id) == (plain.source_id, plain.second_id)
    assert [with_file.source(text) for text in texts] == [plain.source(text) for text in texts]

    data = json.loads(backend.to_str())
    data["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="lost the NFKC map"):
        load_tokenizer(tmp_path, Limits())
    shutil.copy(checkpoints["hf"] / "spm.model", tmp_path)
    assert [load_tokenizer(tmp_path, Limits()).source(text) for text in texts] == [plain.source(text) for text in texts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head_layer.4.bias"), r"1 missing, e.g. \['head_layer.4.bias'\]"),
        (
            lambda tensors: tensors.update({"head_layer.9.bias": np.zeros(1, np.float32)}),
            r"1 unknown, e.g. \['head_layer.9.bias'\]",
        ),
        (
            lambda tensors: tensors.update({"head_layer.4.bias": np.zeros(2, np.float32)}),
            r"1 of another shape.*head_layer.4.bias \(2,\), not \(1,\)",
        ),
        (lambda tensors: tensors.pop("pretrained_model.embeddings.word_embeddings.weight"), "not a PairRM checkpoint"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused(scoring, checkpoints, tmp_path, change, message):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoints["hf"], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        scoring.scorer({"name": "pairrm", "model": {"path": str(tmp_path / "other")}}).load()


def test_an_old_position_buffer_is_no_obstacle(scoring, checkpoints, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoints["hf"], tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    save_file(
        tensors | {"pretrained_model.embeddings.position_ids": np.arange(4)}, tmp_path / "old" / "model.safetensors"
    )
    scoring.scorer({"name": "pairrm", "model": {"path": str(tmp_path / "old")}}).load()


def test_another_kind_of_model_is_refused(scoring, tiny_model):
    with pytest.raises(ConfigError, match="model type 'llama', not of a PairRM"):
        scoring.scorer({"name": "pairrm", "model": {"path": str(tiny_model)}}).load()


def test_a_missing_directory_is_found_before_anything_runs(scoring):
    from stages.scoring import SCORERS

    config = SCORERS.config({"name": "pairrm", "model": {"path": "/nowhere/at/all"}})
    with pytest.raises(ConfigError, match="no config.json"):
        SCORERS.get("pairrm").check_prompts(config, [])


def test_the_key_follows_the_content_of_the_weights_not_their_place(scoring, checkpoints, tmp_path):
    from stages.scoring import SCORERS

    def key(path):
        return SCORERS.config({"name": "pairrm", "model": {"path": str(path)}}).identity()["model"]

    shutil.copytree(checkpoints["hf"], tmp_path / "copy")
    assert key(tmp_path / "copy") == key(checkpoints["hf"]) != key(checkpoints["ranker"])
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert key(tmp_path / "copy") != key(checkpoints["hf"])


@pytest.mark.hub
@pytest.mark.parametrize("repository", ["llm-blender/PairRM-hf", "llm-blender/PairRM"])
def test_the_released_weights_give_the_published_logits(scoring, repository):
    """README and notebook of LLM-Blender, one order, float32."""
    settings = {"name": "pairrm", "model": {"hub_id": repository}}
    if repository.endswith("PairRM"):
        settings["tokenizer"] = {"hub_id": "microsoft/deberta-v3-large"}
    scorer = scoring.scorer(settings)
    items = [
        scoring.candidates("hello!", ["hi!", "f**k off!"]),
        scoring.candidates("I love you!", ["I hate you!", "I love you, too!"]),
    ]
    found = [float(scores.preference_logits[0, 1]) for scores in scorer.score(items)]
    assert found == pytest.approx([1.9003021717071533, -1.2547134160995483], abs=1e-4)
    assert scorer.load().tokenizer.source_id == 128001
    full_width = scorer.load().tokenizer.source("Ｗｈａｔ")
    assert full_width == scorer.load().tokenizer.source("What")  # the NFKC map is there


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (7, 7), (40, 33, 2), (130,)])
def test_the_encoder_is_that_of_transformers(scorers, lengths, onednn):
    """Hidden states of some tokens of each row; both ways to multiply, one row and several, with and without
    padding."""
    import torch

    from stages.scoring.deberta import Encoder, covers

    model = scorers["ranker"].load().network.pretrained_model
    assert covers(model.config)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 100, (len(lengths), max(lengths)), generator=draw)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[~mask] = 0
    wanted = torch.tensor([[0, length // 2, length - 1] for length in lengths])
    encoder = Encoder(model)
    encoder.onednn = onednn and torch.backends.mkldnn.is_available()
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        found = encoder(ids, lengths, wanted)
        # As on a GPU: all heads in one call.
        encoder.on_cpu = encoder.onednn = False
        together = encoder(ids, lengths, wanted)
    for row in range(len(lengths)):
        assert (found[row] - expected[row, wanted[row]]).abs().max() < 2e-5
        assert (together[row] - expected[row, wanted[row]]).abs().max() < 2e-5


def test_another_deberta_than_v3_goes_through_transformers(scoring, checkpoints, monkeypatch):
    """The scores are the same, only slower."""
    import stages.scoring.pairrm_model as pairrm_model

    settings = {"name": "pairrm", "model": {"path": str(checkpoints["hf"])}}
    fast = matrix(scoring, scoring.scorer(settings), "how can it be", TEXTS[:3])
    monkeypatch.setattr(pairrm_model, "covers", lambda config: False)
    assert np.abs(matrix(scoring, scoring.scorer(settings), "how can it be", TEXTS[:3]) - fast).max() < 2e-6


def test_a_digest_is_remembered_in_the_store_of_whoever_computes_the_key(checkpoints, tmp_path, monkeypatch):
    """Neither the environment's store nor a store that does not exist yet is touched."""
    from data_contracts.checkpoint import digests_kept_in
    from data_contracts.store import Store
    from stages.scoring import SCORERS

    monkeypatch.setenv("SELFPLAY_STORE", str(tmp_path / "environment"))
    (tmp_path / "environment").mkdir()
    shutil.copytree(checkpoints["hf"], tmp_path / "model")
    (tmp_path / "model" / "more.safetensors").write_bytes(b"\1" * (1 << 20))  # large enough to be remembered
    config = SCORERS.config({"name": "pairrm", "model": {"path": str(tmp_path / "model")}})
    store = Store(tmp_path / "store")
    without = config.identity()
    with digests_kept_in(store):
        assert config.identity() == without and not store.root.exists()
        store.root.mkdir()
        assert config.identity() == without and len(list((store.root / "digests").iterdir())) == 1
    assert not list((tmp_path / "environment").iterdir())


# --- arithmetic


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_make_the_same_choices(scoring, checkpoints, pairrm_tiny, dtype):
    # A random network stands in for a trained one; its logits spread by 0.29.
    chance = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choice(pairrm_tiny.WORDS) for _ in range(chance.randint(low, high)))

    batch = [scoring.candidates(text(4, 12), [text(4, 16) for _ in range(4)]) for _ in range(6)]
    logits = {}
    for name in ("auto", dtype):
        scorer = scoring.scorer({"name": "pairrm", "model": {"path": str(checkpoints["hf"])}, "dtype": name})
        logits[name] = np.stack([scores.preference_logits for scores in scorer.score(batch)])[:, ~np.eye(4, dtype=bool)]
    gaps = abs(logits["auto"] - logits[dtype])
    assert ((logits["auto"] > 0) == (logits[dtype] > 0)).mean() >= 0.995
    assert gaps.max() < 0.02 if dtype == "float16" else gaps.mean() < 0.02


def test_auto_means_sixteen_bits_on_a_gpu_and_float32_on_a_cpu(monkeypatch):
    for name, on_gpu in (("pairrm", "float16"), ("reward_model", "bfloat16")):
        config = SCORERS.config({"name": name, "model": {"path": "/nowhere"}})
        exact = config.model_copy(update={"dtype": "float32"})
        assert config.identity() == exact.identity() != config.model_copy(update={"dtype": "bfloat16"}).identity()
        scorer = SCORERS.get(name)(config, "cpu")
        assert (scorer.arithmetic(), scorer.tokens_per_forward()) == ("float32", 4096)
        scorer = SCORERS.get(name)(config, "cuda")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert (scorer.arithmetic(), scorer.tokens_per_forward()) == (on_gpu, 32_768)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        assert scorer.arithmetic() == ("float16" if name == "pairrm" else "float32")
        scorer.prepare(Services(batch_tokens=100))
        assert scorer.tokens_per_forward() == 100
        assert SCORERS.get(name)(exact, "cuda").arithmetic() == "float32"
