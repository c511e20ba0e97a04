"""PairRM checkpoints small enough for a test, the same on every machine: weights from numpy's generator, a vocabulary written out here.

No torch and no transformers: the same file builds them in llm-blender's own environment. Both layouts of the released repositories, and
the backbone that the one without `-hf` names.
"""

# ruff: noqa: RUF001 - full-width letters and signs are part of the cases

import json
from pathlib import Path

import numpy as np

CONTROLS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "that",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
    "or",
    "had",
    "by",
    "not",
    "but",
    "what",
    "all",
    "were",
    "we",
    "when",
    "your",
    "can",
    "said",
    "there",
    "use",
    "an",
    "each",
    "which",
    "she",
    "do",
    "how",
    "their",
    "if",
    "will",
    "up",
    "other",
    "about",
    "out",
    "many",
    "then",
    "them",
    "these",
    "so",
    "some",
    "her",
    "would",
    "make",
    "like",
    "him",
    "into",
    "time",
    "has",
    "look",
    "two",
    "more",
    "write",
    "go",
    "see",
    "number",
    "no",
    "way",
    "could",
    "people",
    "my",
    "than",
    "first",
    "water",
    "been",
    "call",
    "who",
    "oil",
    "its",
    "now",
    "find",
    "long",
    "down",
    "day",
]
SIZES = {
    "tiny": {"hidden": 64, "layers": 3, "heads": 4, "feed": 128, "buckets": 32},
    "mid": {"hidden": 256, "layers": 6, "heads": 4, "feed": 1024, "buckets": 256},
    "large": {"hidden": 1024, "layers": 24, "heads": 16, "feed": 4096, "buckets": 256},
}


def write_spm(path: Path) -> int:
    """A unigram sentencepiece model with the NFKC map of the released one; returns the number of its pieces."""
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    # Trained only for its normaliser; the pieces are ours, so that no version of the trainer can move them.
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=trained, vocab_size=40, hard_vocab_limit=False, model_type="unigram",
        normalization_rule_name="nmt_nfkc", minloglevel=9,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(trained.getvalue())
    del proto.pieces[:]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()<>|[]/éüßñ中文字"
    pieces = [(token, 0.0, 2 if token == "[UNK]" else 3) for token in CONTROLS]
    pieces += [(piece, -2.0 - 0.01 * number, 1) for number, piece in enumerate(["▁", *(f"▁{word}" for word in WORDS)])]
    pieces += [(letter, -6.0 - 0.01 * number, 1) for number, letter in enumerate(letters)]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    for name, number in (("pad", 0), ("bos", 1), ("eos", 2), ("unk", 3)):
        setattr(proto.trainer_spec, f"{name}_id", number)
        setattr(proto.trainer_spec, f"{name}_piece", CONTROLS[number])
    proto.trainer_spec.vocab_size = len(pieces)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return len(pieces)


def tensors_of(size: str, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Everything that PairRM's safetensors hold. Wide weights: the logits of two texts must differ by more than the arithmetic's noise."""
    s, rng = SIZES[size], np.random.default_rng(seed)
    hidden, feed = s["hidden"], s["feed"]
    tensors: dict[str, np.ndarray] = {}

    def normal(name, *shape, scale):
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name, out, inner, scale=1.0):
        normal(f"{name}.weight", out, inner, scale=scale / np.sqrt(inner))
        normal(f"{name}.bias", out, scale=0.05)

    def norm(name):
        tensors[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)
        normal(f"{name}.bias", hidden, scale=0.1)

    normal("pretrained_model.embeddings.word_embeddings.weight", vocabulary, hidden, scale=1.0)
    norm("pretrained_model.embeddings.LayerNorm")
    for layer in range(s["layers"]):
        prefix = f"pretrained_model.encoder.layer.{layer}"
        for name in ("query_proj", "key_proj", "value_proj"):
            linear(f"{prefix}.attention.self.{name}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", feed, hidden)
        linear(f"{prefix}.output.dense", hidden, feed)
        norm(f"{prefix}.output.LayerNorm")
    normal("pretrained_model.encoder.rel_embeddings.weight", 2 * s["buckets"], hidden, scale=0.5)
    norm("pretrained_model.encoder.LayerNorm")
    linear("head_layer.1", hidden, 2 * hidden)
    linear("head_layer.4", 1, hidden, scale=1.5)
    return tensors


def build(directory: Path, size: str = "tiny", seed: int = 0) -> dict[str, Path]:
    """`backbone`, `ranker` (layout of llm-blender/PairRM) and `hf` (of llm-blender/PairRM-hf) below the directory."""
    from safetensors.numpy import save_file

    backbone, ranker, hf = (directory / name for name in ("backbone", "ranker", "hf"))
    for path in (backbone, ranker, hf):
        path.mkdir(parents=True)
    pieces = write_spm(backbone / "spm.model")
    first = pieces + 1  # behind [MASK]
    tensors, s = tensors_of(size, first + len(MARKERS), seed), SIZES[size]
    encoder = {
        "model_type": "deberta-v2", "vocab_size": first, "hidden_size": s["hidden"], "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"], "intermediate_size": s["feed"], "hidden_act": "gelu", "layer_norm_eps": 1e-7,
        "relative_attention": True, "position_buckets": s["buckets"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "position_biased_input": False, "max_relative_positions": -1, "max_position_embeddings": 512,
        "type_vocab_size": 0, "pad_token_id": 0, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    }  # fmt: skip
    tokenizer = {"do_lower_case": False, "vocab_type": "spm", "tokenizer_class": "DebertaV2Tokenizer"}
    ranking = {
        "ranker_type": "pairranker", "model_type": "deberta-v3-large", "model_name": str(backbone), "source_maxlength": 1224,
        "candidate_maxlength": 412, "n_tasks": 1, "loss_type": "instructgpt", "reduce_type": "linear", "inference_mode": "full",
        "drop_out": 0.05, "fp16": True,
    }  # fmt: skip
    prefixes = {
        "source_prefix_id": first,
        "cand1_prefix_id": first + 1,
        "cand2_prefix_id": first + 2,
        "cand_prefix_id": first + 3,
    }
    for path, config in (
        (backbone, encoder | {"architectures": ["DebertaV2Model"]}),
        (ranker, ranking),
        (
            hf,
            encoder
            | prefixes
            | {"architectures": ["DebertaV2PairRM"], "n_tasks": 1, "drop_out": 0.05, "vocab_size": first + 4},
        ),
    ):
        (path / "config.json").write_text(json.dumps(config))
    name = "pretrained_model.embeddings.word_embeddings.weight"
    plain = {
        key.removeprefix("pretrained_model."): value
        for key, value in tensors.items()
        if key.startswith("pretrained_model.")
    }
    save_file(
        plain | {name.removeprefix("pretrained_model."): tensors[name][:first]},
        backbone / "model.safetensors",
        {"format": "pt"},
    )
    for path in (ranker, hf):
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for path in (backbone, hf):
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (hf / "spm.model").write_bytes((backbone / "spm.model").read_bytes())
    return {"backbone": backbone, "ranker": ranker, "hf": hf}


def cases() -> dict[str, dict]:
    """name -> {prompt, candidates}: plain and odd texts, and lengths around every limit."""
    long = lambda count, start=0: " ".join(WORDS[(start + 7 * number) % len(WORDS)] for number in range(count))  # noqa: E731
    return {
        "plain": {
            "prompt": "how can people find oil in water",
            "candidates": ["look down first", "use the number two", "no way!"],
        },
        "unicode": {
            "prompt": "Ｗｈａｔ is ½ of ① and ﬁre™?",
            "candidates": [
                "ｈａｌｆ\u3000of it",
                "zero\u200bwidth  and   spaces\t\n",
                "中文字 é e\u0301 ü ß 🙂",
                " ≯ \u0338 leads",
            ],
        },
        "empty": {"prompt": "", "candidates": ["", "one", " "]},
        "punctuation": {"prompt": "a.b,c;d", "candidates": ["(x)", "[y] <z> |", 'don\'t - "quote"']},
        "800 tokens": {"prompt": long(60), "candidates": [long(800), long(800, 3), "short"]},
        "source cut": {"prompt": long(1300), "candidates": [long(420), long(500, 5), "a"]},
        "source at its limit": {"prompt": long(1221), "candidates": [long(409), long(410, 1), long(411, 2)]},
        "candidates cut": {"prompt": long(4), "candidates": [long(1100), long(1030, 2), long(1018, 4)]},
        "half way": {"prompt": long(520), "candidates": [long(790), long(760, 1), long(2, 9)]},
    }
