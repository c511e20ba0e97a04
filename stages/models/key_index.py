"""Stages - where the rows of the log-prob store lie: millions of 16-byte keys, at 24 bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

KEY_BYTES = 16
UNSORTED = 2**15
"""Keys that wait in a dict, at 200 bytes each, until they are sorted in."""


class KeyIndex:
    """Maps keys of 16 bytes to whole numbers; the first number given for a key stays."""

    def __init__(self) -> None:
        # Sorted by the first half of the key. Two of a million keys share one with the probability 3e-8.
        self._first = np.zeros(0, np.uint64)
        self._second = np.zeros(0, np.uint64)
        self._numbers = np.zeros(0, np.int64)
        self._unsorted: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._numbers) + len(self._unsorted)

    def add(self, keys: Sequence[bytes], numbers: Iterable[int]) -> None:
        """Remember a number for each key that has none."""
        for key, number, present in zip(keys, numbers, self.find(keys), strict=True):
            if present < 0:
                self._unsorted.setdefault(key, number)
        if len(self._unsorted) > UNSORTED:
            self._sort_in()

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The number of each key; -1 for a key that has none."""
        first, second = _halves(keys)
        positions = np.searchsorted(self._first, first).tolist()
        unsorted = self._unsorted
        return [
            unsorted[key] if key in unsorted else self._sorted_number(position, first[row], second[row])
            for row, (key, position) in enumerate(zip(keys, positions, strict=True))
        ]

    def _sorted_number(self, position: int, first: np.uint64, second: np.uint64) -> int:
        while position < len(self._first) and self._first[position] == first:
            if self._second[position] == second:
                return int(self._numbers[position])
            position += 1
        return -1

    def _sort_in(self) -> None:
        first, second = _halves(list(self._unsorted))
        numbers = np.fromiter(self._unsorted.values(), np.int64, len(self._unsorted))
        self._unsorted = {}
        # One column after the other: of millions of keys, no two columns are held twice at a time.
        order = np.argsort(np.concatenate([self._first, first]), kind="stable")
        self._first = np.concatenate([self._first, first])[order]
        self._second = np.concatenate([self._second, second])[order]
        self._numbers = np.concatenate([self._numbers, numbers])[order]


def _halves(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last eight bytes of each key, as numbers."""
    halves = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]
