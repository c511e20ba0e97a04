"""Benchmark - cross-tokenizer weights: student tokens per second on one core.

    python -m benchmarks.alignment [--student DIR_OR_JSON] [--teacher DIR_OR_JSON] [--text FILE] [--responses N]

Without arguments: two byte-level BPE tokenizers trained here on synthetic prose and code. Tokenizing is timed apart; the number to watch
is the last line, alignment and weights together (components, closure, the mean over each component, EOS).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np

from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.alignment import align
from stages.weighting.weights.base import ResponseBatch, Tokens


def synthetic_texts(count: int, seed: int = 0) -> list[str]:
    """Prose with a vocabulary of made-up words, code with indentation, some of it not ASCII."""
    draw = random.Random(seed)
    syllables = ["ta", "lor", "swi", "ft", "ing", "er", "qu", "al", "ité", "ß", "東", "st", "un", "des", "ment"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    endings = [" ", " ", " ", " ", ", ", ". ", ".\n\n", "\n    ", " = ", "(", "); ", "  "]
    return [
        "".join(word + draw.choice(endings) for word in draw.choices(words, k=draw.randint(40, 400)))
        for _ in range(count)
    ]


def train_tokenizer(texts: list[str], size: int, prefix_space: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str):
    from tokenizers import Tokenizer

    found = Path(path)
    return Tokenizer.from_file(str(found / "tokenizer.json" if found.is_dir() else found))


def tokens_of(tokenizer, texts: list[str]) -> Tokens:
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    # An EOS behind each response, as a ground truth has.
    return Tokens.of([[*row.ids, 0] for row in encoded], [row.offsets for row in encoded], [True] * len(texts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment")
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--text", type=Path, help="responses, one per line (\\n in a line is a newline)")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    texts = synthetic_texts(options.responses)
    if options.text:
        texts = [line.replace("\\n", "\n") for line in options.text.read_text(encoding="utf-8").splitlines()][
            : options.responses
        ]
    student = load_tokenizer(options.student) if options.student else train_tokenizer(texts, 2000, False)
    teacher = load_tokenizer(options.teacher) if options.teacher else train_tokenizer(texts, 6000, False)
    began = time.perf_counter()
    mine, theirs = tokens_of(student, texts), tokens_of(teacher, texts)
    seconds = time.perf_counter() - began
    print(
        f"{len(texts)} responses, {len(mine.ids)} student and {len(theirs.ids)} teacher tokens; tokenized in {seconds:.2f} s"
    )
    random_logps = np.random.default_rng(0)
    logps = -random_logps.exponential(2.0, len(mine.ids))
    provider = WEIGHTS.get("swift")
    config = provider.Config()
    batch = ResponseBatch(
        [str(number) for number in range(len(texts))],
        np.ones(len(texts), dtype=bool),
        mine,
        {"reference": logps},
        texts,
        theirs,
        -random_logps.exponential(2.0, len(theirs.ids)),
    )
    for name, work in (
        ("alignment", lambda: align(texts, mine, theirs)),
        ("alignment and weights", lambda: provider.weights(config, batch)),
    ):
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        rates = [len(mine.ids) / second for second in seconds]
        spread = f"median of {options.repeats}, {min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{name}: {statistics.median(rates):,.0f} student tokens/s on one core ({spread})")


if __name__ == "__main__":
    main()
