"""Contracts - words: numbers as a sentence for people needs them."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Return `count` with its noun.

    >>> plural(1, "shard"), plural(3, "shard")
    ('1 shard', '3 shards')
    """
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def format_bytes(count: float) -> str:
    """Return a number of bytes in its largest unit.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"
