"""Flows - what the report shows of per-token weights: their histogram, and examples token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from data_contracts.artifact import ArtifactRef
from data_contracts.shards import read_columns
from flows.report.story import SIDES, ShownPrompt, TokenPieces, WeightPicture, shown_prompts
from tasks.build import Built

MOST_TOKENS = 2_000_000
"""Weights that a histogram reads; of a larger artifact, the first shards."""


def weight_picture(weighed: Built, trained: Built, prompts: ArtifactRef | None = None) -> WeightPicture | None:
    """Return histogram and examples of the token weights; None where all of them are one.

    prompts: of the pairs, to name the examples.
    """
    metrics = weighed.record.metrics
    ends = [
        metrics[f"weights/{side}/{end}"]
        for side in ("chosen", "rejected")
        for end in ("min", "max")
        if f"weights/{side}/{end}" in metrics
    ]
    if all(abs(end - 1.0) < 1e-6 for end in ends):
        return None
    sides: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    read = 0
    paths = sorted(Path(weighed.ref.path).glob("part-*.parquet"))
    for path in paths:
        table = read_columns(path, [f"{side}_weights" for side in sides])
        for side, arrays in sides.items():
            column = cast(pa.ListArray, table[f"{side}_weights"].combine_chunks())
            arrays.append(column.flatten().to_numpy())
            read += len(arrays[-1])
        if read >= MOST_TOKENS:
            break
    low, high = min(ends), max(ends)
    edges = np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, high + 0.5, 41)
    parts = {side: np.concatenate(arrays) for side, arrays in sides.items()}
    bins = {
        side: list(np.histogram(values, edges)[0] / len(values)) if len(values) else []
        for side, values in parts.items()
    }
    clamped = {
        name.removeprefix("weights/"): value for name, value in metrics.items() if re.search(r"\bat_[LU]\b", name)
    }
    tokenizer = Path(trained.ref.path) / "tokenizer.json"  # the policy's; the policy itself may lie elsewhere now
    return WeightPicture(
        list(map(float, edges)),
        bins["chosen"],
        bins["rejected"],
        clamped,
        read,
        _token_examples(paths[0], tokenizer, prompts) if paths else [],
    )


def _token_examples(
    shard: Path, tokenizer_file: Path, prompts: ArtifactRef | None, count: int = 4, longest: int = 300
) -> list[TokenPieces]:
    """The pairs of a shard whose weights vary most, as (text, weight) per token.

    Needs the policy's tokenizer.json; else none.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return []
    if not tokenizer_file.is_file():
        return []
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    columns = ["prompt_id", "chosen_ids", "chosen_weights", "rejected_ids", "rejected_weights"]
    rows = read_columns(shard, columns).slice(0, 500).to_pylist()
    rows.sort(key=lambda row: (-float(np.std(row["chosen_weights"] or [0.0])), row["prompt_id"]))
    shown = {} if prompts is None else shown_prompts(prompts, [row["prompt_id"] for row in rows[:count]])
    examples = []
    for row in rows[:count]:
        prompt = shown.get(row["prompt_id"], ShownPrompt(row["prompt_id"], ""))
        sides = {
            side: token_pieces(tokenizer, row[f"{side}_ids"][:longest], row[f"{side}_weights"][:longest])
            for side in SIDES
        }
        name = row["prompt_id"] if prompt.name == row["prompt_id"] else ""  # an id that nobody wrote says nothing
        examples.append(TokenPieces(name, prompt.text, sides))
    return examples


def token_pieces(tokenizer: Any, ids: Sequence[int], weights: Sequence[float]) -> list[tuple[str, float]]:
    """The text that each token adds.

    A character made of several tokens is shown with the last of them, at their mean weight.
    """
    pieces: list[tuple[str, float]] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        context = ids[max(0, begin - 4) : begin]
        before = tokenizer.decode(context, skip_special_tokens=False) if context else ""
        piece = tokenizer.decode([*context, *ids[begin:end]], skip_special_tokens=False)[len(before) :]
        if piece.endswith("\ufffd") and end < len(ids) and end - begin < 4:
            continue
        pieces.append((piece, float(np.mean(weights[begin:end]))))
        begin = end
    return pieces
