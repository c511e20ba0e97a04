"""Components, who belongs to which, and the weights made of them: small cases by hand, and what must hold for any text.

The tokenizers of the fuzz test are trained here; those beside the project, if there, are tried as well.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_contracts.errors import ContractError
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights import alignment as alignment_module
from stages.weighting.weights.alignment import align, merge_empty
from stages.weighting.weights.base import ResponseBatch, Tokens, add_stats

SHARED = Path(os.environ.get("SELFPLAY_SHARED") or Path(__file__).resolve().parents[4] / "shared")
PROSE = [
    "Taylor Swift is a singer, not an AI algorithm. She wrote it herself!\n\nReally? Yes; in 2014.",
    "def f(x):\n\tif x > 1:\n\t\treturn x * 2\n    # naïve café — 東京 🍎👩‍👩‍👧 ok\n",
    "words   and    runs of\r\nspaces \t and tabs　and a zero​width, don't you think",
    "The quick brown fox jumps over the lazy dog. 1234567890 != 12345",
]


def spanned(*rows: list[tuple[int, int]], ended: bool = False) -> Tokens:
    return Tokens.of([range(len(row) + ended) for row in rows], rows, [ended] * len(rows))


def components(
    text: str, student: list[tuple[int, int]] = (), teacher: list[tuple[int, int]] = (), segmenter: str = "word"
):
    alignment = align([text], spanned(list(student)), spanned(list(teacher)), segmenter)
    return [
        (text[a:b], bool(space))
        for a, b, space in zip(alignment.starts, alignment.ends, alignment.is_space, strict=True)
    ], alignment


# ---- components


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one two", [("one", False), (" two", False)]),
        (" one", [(" one", False)]),  # a text may begin with the space of its first word
        ("a  b", [("a", False), (" ", True), (" b", False)]),  # a longer run keeps its last space for the word
        ("a\nb", [("a", False), ("\n", True), ("b", False)]),
        ("a \nb", [("a", False), (" \n", True), ("b", False)]),
        ("a\n b", [("a", False), ("\n", True), (" b", False)]),
        ("a\xa0b", [("a", False), ("\xa0", True), ("b", False)]),  # only the plain space belongs to words
        ("a ", [("a", False), (" ", True)]),
        ("  ", [("  ", True)]),
        ("a​b", [("a​b", False)]),  # a zero-width space is no whitespace
    ],
)
def test_word_components(text, expected):
    assert components(text)[0] == expected


def test_a_token_that_crosses_a_border_merges_what_it_touches():
    text = "if x:\n\treturn y;\n\tprint(x);\n"
    assert len(components(text)[0]) == 8
    # The newline-tab pieces of a code tokenizer: ":\n", "\treturn", ";\n", "\tprint"; the last newline alone
    code = [(0, 2), (2, 4), (4, 6), (6, 13), (13, 15), (15, 17), (17, 23), (23, 27), (27, 28)]
    merged, alignment = components(text, code)
    assert len(merged) == 4 and "".join(part for part, _ in merged) == text
    assert [alignment.student[i] for i in (0, 2, 6, 8)] == [0, 1, 2, 3]
    # A token over two whitespace runs only: still [SPACE]
    assert components("a\n b", [(0, 1), (1, 2)], [(0, 1), (1, 3), (3, 4)])[0] == [("a", False), ("\n b", False)]
    assert components("\n\n ", [(0, 3)])[0] == [("\n\n ", True)]


def test_common_starts_cut_where_both_begin_a_token():
    assert components("abcd e", [(0, 2), (2, 4), (4, 6)], [(0, 1), (1, 2), (2, 6)], "common_starts")[0] == [
        ("ab", False),
        ("cd e", False),
    ]


def test_zero_width_tokens_belong_where_they_stand():
    _, alignment = components("one two", [(0, 0), (0, 3), (3, 3), (3, 7), (7, 7)], [(0, 7)][:0])
    assert alignment.student.tolist() == [0, 0, 1, 1, 1]
    _, empty = components("", [(0, 0)], [])
    assert empty.student.tolist() == [-1]


def test_pieces_of_one_character_share_its_component():
    # The first byte of an emoji joined to the space before it, then the other three.
    _, alignment = components("a 🍎b", [(0, 1), (1, 3), (2, 3), (2, 3), (3, 4)], [(0, 1), (1, 4)])
    assert alignment.student.tolist() == [0, 1, 1, 1, 1] and alignment.teacher.tolist() == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [[(0, 3), (3, 9)], [(3, 7), (0, 3)], [(-1, 3), (3, 7)], [(0, 5), (2, 4)]],
    ids=["outside", "backwards", "negative", "nested"],
)
def test_unusable_spans_leave_their_response_alone(bad):
    texts = ["one two", "one two", "one two"]
    good = [(0, 3), (3, 7)]
    alignment = align(texts, spanned(good, bad, good), spanned(good, good, good))
    assert alignment.aligned.tolist() == [True, False, True]
    assert alignment.student.tolist() == [0, 1, -1, -1, 4, 5]


def test_tokenizations_without_spans_or_of_other_texts_are_refused():
    with pytest.raises(ContractError, match="character offsets"):
        align(["a"], Tokens.of([[1]], None, [False]), spanned([(0, 1)]))
    with pytest.raises(ContractError, match="2 texts"):
        align(["a", "b"], spanned([(0, 1)]), spanned([(0, 1)]))
    with pytest.raises(ContractError, match="3 spans for 1 tokens"):
        Tokens.of([[1]], [[(0, 1)] * 3], [False])


def test_empty_components_merge_forwards_and_at_the_end_backwards():
    text = "a b  c d"
    teacher = [(0, 1), (5, 6)]  # scores "a" and "c"
    _, alignment = components(text, [(0, 1), (1, 3), (3, 4), (4, 6), (6, 8)], teacher)
    merged = merge_empty(alignment, np.ones(2, dtype=bool))
    assert [text[a:b] for a, b in zip(merged.starts, merged.ends, strict=True)] == ["a", " b  c d"]
    nothing = merge_empty(alignment, np.zeros(2, dtype=bool))
    assert len(nothing.starts) == 1 and nothing.student.tolist() == [0] * 5


# ---- weights on top


def batch_of(
    texts, student: Tokens, teacher: Tokens, seed: int = 0, chosen: bool = True, truncate: float = 0.0
) -> ResponseBatch:
    draw = np.random.default_rng(seed)
    teacher_logps = -draw.exponential(2.0, int(teacher.starts[-1]))
    teacher_logps[draw.uniform(size=len(teacher_logps)) < truncate] = np.nan
    logps = {"reference": -draw.exponential(2.0, int(student.starts[-1]))}
    return ResponseBatch(
        [f"row{i}" for i in range(len(texts))],
        np.full(len(texts), chosen),
        student,
        logps,
        list(texts),
        teacher,
        teacher_logps,
    )


def swift(batch: ResponseBatch, **settings):
    provider = WEIGHTS.get("swift")
    return provider.weights(provider.Config(**settings), batch)


def slow_weights(batch: ResponseBatch, k=1.0, mu=1.0, L=-0.5, U=1.5, segmenter="word", empty="neutral") -> np.ndarray:
    """Eq. 6 token by token, component by component, for batches whose two tokenizations differ."""
    alignment = align(batch.texts, batch.student, batch.teacher, segmenter)
    if empty == "merge":
        alignment = merge_empty(alignment, ~np.isnan(batch.teacher_logps))
    values = []
    for i, b in enumerate(batch.logps["reference"]):
        partners = [
            a
            for c, a in zip(alignment.teacher, batch.teacher_logps, strict=True)
            if c == alignment.student[i] and c >= 0 and not np.isnan(a)
        ]
        terms = [k * np.exp(mu * min(max(a - b, L), U)) for a in partners]
        values.append(np.mean(terms) if terms else (0.0 if empty == "zero" else k))
    return np.array(values)


@pytest.mark.parametrize("pairs_at_once", [1, 7, 1 << 22])
@pytest.mark.parametrize("empty", ["neutral", "zero", "merge"])
def test_vectorised_weights_equal_the_loop_over_tokens(monkeypatch, empty, pairs_at_once):
    monkeypatch.setattr(alignment_module, "PAIRS_AT_ONCE", pairs_at_once)
    student, teacher = trained("bytes"), trained("metaspace")
    batch = batch_of(PROSE, tokens_of(student, PROSE, eos=False), tokens_of(teacher, PROSE, eos=False), truncate=0.3)
    assert np.allclose(
        swift(batch, empty=empty, mu_chosen=0.7, k=1.3).values, slow_weights(batch, k=1.3, mu=0.7, empty=empty)
    )


def test_one_tokenizer_is_compared_token_by_token():
    tokens = tokens_of(trained("bytes"), PROSE)
    batch = batch_of(PROSE, tokens, tokens)
    gap = np.clip(batch.teacher_logps - batch.logps["reference"], -0.5, 1.5)
    assert np.allclose(swift(batch).values, np.exp(gap))
    # ... and where each component has one token, Eq. 6 is the same.
    text, spans = ["one two three"], [(0, 3), (3, 7), (7, 13)]
    student = spanned(spans)
    cross = batch_of(text, student, student._replace(ids=student.ids + 100))
    assert np.allclose(swift(cross).values, swift(batch_of(text, student, student)).values)


def test_equal_models_mu_of_zero_and_equal_bounds_give_constants():
    tokens = tokens_of(trained("bytes"), PROSE)
    batch = batch_of(PROSE, tokens, tokens)
    same = ResponseBatch(
        batch.keys, batch.chosen, tokens, {"reference": batch.teacher_logps}, batch.texts, tokens, batch.teacher_logps
    )
    assert np.allclose(swift(same, k=0.7).values, 0.7)
    cross = batch_of(PROSE, tokens, tokens_of(trained("metaspace"), PROSE))
    assert np.allclose(swift(cross, mu_chosen=0.0, k=0.7).values, 0.7)
    assert np.allclose(swift(cross, L=0.4, U=0.4, eos="pair").values, np.exp(0.4))


def test_the_sides_have_their_own_exponents():
    tokens = tokens_of(trained("bytes"), PROSE[:1])
    batch = batch_of(PROSE[:1], tokens, tokens, chosen=False)
    assert np.allclose(swift(batch, mu_rejected=-1.0).values, 1 / swift(batch).values)


def test_the_eos_is_paired_with_the_teachers():
    text, spans = ["ab"], [(0, 2)]
    student, teacher = spanned(spans, ended=True), spanned([(0, 1), (1, 2)], ended=True)
    logps = {"reference": np.array([-1.0, -1.0])}
    for teacher_tokens, teacher_logps, policy, expected in (
        (teacher, [-1.0, -1.0, -0.2], "pair", np.exp(0.8)),
        (teacher, [-1.0, -1.0, np.nan], "pair", 1.0),
        (spanned([(0, 1), (1, 2)]), [-1.0, -1.0], "pair", 1.0),
        (teacher, [-1.0, -1.0, -0.2], "zero", 0.0),
        (teacher, [-1.0, -1.0, -0.2], "neutral", 1.0),
    ):
        batch = ResponseBatch(
            ["row"], np.ones(1, dtype=bool), student, logps, text, teacher_tokens, np.array(teacher_logps)
        )
        assert swift(batch, eos=policy).values.tolist() == pytest.approx([1.0, expected])


def test_unaligned_responses_get_neutral_weights_and_are_counted():
    texts = ["one two"] * 2
    student = spanned([(0, 3), (3, 7)], [(3, 7), (0, 3)])
    batch = batch_of(texts, student, spanned([(0, 7)], [(0, 7)])._replace(ids=np.array([7, 7])))
    result = swift(batch, empty="zero", k=0.5)
    assert result.values[2:].tolist() == [0.5, 0.5] and result.stats["unaligned"] == (1.0, 2.0)
    assert result.stats["component_chars"] == (7.0, 1.0)  # the one that could be aligned: a word over two


def test_responses_do_not_influence_each_other():
    student, teacher = tokens_of(trained("bytes"), PROSE), tokens_of(trained("runs"), PROSE)
    batch = batch_of(PROSE, student, teacher)
    together = swift(batch).per_response(student)
    for i, text in enumerate(PROSE):
        rows = [slice(tokens.starts[i], tokens.starts[i + 1]) for tokens in (student, teacher)]
        alone = ResponseBatch(
            ["x"],
            np.ones(1, dtype=bool),
            tokens_of(trained("bytes"), [text]),
            {"reference": batch.logps["reference"][rows[0]]},
            [text],
            tokens_of(trained("runs"), [text]),
            batch.teacher_logps[rows[1]],
        )
        assert np.array_equal(swift(alone).per_response(alone.student)[0], together[i])
        assert together[i].dtype == np.float32 and len(together[i]) == rows[0].stop - rows[0].start


def test_normalised_weights_sum_to_what_they_should():
    student, teacher = tokens_of(trained("bytes"), PROSE), tokens_of(trained("runs"), PROSE)
    batch = batch_of(PROSE, student, teacher)
    sums = [row.sum() for row in swift(batch, normalise="sum100").per_response(student)]
    assert sums == pytest.approx([100.0] * len(PROSE), rel=1e-5)
    assert [row.mean() for row in swift(batch, normalise="mean1").per_response(student)] == pytest.approx(
        [1.0] * len(PROSE), rel=1e-5
    )


def test_log_probs_that_are_no_numbers_are_refused_by_row_and_column():
    tokens = tokens_of(trained("bytes"), PROSE[:2])
    batch = batch_of(PROSE[:2], tokens, tokens)
    batch.logps["reference"][tokens.starts[1] + 4] = np.nan
    with pytest.raises(ContractError, match=r"'row1'.*'reference'.*token 4: nan"):
        swift(batch)
    short = ResponseBatch(
        batch.keys, batch.chosen, tokens, {"reference": np.zeros(3)}, batch.texts, tokens, batch.teacher_logps
    )
    with pytest.raises(ContractError, match=f"3 values for {tokens.starts[-1]} tokens"):
        swift(short)
    with pytest.raises(ContractError, match="read the log-probs 'reference'"):
        swift(ResponseBatch(batch.keys, batch.chosen, tokens, {}, batch.texts, tokens, batch.teacher_logps))


def test_statistics_add_up_over_batches():
    assert add_stats(
        [{"mean": (3.0, 2.0), "min/weight": (0.5, 2.0)}, {"mean": (1.0, 2.0), "min/weight": (-1.0, 2.0)}]
    ) == {
        "mean": 1.0,
        "min/weight": -1.0,
    }


# ---- any text, any two tokenizers

CORPUS = [
    *PROSE,
    *(
        " ".join(words)
        for words in itertools.permutations(["singer", "东京", "naïve", "return", "\n\n", "\t", "12", "don't"], 4)
    ),
]


@cache
def trained(kind: str) -> Tokenizer:
    """Five small tokenizers of different families."""
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()  # lower case, no accents: characters that no token covers
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(
            CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
        )
        return tokenizer
    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)  # pieces of several words
        tokenizer.decoder = decoders.Metaspace()
        specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
        )
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    if kind == "lowercase":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "lowercase", use_regex=kind != "runs")
    size = {"bytes": 300, "runs": 420, "lowercase": 350}[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str], eos: bool = True) -> Tokens:
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return Tokens.of([[*row.ids, *[0] * eos] for row in encoded], [row.offsets for row in encoded], [eos] * len(texts))


def check_batch(texts: list[str], student: Tokens, teacher: Tokens) -> None:
    """Everything that must hold for any text under any two tokenizers."""
    for segmenter in ("word", "common_starts"):
        alignment = align(texts, student, teacher, segmenter)
        assert alignment.aligned.all()
        # Components cover each text, in order, without gap or overlap.
        for row, text in enumerate(texts):
            mine = np.flatnonzero(alignment.rows == row)
            borders = [alignment.text_starts[row], *alignment.ends[mine]]
            assert list(alignment.starts[mine]) == borders[:-1] and borders[-1] == alignment.text_starts[row + 1]
            if text:
                spaces = [
                    text[a:b].isspace()
                    for a, b in zip(alignment.starts[mine] - borders[0], alignment.ends[mine] - borders[0], strict=True)
                ]
                assert spaces == alignment.is_space[mine].tolist()
        # Every token of a text lies inside exactly one component of its own text.
        for tokens, owner in ((student, alignment.student), (teacher, alignment.teacher)):
            rows, real = tokens.rows(), ~tokens.is_eos() & (np.diff(alignment.text_starts)[tokens.rows()] > 0)
            assert (owner[~real] == -1).all() and (alignment.rows[owner[real]] == rows[real]).all()
            starts, ends = (tokens.spans[real, side] + alignment.text_starts[rows[real]] for side in (0, 1))
            assert (alignment.starts[owner[real]] <= starts).all() and (ends <= alignment.ends[owner[real]]).all()
    batch = batch_of(texts, student, teacher, truncate=0.1)
    for empty in ("neutral", "merge"):
        result = swift(batch, empty=empty, k=1.2)
        assert (result.values >= 1.2 * np.exp(-0.5) - 1e-12).all() and (
            result.values <= 1.2 * np.exp(1.5) + 1e-12
        ).all()
        assert result.stats["mean"][1] == student.starts[-1]


def slow_components(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The rule as it is written down: words with at most one leading plain space, then merging until no token crosses a border."""
    alignment, at = [], 0
    while at < len(text):
        run = at
        while run < len(text) and text[run].isspace():
            run += 1
        word = run
        while word < len(text) and not text[word].isspace():
            word += 1
        if run == at:
            alignment.append((at, word))
        elif word == run:  # whitespace up to the end
            alignment.append((at, run))
        elif text[run - 1] == " ":
            alignment += [(at, run - 1)] * (run - 1 > at) + [(run - 1, word)]
        else:
            alignment += [(at, run), (run, word)]
        at = word
    changed = True
    while changed:
        changed = False
        for start, end in spans:
            touched = [i for i, (a, b) in enumerate(alignment) if a < end and start < b and start < end]
            if len(touched) > 1:
                alignment[touched[0] : touched[-1] + 1] = [(alignment[touched[0]][0], alignment[touched[-1]][1])]
                changed = True
    return alignment


NASTY = st.text(
    st.one_of(
        st.sampled_from("aZé東🍎👩‍👧ßẞİıﬁ½ \t\n\r\u00a0\u3000\u200b\u0301\u0000\ufffd.,;:(){}'\"-_=09▁Ġ"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(NASTY, min_size=1, max_size=4),
    st.sampled_from(list(itertools.permutations(["bytes", "runs", "lowercase", "metaspace", "wordpiece"], 2))),
)
@example(["", " ", "\n"], ("bytes", "wordpiece"))
@example(["▁a ▁ b", "<0xE6>", "a"], ("metaspace", "lowercase"))
def test_any_text_under_tokenizers_made_here(texts, pair):
    student, teacher = (tokens_of(trained(kind), texts) for kind in pair)
    check_batch(texts, student, teacher)
    alignment = align(texts, student, teacher)
    for row, text in enumerate(texts):
        spans = [
            tuple(span)
            for tokens in (student, teacher)
            for span in tokens.spans[tokens.starts[row] : tokens.starts[row + 1] - 1]
        ]
        mine = alignment.rows == row
        borders = [(int(a), int(b)) for a, b in zip(alignment.starts[mine], alignment.ends[mine], strict=True)]
        assert [
            (a - alignment.text_starts[row], b - alignment.text_starts[row]) for a, b in borders
        ] == slow_components(text, spans)


def shared_tokenizers() -> dict[str, Path]:
    alignment = {path.stem: path for path in sorted((SHARED / "conformance").glob("tok_*.json"))}
    for name, path in (
        ("gpt2", SHARED / "data/tokenizers/gpt2/tokenizer.json"),
        ("mistral", SHARED / "data/tokenizers/mistral-7b-v0.1/tokenizer.json"),
        ("smollm2", SHARED / "models/smollm2-135m-instruct/tokenizer/tokenizer.json"),
        ("stories260K", SHARED / "models/stories260K/tokenizer.json"),
    ):
        if path.is_file():
            alignment[name] = path
    return alignment


def nasty_texts(count: int, seed: int) -> list[str]:
    """Random mixtures of prose, code, scripts, emoji, whitespace and odd code points; deterministic."""
    draw = random.Random(seed)
    pieces = [
        *(word for text in PROSE for word in text.split(" ")),
        *(
            "🍎",
            "👩‍👩‍👧‍👦",
            "🇫🇷",
            "é",
            "e\u0301",
            "ﬁ",
            "½",
            "İ",
            "ß",
            "ẞ",
            "東京大学",
            "ελληνικά",
            "русский",
            "עברית",
            "العربية",
            "हिन्दी",
            "한국어",
        ),
        *(
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            "\n\t",
            "    ",
            "  ",
            "\u00a0",
            "\u3000",
            "\u200b",
            "\u2028",
            "\ufeff",
            "\u0000",
            "\u0085",
            "\ufffd",
        ),
        *(
            "```python\n",
            "{'a': [1, 2.5e-3]}",
            "http://x.y/z?q=%20",
            "▁",
            "Ġthe",
            "<0x41>",
            "</s>",
            "<|im_end|>",
            "[UNK]",
            "…",
            "!!!",
            "''",
            "1234567",
        ),
    ]
    alphabet = [
        *range(0x20, 0x7F),
        *range(0xA0, 0x250),
        *range(0x370, 0x400),
        *range(0x4E00, 0x4E80),
        *range(0x1F300, 0x1F380),
    ]
    texts = []
    for _ in range(count):
        parts = [
            draw.choice(pieces) if draw.random() < 0.8 else chr(draw.choice(alphabet))
            for _ in range(draw.randint(0, 40))
        ]
        texts.append(draw.choice(["", " ", " ", "\n"]).join(parts))
    return texts


PAIRS = [
    ("tok_bytebpe", "tok_metaspace"),
    ("tok_metaspace", "tok_wordpiece"),
    ("tok_wordpiece", "tok_bytebpe_code"),
    ("tok_bytebpe_code", "tok_bytebpe_runs"),
    ("tok_bytebpe_runs", "gpt2"),
    ("gpt2", "mistral"),
    ("mistral", "smollm2"),
    ("smollm2", "stories260K"),
    ("stories260K", "gpt2"),
    ("smollm2", "tok_wordpiece"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("count", [pytest.param(200), pytest.param(2500, marks=pytest.mark.slow)])
def test_many_texts_under_real_tokenizers(pair, count):
    paths = shared_tokenizers()
    if missing := set(pair) - paths.keys():
        pytest.skip(f"no tokenizer {sorted(missing)} under {SHARED}; set SELFPLAY_SHARED")
    texts = nasty_texts(count, seed=PAIRS.index(pair))
    student, teacher = (tokens_of(loaded(str(paths[name])), texts) for name in pair)
    check_batch(texts, student, teacher)


@cache
def loaded(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)


def test_alignment_is_fast_enough_to_be_forgotten():
    """Measured at 2 to 4 million student tokens a second on one core; the limit leaves room for a busy machine."""
    texts = PROSE * 500
    student, teacher = tokens_of(trained("bytes"), texts), tokens_of(trained("metaspace"), texts)
    batch = batch_of(texts, student, teacher)
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        swift(batch)
        best = min(best, time.process_time() - began)
    assert student.starts[-1] / best > 200_000
