"""Stages - metrics of a whole `scored_pairs` artifact, added up shard by shard: no more than one shard is in memory."""

from __future__ import annotations

from collections import Counter
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.scoring.pairing import PairStatistics, pair_statistics
from stages.scoring.shortcuts import PREFIX, Ends, causes, sentences, told_apart

SIDES = ("chosen", "rejected")
NUM_EXAMPLES = 3


class ScoreTotals:
    """Sums over the shards that were added."""

    def __init__(self) -> None:
        self.pairs = 0
        self.dropped: Counter[str] = Counter()
        """Prompts that give no row, by reason."""
        self.examples: list[str] = []
        """The first of them."""
        self._spoilt: Counter[str] = Counter()
        self._tokens = dict.fromkeys(SIDES, 0)
        self._win_rates = dict.fromkeys(SIDES, 0.0)
        self._ends: list[Ends] = []
        self._points, self._num_points, self._num_scored = 0.0, 0, 0
        self._comparisons: PairStatistics | None = None
        """None: the scorer does not compare pairs."""
        self._num_uncompared = 0

    def add(self, pairs: pa.Table, raw: pa.Table, dropped: pa.Table) -> None:
        """Add one shard: tables of `scored_pairs`, `scores` and `dropped`."""
        self.pairs += pairs.num_rows
        self.dropped.update(cast("list[str]", dropped["reason"].to_pylist()))
        if len(self.examples) < NUM_EXAMPLES:
            prompt_ids = cast("list[str]", dropped["prompt_id"].to_pylist())
            self.examples = [*self.examples, *prompt_ids][:NUM_EXAMPLES]
        self._spoilt.update(reason for row in raw["reasons"].to_pylist() for reason in row or () if reason)
        self._add_points(raw)
        self._add_comparisons(raw)
        if pairs.num_rows:
            for side in SIDES:
                self._tokens[side] += int(pc.list_value_length(pairs[f"{side}_ids"]).to_numpy().sum())
                self._win_rates[side] += float(pairs[f"win_rate_{side}"].to_numpy().sum())
            ends = Ends.of_table(pairs)
            self._ends.append(Ends(*(column.astype(np.int32) for column in ends)))  # of a million pairs, 24 MB

    def _add_points(self, raw: pa.Table) -> None:
        points = [value for row in raw["scores"].to_pylist() if row is not None for value in row]
        scored = np.array([value for value in points if value is not None], dtype=float)
        self._points += float(scored.sum())
        self._num_points += len(points)
        self._num_scored += len(scored)

    def _add_comparisons(self, raw: pa.Table) -> None:
        flat = [row for row in raw["preference_logits"].to_pylist() if row is not None]
        if not flat:
            return
        matrices = [np.array(row, dtype=float).reshape(round(len(row) ** 0.5), -1) for row in flat]
        matrices = [matrix for matrix in matrices if matrix.size]
        self._num_uncompared += sum(int(np.isnan(matrix).any(axis=1).sum()) for matrix in matrices)
        statistics = pair_statistics(matrices)
        self._comparisons = statistics if self._comparisons is None else _added(self._comparisons, statistics)

    def metrics(self, num_prompts: int) -> dict[str, float]:
        """What the record says of the artifact."""
        metrics: dict[str, float] = {"pairs": self.pairs, "drop_rate": self.dropped.total() / num_prompts}
        metrics |= {f"dropped/{reason}": count for reason, count in self.dropped.items()}
        metrics |= {f"spoilt/{reason}": count for reason, count in self._spoilt.items()}
        metrics["unscored"] = self._num_points - self._num_scored
        if self._num_scored:
            metrics["mean_score"] = self._points / self._num_scored
        if self._comparisons is not None:  # candidates without a whole row of comparisons
            metrics["unscored"] = self._num_uncompared
            metrics |= {f"pairwise/{name}": value for name, value in self._comparisons.rates().items()}
        if self.pairs:
            for side in SIDES:
                metrics[f"mean_tokens/{side}"] = self._tokens[side] / self.pairs
                metrics[f"win_rate/{side}"] = self._win_rates[side] / self.pairs
            metrics |= {f"{PREFIX}{name}": share for name, share in told_apart(self._all_ends()).items()}
        return metrics

    def warnings(self) -> list[str]:
        """A sentence for each feature by which chosen and rejected can be told apart."""
        if not self.pairs:
            return []
        ends = self._all_ends()
        shares = told_apart(ends)
        return sentences(shares, causes(ends, shares))

    def _all_ends(self) -> Ends:
        if len(self._ends) > 1:
            self._ends = [Ends(*(np.concatenate(column) for column in zip(*self._ends, strict=True)))]
        return self._ends[0]


def _added(left: PairStatistics, right: PairStatistics) -> PairStatistics:
    """Return the statistics of both shards together."""
    return PairStatistics(
        left.pairs + right.pairs,
        left.bias + right.bias,
        left.width + right.width,
        left.decided_by_order + right.decided_by_order,
        left.triples + right.triples,
        left.cyclic + right.cyclic,
    )
