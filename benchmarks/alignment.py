"""Benchmark - cross-tokenizer weights: student tokens per second on one core.

    python -m benchmarks.alignment [--student DIR_OR_JSON] [--teacher DIR_OR_JSON] [--text FILE] [--responses N]
    python -m benchmarks.alignment --smoke

Without arguments: two byte-level BPE tokenizers trained on synthetic prose and code. Tokenizing is timed apart. The
number to watch is the last line: alignment and weights together (components, closure, the mean over each component,
EOS).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._smoke import add_smoke
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.alignment import align
from stages.weighting.weights.base import ResponseBatch, Tokens


def synthetic_texts(count: int, seed: int = 0) -> list[str]:
    """Prose of made-up words and indented code, partly not ASCII."""
    chance = random.Random(seed)
    syllables = ["ta", "lor", "swi", "ft", "ing", "er", "qu", "al", "ité", "ß", "東", "st", "un", "des", "ment"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(3000)]
    endings = [" ", " ", " ", " ", ", ", ". ", ".\n\n", "\n    ", " = ", "(", "); ", "  "]
    return [
        "".join(word + chance.choice(endings) for word in chance.choices(words, k=chance.randint(40, 400)))
        for _ in range(count)
    ]


def train_tokenizer(texts: list[str], size: int, prefix_space: bool):
    """A byte-level BPE tokenizer of `size` tokens, trained on the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str):
    """The tokenizer of a model directory, or of a tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    return Tokenizer.from_file(str(file))


def tokens_of(tokenizer, texts: list[str]) -> Tokens:
    """Ids and spans of the texts, with an EOS behind each, as a ground truth has."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [[*encoding.ids, 0] for encoding in encoded]
    return Tokens.of(ids, [encoding.offsets for encoding in encoded], [True] * len(texts))


def read_texts(path: Path, count: int) -> list[str]:
    """The first `count` lines of a file; \\n in a line is a newline."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines[:count]]


def report(name: str, work: Callable[[], object], tokens: int, repeats: int) -> None:
    """Time `work` and print its rate in student tokens per second."""
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        rates.append(tokens / (time.perf_counter() - began))
    spread = f"median of {repeats}, {min(rates):,.0f} to {max(rates):,.0f}"
    print(f"{name}: {statistics.median(rates):,.0f} student tokens/s on one core ({spread})")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment")
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--text", type=Path, help="responses, one per line (\\n in a line is a newline)")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.responses, options.repeats = 64, 1
    texts = read_texts(options.text, options.responses) if options.text else synthetic_texts(options.responses)
    student = load_tokenizer(options.student) if options.student else train_tokenizer(texts, 2000, False)
    teacher = load_tokenizer(options.teacher) if options.teacher else train_tokenizer(texts, 6000, False)
    began = time.perf_counter()
    student_tokens, teacher_tokens = tokens_of(student, texts), tokens_of(teacher, texts)
    seconds = time.perf_counter() - began
    count = len(student_tokens.ids)
    print(f"{len(texts)} responses, {count} student and {len(teacher_tokens.ids)} teacher tokens")
    print(f"tokenized in {seconds:.2f} s")
    generator = np.random.default_rng(0)
    provider = WEIGHTS.get("swift")
    config = provider.Config()
    batch = ResponseBatch(
        [str(number) for number in range(len(texts))],
        np.ones(len(texts), dtype=bool),
        student_tokens,
        {"reference": -generator.exponential(2.0, count)},
        texts,
        teacher_tokens,
        -generator.exponential(2.0, len(teacher_tokens.ids)),
    )
    report("alignment", lambda: align(texts, student_tokens, teacher_tokens), count, options.repeats)
    report("alignment and weights", lambda: provider.weights(config, batch), count, options.repeats)


if __name__ == "__main__":
    main()
