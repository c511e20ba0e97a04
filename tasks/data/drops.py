"""Tasks - the rows that nothing can be made of: how many for which reason, where they are, and how to mend them."""

from __future__ import annotations

from collections import Counter, defaultdict

from data_contracts.errors import ConfigError

REPETITION = "an exact repetition of an earlier row"
SHOWN_PLACES = 8
SHOWN_EXAMPLES = 3
SHOWN_TEXT = 200


class Drops:
    """Dropped rows by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: defaultdict[str, list[str]] = defaultdict(list)
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, place: str, example: str) -> None:
        """Count one row; of the first ones, their places are kept, and a sentence on each of the very first."""
        self.counts[reason] += 1
        if len(self.places[reason]) < SHOWN_PLACES:
            self.places[reason].append(place)
        if len(self.examples[reason]) < SHOWN_EXAMPLES:
            self.examples[reason].append(_shown(example))

    def update(self, other: Drops) -> None:
        """Add another set's drops."""
        self.counts.update(other.counts)
        for reason in other.counts:
            self.places[reason] = (self.places[reason] + other.places[reason])[:SHOWN_PLACES]
            self.examples[reason] = (self.examples[reason] + other.examples[reason])[:SHOWN_EXAMPLES]

    @property
    def unusable(self) -> int:
        """Rows that are lost. What an earlier row says is not."""
        return sum(count for reason, count in self.counts.items() if not reason.startswith(REPETITION))

    def check(self, origin: str, rows: int, max_drop_rate: float, advice: str = "") -> None:
        """Raises: ConfigError with all problems, and `advice` on them, if this part of the rows, or more, is unusable."""
        if self.unusable and self.unusable >= max_drop_rate * rows:
            raise ConfigError(
                f"{origin}: {self.unusable} of {rows} rows cannot be used (limit: {max_drop_rate:.0%}, "
                f"prompts.max_drop_rate)\n{self.text()}\n"
                "Mend or remove these rows, say with `columns` what the columns hold, or raise the limit"
                + (f"; {advice}" if advice else "")
            )

    def text(self, indent: str = "  ") -> str:
        """A paragraph for each reason, the most frequent first: count, places, examples."""
        lines: list[str] = []
        for reason, count in self.counts.most_common():
            places = self.places[reason]
            more = f" and {count - len(places)} more" if count > len(places) else ""
            lines.append(f"{indent}{count}  {reason}: {', '.join(places)}{more}")
            lines += [f"{indent}     {example}" for example in self.examples[reason]]
        return "\n".join(lines)


def _shown(text: str) -> str:
    text = text.replace("\n", " ")
    if len(text) <= SHOWN_TEXT:
        return text
    return text[:SHOWN_TEXT] + "..."
