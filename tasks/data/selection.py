"""Tasks - which of the rows that could be used a run uses: shares of a mix, a held-out part, the rows that a pairing
can read.

Functions return the rows that stay and, as `Drops`, why the others do not.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pyarrow.compute as pc

from data_contracts.near_duplicates import NearDuplicateIndex
from data_contracts.prompts import PromptRow, name_of, text_of
from tasks.data.drops import REPETITION, Drops
from tasks.data.prompt_set import PromptSet

SAME_PROMPT = f"{REPETITION}'s prompt: its answers are not read by this run"
NO_PARTNER = "an answer without a partner: a pair needs a good and a bad one of the same prompt"
NEARLY_HELD_OUT = "nearly a held-out prompt"


def mixed(parts: Sequence[PromptSet], weights: Sequence[float], limit: int | None, seed: int) -> list[PromptSet]:
    """Of each part the share that its weight says, drawn by `seed`: as many rows as the scarcest one allows, or
    `limit`."""
    shares = np.asarray(weights, float) / sum(weights)
    total = math.floor(min(len(part) / share for part, share in zip(parts, shares, strict=True)) + 1e-9)
    total = total if limit is None else min(total, limit)
    sizes = np.floor(shares * total + 1e-9).astype(int)
    largest_remainders = np.argsort(sizes - shares * total, kind="stable")
    sizes[largest_remainders[: total - sizes.sum()]] += 1
    return [
        part.take(np.sort(np.random.default_rng([seed, 2, number]).permutation(len(part))[:size]))
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]


def split_heldout(prompts: PromptSet, share: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Training and held-out rows: of the different prompts, the share whose digests are smallest, which the seed
    decides.

    All rows of a prompt are on the same side; of a held-out prompt, the first one.
    """
    digests = _prompt_digests(prompts, seed.to_bytes(16, "little", signed=True))
    different, first = np.unique(digests, return_index=True)
    count = max(1, round(share * len(different)))
    return prompts.take(np.flatnonzero(~np.isin(digests, different[:count]))), prompts.take(np.sort(first[:count]))


def different_prompts(prompts: PromptSet) -> tuple[PromptSet, Drops]:
    """Each prompt once. Rows whose writer gave them ids of their own stay: they are meant to be several."""
    drops, dropped = Drops(), []
    digests = _prompt_digests(prompts)
    different, first = np.unique(digests, return_index=True)
    later = np.setdiff1d(np.arange(len(prompts)), first)
    for index, earlier in zip(later, first[np.searchsorted(different, digests[later])], strict=True):
        row = prompts[int(index)]
        if row["prompt_id"].startswith(f"{prompts[int(earlier)]['prompt_id']}-"):
            dropped.append(index)
            place = prompts.where(int(index))
            drops.add(SAME_PROMPT, place, f"{place} repeats {prompts.where(int(earlier))}: {name_of(row)}")
    return _without(prompts, dropped), drops


def paired(prompts: PromptSet) -> tuple[PromptSet, Drops]:
    """Pairs only: a single good answer and a single bad one of the same prompt make a pair, in their order."""
    drops = Drops()
    if not has_single_answers(prompts):
        return prompts, drops
    waiting: dict[tuple[bytes, str], deque[tuple[int, PromptRow]]] = defaultdict(deque)
    rows: list[PromptRow] = []
    origins: list[int] = []
    for index, row in enumerate(prompts):
        if (row["chosen"] is None) == (row["rejected"] is None):
            rows.append(row)
            origins.append(index)
            continue
        side, other = ("chosen", "rejected") if row["rejected"] is None else ("rejected", "chosen")
        prompt = _prompt_digest(row)
        if partners := waiting[prompt, other]:
            origin, earlier = partners.popleft()
            rows.append(cast("PromptRow", {**earlier, side: row[side]}))
            origins.append(origin)
        else:
            waiting[prompt, side].append((index, row))
    for index, row in sorted((item for queue in waiting.values() for item in queue), key=lambda item: item[0]):
        drops.add(NO_PARTNER, prompts.where(index), f"{prompts.where(index)}: {name_of(row)}")
    return PromptSet.of(rows, prompts.places[origins], prompts.files, prompts.unit), drops


def has_single_answers(prompts: PromptSet) -> bool:
    """Whether any row holds a good answer alone, or a bad one."""
    single = pc.xor(pc.is_null(prompts.column("chosen")), pc.is_null(prompts.column("rejected")))
    return bool(pc.any(single).as_py())


def with_field(prompts: PromptSet, field: str, reason: str) -> tuple[PromptSet, Drops]:
    """The rows that have a `response`, or a pair."""
    missing = np.flatnonzero(pc.is_null(prompts.column(field)).to_numpy()).tolist()
    return without(prompts, {index: name_of(prompts[index]) for index in missing}, reason)


def with_answer(prompts: PromptSet, reason: str) -> tuple[PromptSet, Drops]:
    """The rows that have a `chosen` or a `rejected` answer, or both."""
    missing = pc.and_(pc.is_null(prompts.column("chosen")), pc.is_null(prompts.column("rejected")))
    indices = np.flatnonzero(missing.to_numpy()).tolist()
    return without(prompts, {index: name_of(prompts[index]) for index in indices}, reason)


def near_heldout(train: PromptSet, heldout: PromptSet, similarity: float) -> dict[int, str]:
    """The training rows that are nearly a held-out prompt, each with a sentence that names both."""
    index = NearDuplicateIndex(map(text_of, heldout), similarity)
    near: dict[int, str] = {}
    for number, row in enumerate(train):
        if similar := index.similar_to(text_of(row)):
            closest, value = max(similar, key=lambda match: match[1])
            near[number] = f"{name_of(row)} and held-out {name_of(heldout[closest])} (similarity {value:.2f})"
    return near


def without(prompts: PromptSet, dropped: Mapping[int, str], reason: str | Mapping[int, str]) -> tuple[PromptSet, Drops]:
    """The other rows. dropped: a sentence for each row that goes, by its number; reason: of all, or of each."""
    drops = Drops()
    for index, sentence in dropped.items():
        why = reason if isinstance(reason, str) else reason[index]
        drops.add(why, prompts.where(index), f"{prompts.where(index)}: {sentence}")
    return _without(prompts, list(dropped)), drops


def _without(prompts: PromptSet, dropped: Sequence[int] | np.ndarray) -> PromptSet:
    return prompts.take(np.delete(np.arange(len(prompts)), np.asarray(dropped, np.int64)))


def _prompt_digests(prompts: PromptSet, salt: bytes = b"") -> np.ndarray:
    """64 bits of each row's messages."""
    digests = (int.from_bytes(_prompt_digest(row, salt), "little") for row in prompts)
    return np.fromiter(digests, np.uint64, len(prompts))


def _prompt_digest(row: PromptRow, salt: bytes = b"") -> bytes:
    text = "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in row["messages"])
    return hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
