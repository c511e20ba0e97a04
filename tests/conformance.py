"""python -m tests.conformance PATH [--dtype float32]: every case of a vector file through the code that training and
weighting run.

A vector file is {"cases": [{id, kind, call, args, diff, expect}]}: `call` names a formula, `expect` its value and
gradients (losses) or its result (weights), computed elsewhere. Each loss case becomes one row of a batch of three, with
padding that holds noise on both sides; each weight case one response among others. Any name of a call that is not in
CALLS fails. A list of conversations instead (turns.json) is held against the turn contract, with the tokenizers in
`--tokenizers`. The last line is `N passed, M failed`; the exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.methods import METHODS, preferences
from stages.methods.base import Pairs, Responses
from stages.methods.tidpo import triplet_loss
from stages.models.numerics import kl_divergence, token_logps
from stages.scoring.base import Scores
from stages.scoring.pairing import best_vs_worst, group_of
from stages.weighting.rows import mixture
from stages.weighting.weights import WEIGHTS, swift, swift_released, tis_dpo
from stages.weighting.weights.alignment import align, merge_empty
from stages.weighting.weights.base import ResponseBatch, Tokens
from tests.turn_conformance import check_turns

Row = Sequence[float] | torch.Tensor
DECOYS = (2, 6)
"""Lengths of the rows that share the batch with the case."""


class Batcher:
    """Pads rows into [B, T] tensors: noise on the left and the right, and other responses above and below."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.random = np.random.default_rng(7)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.normal(-1.5, 1.0, shape)).to(self.dtype)

    def pad(self, rows: list[torch.Tensor], left: int = 2, right: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """[len(rows), left + longest + right, ...] and its mask. Gradients flow to the rows."""
        width = left + max(len(row) for row in rows) + right
        padded, mask = [], torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            behind = width - left - len(row)
            padded.append(torch.cat([self.noise(left, *row.shape[1:]), row, self.noise(behind, *row.shape[1:])]))
            mask[number, left : left + len(row)] = True
        return torch.stack(padded), mask

    def around(self, row: Row) -> list[torch.Tensor]:
        """The case's row between two decoys: it is number 1 of 3."""
        row = self.tensor(row)
        return [self.noise(DECOYS[0], *row.shape[1:]), row, self.noise(DECOYS[1], *row.shape[1:])]

    def responses(
        self,
        policy: list[torch.Tensor],
        reference: list[torch.Tensor] | None = None,
        weights: list[torch.Tensor] | None = None,
        **more: Any,
    ) -> Responses:
        """One side of a batch, from a list of per-token rows."""
        logps, mask = self.pad(policy)
        ones = torch.ones_like(logps).detach()
        others = {name: self.pad(rows)[0].detach() for name, rows in more.items()}
        return Responses(
            logps,
            None if reference is None else self.pad(reference)[0].detach(),
            ones if weights is None else self.pad(weights)[0].detach(),
            mask,
            **others,
        )

    def side(self, policy: Row, reference: Row | None = None, weights: Row | None = None) -> Responses:
        """The case's response between decoys."""

        def surround(values: Row | None) -> list[torch.Tensor] | None:
            return None if values is None else self.around(values)

        return self.responses(self.around(policy), surround(reference), surround(weights))

    def from_logits(
        self, policy: Row, reference: Row, ids: Sequence[int], weights: Row | None, kl: str | None
    ) -> Responses:
        """The same from two models' logits, as the trainer makes them."""
        logits, mask = self.pad(self.around(policy))
        other, _ = self.pad(self.around(reference))
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        tokens[1, mask[1]] = torch.tensor(ids, dtype=torch.long)
        both = {"kl_policy_reference": (logits, other), "kl_reference_policy": (other, logits)}
        ones = torch.ones_like(self.tensor([1.0] * len(ids)))
        return Responses(
            token_logps(logits, tokens, mask),
            token_logps(other, tokens, mask),
            self.pad(self.around(ones if weights is None else weights))[0],
            mask,
            kl=None if kl is None else kl_divergence(*both[kl], mask, chunk=3),
            logits=logits,
        )

    def tensor(self, values: Any) -> torch.Tensor:
        return values.to(self.dtype) if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=self.dtype)

    def column(self, value: float) -> torch.Tensor:
        """A number per row [3]; the decoys get others."""
        return torch.tensor([0.25, value, 0.75], dtype=self.dtype)

    def pairs(self, chosen: Responses, rejected: Responses | None, **more: Any) -> Pairs:
        count = len(chosen.logps)
        defaults = {
            "win_rate_chosen": torch.ones(count, dtype=self.dtype),
            "win_rate_rejected": torch.zeros(count, dtype=self.dtype),
        }
        return Pairs(chosen, rejected, **{**defaults, **more})


def settings(args: dict[str, Any], **renamed: str) -> dict[str, Any]:
    """The case's arguments under the config's field names; those it leaves out keep the formula's default."""
    return {field: args[name] for field, name in renamed.items() if name in args}


def loss_of(name: str, config: dict[str, Any], pairs: Pairs) -> torch.Tensor:
    """Row 1 of a pair loss: the case among its decoys."""
    method = METHODS.get(name)
    result = method.pair_loss(method.Config(**config), pairs)
    return result.share(1, 1) if len(result.loss) == 1 else result.loss[1]


def batch_loss(name: str, config: dict[str, Any], pairs: Pairs, cut: int | None = None) -> torch.Tensor:
    """A whole batch as the loop reduces it: by counts of the step, over micro-batches of unequal size."""
    method = METHODS.get(name)
    config = method.Config(**config)
    rows = len(pairs.chosen.logps)
    tokens = float(method.token_count(config, pairs).sum())
    cut = min(max(rows // 3, 1), rows) if cut is None else cut
    parts = [part for part in (take(pairs, slice(0, cut)), take(pairs, slice(cut, rows))) if len(part.chosen.logps)]
    return sum(method.pair_loss(config, part).share(rows, tokens) for part in parts)


def take(value: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim else value
    if isinstance(value, Pairs | Responses):
        return type(value)(*(take(part, rows) for part in value))
    return {name: take(part, rows) for name, part in value.items()} if hasattr(value, "items") else value


# ---- pair losses on per-token log-probs


def _pair(name: str, fields: Callable[[dict[str, Any]], dict[str, Any]], roles: str = "wl", **more: str) -> Callable:
    """A call whose loss is one pair's, from log-probs: pol_<role>, ref_<role> and perhaps g_<role>."""
    first, second = roles.split("/") if "/" in roles else (roles[0], roles[1])

    def run(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
        sides = [
            batcher.side(args[f"pol_{role}"], args.get(f"ref_{role}", args.get(f"opp_{role}")), args.get(f"g_{role}"))
            for role in (first, second)
        ]
        columns = {field: batcher.column(args[argument]) for field, argument in more.items()}
        return loss_of(name, fields(args), batcher.pairs(*sides, **columns))

    return run


def kto_pair(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    drift = torch.tensor(args["c"] / args["beta"], dtype=batcher.dtype)
    if drift < 0:
        raise ValueError("c is beta times a KL estimate, which is never negative")
    pairs = batcher.pairs(
        batcher.side(args["pol_w"], args["ref_w"]),
        batcher.side(args["pol_l"], args["ref_l"]),
        step_means={"mismatched_log_ratio": drift},
    )
    return loss_of("kto_pair", {"beta": args["beta"]}, pairs)


def tgdpo_loss(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    config = settings(args, alpha="alpha", beta_r="beta_r", kind="kind", floor="floor")
    sides = []
    for role, chosen in (("w", True), ("l", False)):
        roles = {"reward_model": args[f"rm_{role}"], "reference": args[f"ref_{role}"]}
        weights, _ = provided("tgdpo", config, roles, chosen)
        sides.append(batcher.side(args[f"pol_{role}"], args[f"ref_{role}"], weights))
    return loss_of("tgdpo", {"beta": args["beta"]}, batcher.pairs(*sides))


def inpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    """INPO, or with a history MNPO: the opponents' log-probs are mixed as the weigh stage mixes them."""
    config, sides = settings(args, eta="eta", rho="rho"), []
    for role in "wl":
        old = args.get(f"old_{role}")
        if old is None:
            method = METHODS.get("mnpo")
            config |= {"lambdas": args["lambdas"]}
            lambdas = method.opponents(method.Config(**config), len(args["lambdas"]))
            old = mixture([np.asarray(row, dtype=np.float64) for row in args[f"history_{role}"]], lambdas).tolist()
        side = batcher.side(args[f"pol_{role}"], args[f"start_{role}"])
        sides.append(side._replace(old_logps=batcher.pad(batcher.around(old))[0].detach()))
    return loss_of("mnpo" if "lambdas" in config else "inpo", config, batcher.pairs(*sides))


def opd(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    provider, config = "opd", settings(args, coef="coef")
    if args.get("gamma") is not None:
        provider, config = "iw_opd", {"gamma": args["gamma"], "of": {"name": "opd"} | config}
    weights = teacher_weights(provider, config, args)
    side = batcher.responses([batcher.tensor(args["pol"])], None, [batcher.tensor(weights)])
    side = side._replace(old_logps=batcher.pad([batcher.tensor(args["old"])])[0].detach())
    return batch_loss("opd", {}, batcher.pairs(side, None))


def teacher_weights(provider: str, config: dict[str, Any], args: dict[str, Any]) -> np.ndarray:
    """What a provider that compares with a teacher of the same tokenizer gives the case's response."""
    tokens, teacher = flat(args["teacher"])
    return provided(provider, config, {"reference": args["old"]}, True, teacher=tokens, teacher_logps=teacher)[0]


def tidpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    config = settings(args, beta="beta", gamma="gamma", margin="margin", lengths="lengths") | {"importance": "given"}
    pairs = batcher.pairs(
        batcher.side(args["pol_w"], args["ref_w"], args["w_w"]),
        batcher.side(args["pol_l"], args["ref_l"], args["w_l"]),
        anchor=batcher.side(args["pol_y"], args["ref_y"]),
    )
    return loss_of("tidpo", config, pairs)


def triplet(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    sides = [batcher.side(args[role], torch.zeros(len(args[role]), dtype=batcher.dtype)) for role in ("d", "b", "c")]
    return triplet_loss(*sides, args["margin"], args.get("lengths", "overlap"))[1]


# ---- pair losses on logits


def _from_logits(name: str, fields: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
    def run(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
        method = METHODS.get(name)
        config = fields(args)
        kl = next((need for need in method.needs(method.Config(**config)) if need.startswith("kl_")), None)
        sides = [
            batcher.from_logits(args[f"pl_{role}"], args[f"rl_{role}"], args[f"ids_{role}"], args.get(f"w_{role}"), kl)
            for role in "wl"
        ]
        return loss_of(name, config, batcher.pairs(*sides))

    return run


def tdpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    constant = args.get("kl_w_const")
    run = _from_logits("tdpo", lambda args: settings(args, beta="beta", alpha="alpha", version="version"))
    if constant is None or args.get("version", 2) == 1:
        return run(batcher, args)
    # For finite differences of the stopped term only: a kl tensor without gradient that sums to the constant.
    config = METHODS.get("tdpo").Config(**settings(args, beta="beta", alpha="alpha", version="version"))
    sides = [
        batcher.from_logits(args[f"pl_{role}"], args[f"rl_{role}"], args[f"ids_{role}"], None, "kl_reference_policy")
        for role in "wl"
    ]
    fixed = torch.zeros_like(sides[0].logps).masked_scatter(
        sides[0].mask, torch.zeros(int(sides[0].mask.sum()), dtype=batcher.dtype)
    )
    fixed[1, sides[0].mask[1].nonzero()[0]] = constant
    pairs = batcher.pairs(sides[0]._replace(kl=fixed), sides[1])
    return METHODS.get("tdpo").pair_loss(config, pairs).loss[1]


# ---- losses of whole batches and of single responses


def kto(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    method, config = METHODS.get("kto"), settings(args, beta="beta", lam_d="lam_d", lam_u="lam_u")
    drift = [torch.tensor([value], dtype=batcher.dtype) for value in args["kl_logratios"]]
    mismatched = batcher.responses(drift, [torch.zeros_like(row) for row in drift])
    labels = torch.tensor(args["desirable"], dtype=batcher.dtype)
    pairs = batcher.pairs(
        batcher.responses(rows(batcher, args["pols"]), rows(batcher, args["refs"])),
        None,
        win_rate_chosen=labels,
        win_rate_rejected=None,
    )
    values = method.step_values(method.Config(**config), pairs._replace(mismatched=mismatched))
    return batch_loss("kto", config, pairs._replace(step_means={name: value.mean() for name, value in values.items()}))


def cpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    sides = [batcher.responses(rows(batcher, args[role])) for role in ("chosen", "rejected")]
    return batch_loss("cpo", settings(args, beta="beta", lam="lam"), batcher.pairs(*sides))


def tpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    chosen, rejected, gold = (batcher.responses(rows(batcher, args[role])) for role in ("chosen", "rejected", "gold"))
    config = settings(args, beta="beta", alpha="alpha", length_normalised="length_normalised", gamma="gamma")
    return batch_loss("tpo", config, batcher.pairs(chosen, rejected, gold=gold))


def sft(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    return batch_loss("sft", {}, batcher.pairs(batcher.responses(rows(batcher, [args["pol"]])), None))


def sppo_k(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    rates = preferences.win_rates(np.asarray(args["pref"]))
    config = {"eta": args["eta"], "keep": "all", "log_z": args.get("log_z") is not None}
    values = {"log_z": torch.full((len(rates),), args["log_z"], dtype=batcher.dtype)} if config["log_z"] else {}
    side = batcher.responses(rows(batcher, args["pols"]), rows(batcher, args["refs"]))
    return batch_loss(
        "sppo",
        config,
        batcher.pairs(side, None, win_rate_chosen=torch.from_numpy(rates).to(batcher.dtype), values=values),
    )


def grpo(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    side = batcher.responses(
        rows(batcher, args["pols"]), rows(batcher, args["refs"]), old_logps=rows(batcher, args["olds"])
    )
    values = {"advantage": torch.tensor(args["adv"], dtype=batcher.dtype)}
    return batch_loss(
        "grpo",
        settings(args, eps_low="eps_low", eps_high="eps_high", beta="beta"),
        batcher.pairs(side, None, values=values),
    )


def rows(batcher: Batcher, values: Any) -> list[torch.Tensor]:
    return [batcher.tensor(row) for row in values]


def _single(batcher: Batcher, policy: Row, teacher: Row, ids: Sequence[int] | None = None) -> Pairs:
    """One response and its teacher's logits, padded on both sides, alone: per-token means must see its tokens only."""
    logits, mask = batcher.pad([batcher.tensor(policy)])
    other, teacher_mask = batcher.pad([batcher.tensor(teacher)])
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[0, mask[0]] = torch.tensor([0] * len(policy) if ids is None else ids, dtype=torch.long)
    side = Responses(
        token_logps(logits, tokens, mask),
        None,
        torch.ones_like(mask, dtype=batcher.dtype),
        mask,
        logits=logits,
        teacher_logits=other,
        teacher_mask=teacher_mask,
    )
    return batcher.pairs(side, None)


def kd(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    config = settings(args, tau="tau", direction="direction", scale_tau2="scale_tau2") | {"rate": 1.0}
    return batch_loss("kd", config, _single(batcher, args["student_logits"], args["teacher_logits"]))


def jsd(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    config = settings(args, tau="tau", beta="beta") | {"rate": 1.0, "direction": "jsd"}
    return batch_loss("kd", config, _single(batcher, args["student_logits"], args["teacher_logits"]))


def kd_mixed(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    return batch_loss(
        "kd",
        settings(args, tau="tau", rate="rate"),
        _single(batcher, args["student_logits"], args["teacher_logits"], args["ids"]),
    )


def uld(batcher: Batcher, args: dict[str, Any]) -> torch.Tensor:
    return batch_loss("uld", {"rate": 1.0}, _single(batcher, args["student_logits"], args["teacher_logits"]))


# ---- weights: one response among others, in the flat batch that the weigh stage passes


def surrounded(values: Sequence[float]) -> list[Sequence[float]]:
    return [[-1.0, -0.25, -3.5], values, [-0.5, -2.0]]


def flat(values: Sequence[float]) -> tuple[Tokens, np.ndarray]:
    """The case's response, between two others, as flat tokens and values."""
    lists = surrounded(values)
    return Tokens.of([range(len(row)) for row in lists], None, [False] * 3), np.concatenate(
        [np.asarray(row, dtype=np.float64) for row in lists]
    )


def case_of(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    return values[tokens.starts[1] : tokens.starts[2]]


def provided(
    name: str, config: dict[str, Any], columns: dict[str, Sequence[float]], chosen: bool, **teacher: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """What a provider gives one response, and its statistics for that response alone."""
    provider = WEIGHTS.get(name)
    config = provider.Config(**config)
    tokens, _ = flat(next(iter(columns.values())))
    batch = ResponseBatch(
        ["above", "case", "below"],
        np.array([not chosen, chosen, chosen]),
        tokens,
        {role: flat(values)[1] for role, values in columns.items()},
        **teacher,
    )
    values = provider.weights(config, batch).values
    alone = Tokens.of([range(int(tokens.starts[2] - tokens.starts[1]))], None, [False])
    stats = {}
    if not teacher:
        stats = provider.weights(
            config,
            ResponseBatch(
                ["case"],
                np.array([chosen]),
                alone,
                {role: np.asarray(row, dtype=np.float64) for role, row in columns.items()},
            ),
        ).stats
    return case_of(values, tokens), stats


def swift_shared(args: dict[str, Any]) -> dict[str, Any]:
    config = settings(args, k="k", L="L", U="U", mu_chosen="mu")
    tokens, teacher = flat(args["teacher_lp"])
    return {
        "result": provided(
            "swift", config, {"reference": args["student_lp"]}, True, teacher=tokens, teacher_logps=teacher
        )[0]
    }


def swift_cross(args: dict[str, Any]) -> dict[str, Any]:
    config = WEIGHTS.get("swift").Config(
        **settings(args, k="k", L="L", U="U", mu_chosen="mu", segmenter="segmenter", empty="empty")
    )
    texts = ["noise é before it\n", args["text"], " and behind"]
    spans = {
        "student": ([(0, 5), (5, 8), (8, 19)], args["student_spans"], [(0, 4), (4, 11)]),
        "teacher": ([(0, 7), (7, 7), (7, 19)], args["teacher_spans"], [(0, 11)]),
    }
    logps = {
        "student": ([-1.0, -0.5, -2.0], args["student_lp"], [-3.0, -0.1]),
        "teacher": ([-0.3, -0.2, -4.0], args["teacher_lp"], [-1.0]),
    }
    sides, flats = {}, {}
    for number, (side, rows) in enumerate(spans.items()):
        # Other ids on the two sides, or the response would count as one tokenizer's.
        sides[side] = Tokens.of([np.arange(len(row)) + 1000 * number for row in rows], rows, [False] * 3)
        flats[side] = np.concatenate(
            [np.asarray([np.nan if value is None else value for value in row], dtype=np.float64) for row in logps[side]]
        )
    batch = ResponseBatch(
        ["above", "case", "below"],
        np.array([False, True, True]),
        sides["student"],
        {"reference": flats["student"]},
        texts,
        sides["teacher"],
        flats["teacher"],
    )
    alignment = align(texts, sides["student"], sides["teacher"], config.segmenter)
    if config.empty == "merge":
        alignment = merge_empty(alignment, ~np.isnan(flats["teacher"]))
    mine = np.flatnonzero(alignment.rows == 1)
    first, begin = (int(mine[0]) if len(mine) else 0), alignment.text_starts[1]
    result = {
        "weights": case_of(WEIGHTS.get("swift").weights(config, batch).values, sides["student"]),
        "components": [
            [
                int(alignment.starts[i] - begin),
                int(alignment.ends[i] - begin),
                "SPACE" if alignment.is_space[i] else "WORD",
            ]
            for i in mine
        ],
        "student_component": case_of(alignment.student, sides["student"]) - first,
        "teacher_component": case_of(alignment.teacher, sides["teacher"]) - first,
    }
    return {"result": result}


def word_components(args: dict[str, Any]) -> dict[str, Any]:
    texts = ["one two", args["text"], "\nthree "]
    nothing = Tokens.of([[], [], []], [[], [], []], [False] * 3)
    alignment = align(texts, nothing, nothing)
    mine, begin = np.flatnonzero(alignment.rows == 1), alignment.text_starts[1]
    return {
        "result": [
            [
                int(alignment.starts[i] - begin),
                int(alignment.ends[i] - begin),
                "SPACE" if alignment.is_space[i] else "WORD",
            ]
            for i in mine
        ]
    }


def eos_weight(args: dict[str, Any]) -> dict[str, Any]:
    config = WEIGHTS.get("swift").Config(**settings(args, eos="policy", k="k", L="L", U="U"))
    teacher, student = args.get("teacher_lp"), args.get("student_lp")
    # A missing student log-prob has nothing to be paired with either.
    partner = np.nan if teacher is None or student is None else teacher
    values = swift.eos_weights(
        config,
        np.array([-1.0, partner, -2.0]),
        np.array([-0.5, 0.0 if student is None else student, -3.0]),
        args.get("mu", 1.0),
    )
    return {"result": float(values[1])}


def tis_weights(args: dict[str, Any]) -> dict[str, Any]:
    config = settings(args, k="k", L="L", U="U", mu_chosen="mu_w", mu_rejected="mu_l")
    return {
        "result": provided(
            "tis_dpo", config, {"positive": args["lp_pos"], "negative": args["lp_neg"]}, args["winning"]
        )[0]
    }


def tis_code_raw(args: dict[str, Any]) -> dict[str, Any]:
    tokens, positive = flat(args["lp_pos"])
    chosen = np.array([not args["winning"], args["winning"], True])[tokens.rows()]
    raw = tis_dpo.signed(positive - flat(args["lp_neg"])[1], chosen, args.get("decimals", 2))
    return {"result": case_of(raw, tokens)}


def tis_code_rank(args: dict[str, Any]) -> dict[str, Any]:
    tokens, raw = flat(args["raw"])
    return {"result": case_of(tis_dpo.by_rank(raw, tokens.starts, args.get("lo", 0.7), args.get("hi", 1.3)), tokens)}


def tis_code_threshold(args: dict[str, Any]) -> dict[str, Any]:
    tokens, raw = flat(args["raw"])
    bounds = (args.get("lo", -1.5), args.get("hi", 1.5), args.get("out_lo", 0.7), args.get("out_hi", 1.3))
    return {"result": case_of(tis_dpo.by_threshold(raw, *bounds), tokens)}


def swift_code(args: dict[str, Any]) -> dict[str, Any]:
    config = WEIGHTS.get("swift_released").Config(
        **settings(args, clip_lo="clip_lo", clip_hi="clip_hi", div="div", decimals="decimals")
    )
    tokens, score = flat(args["mean_teacher_score"])
    return {"result": case_of(swift_released.affine(score, config), tokens)}


def swift_code_normalise(args: dict[str, Any]) -> dict[str, Any]:
    tokens, values = flat(args["w"])
    return {"result": case_of(swift.normalise(values, tokens.starts, "sum100"), tokens)}


def tgdpo_weights(args: dict[str, Any]) -> dict[str, Any]:
    config = settings(args, alpha="alpha", floor="floor") | {"beta_r": 1.0}  # the case gives the reward itself
    columns = {"reward_model": args["reward"], "reference": [0.0] * len(args["reward"])}
    values, stats = provided("tgdpo", config, columns, args["winning"])
    return {"result": values, "nonpositive": stats["nonpositive"][0]}


def iw_opd_weights(args: dict[str, Any]) -> dict[str, Any]:
    return {"result": teacher_weights("iw_opd", settings(args, gamma="gamma", eps="eps"), args)}


def tidpo_hybrid_weights(args: dict[str, Any]) -> dict[str, Any]:
    config = settings(args, lam="lam", sigma_div="sigma_div", variant="variant")
    return {"result": provided("tidpo_v3", config, {"importance_max_logit": args["scores"]}, True)[0]}


def sppo_labels(args: dict[str, Any]) -> dict[str, Any]:
    logits = np.asarray(args["s"], dtype=np.float64)
    matrix, code = preferences.preference_matrix(logits), preferences.aggregated_preference_matrix(logits)
    group = group_of(Scores(None, logits, [""] * len(logits)), 1.0, "one_order")
    choices = best_vs_worst(group)
    rates = preferences.win_rates(matrix)
    return {
        "result": matrix,
        "win_rates": group.win_rates,
        "best": int(np.argmax(group.rewards)) if isinstance(choices, str) else choices[0].chosen,
        "worst": int(np.argmin(group.rewards)) if isinstance(choices, str) else choices[0].rejected,
        "log_z": lambda expect: preferences.log_partition(expect["log_z_eta"], rates),
        "code_pref": code,
        "code_rates": preferences.win_rates(code),
        "mean_score": logits.mean(axis=1),
    }


def advantages(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "result": preferences.group_advantages(np.asarray(args["rewards"]), args.get("ddof", 1), args.get("eps", 1e-4))
    }


_SWIFT = {name: name for name in ("beta", "weight_mode", "kl_mode", "kl_coef")}
LOSSES: dict[str, Callable[[Batcher, dict[str, Any]], torch.Tensor]] = {
    "dpo": _pair("dpo", lambda a: settings(a, beta="beta", label_smoothing="label_smoothing")),
    "spin": _pair("spin", lambda a: settings(a, beta="beta", loss="kind"), roles="y/gen"),
    "ipo": _pair("ipo", lambda a: settings(a, tau="tau", average="average")),
    "ipo_sppo": _pair("ipo", lambda a: {"tau": a["beta"] / 2, "unit_scale": True}),
    "kto_pair_simplified": kto_pair,
    "simpo": _pair("simpo", lambda a: settings(a, beta="beta", gamma="gamma")),
    "rdpo": _pair("rdpo", lambda a: settings(a, beta="beta", alpha="alpha")),
    "d2po": _pair("d2po", lambda a: settings(a, beta="beta", gamma="gamma")),
    "kto_flat": kto,
    "cpo_flat": cpo,
    "tpo_flat": tpo,
    "sft": sft,
    "sppo_pair": _pair(
        "sppo", lambda a: settings(a, eta="eta", halve="halve"), win_rate_chosen="p_w", win_rate_rejected="p_l"
    ),
    "sppo_k": sppo_k,
    "rebel": _pair(
        "rebel", lambda a: settings(a, eta="eta"), roles="ab", score_chosen="reward_a", score_rejected="reward_b"
    ),
    "tdpo": tdpo,
    "weighted_pref": _pair("swift", lambda a: settings(a, beta="beta")),
    "swift": _from_logits("swift", lambda a: settings(a, **_SWIFT)),
    "tisdpo": _from_logits(
        "tis_dpo", lambda a: {"use_eta": True} | settings(a, beta="beta", use_eta="use_eta", alpha="alpha")
    ),
    "tgdpo": tgdpo_loss,
    "triplet": triplet,
    "tidpo": tidpo,
    "grpo": grpo,
    "inpo": inpo,
    "mnpo": inpo,
    "opd": opd,
    "jsd": jsd,
    "kd": kd,
    "kd_mixed": kd_mixed,
    "uld": uld,
}
WEIGHT_CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "swift_weights_shared": swift_shared,
    "swift_weights_cross": swift_cross,
    "word_components": word_components,
    "eos_weight": eos_weight,
    "tis_weights": tis_weights,
    "tis_code_raw": tis_code_raw,
    "tis_code_rank": tis_code_rank,
    "tis_code_threshold_and_scale": tis_code_threshold,
    "swift_code_weights": swift_code,
    "swift_code_normalise": swift_code_normalise,
    "tgdpo_weights": tgdpo_weights,
    "iw_opd_weights": iw_opd_weights,
    "tidpo_hybrid_weights": tidpo_hybrid_weights,
    "sppo_pref_from_scores": sppo_labels,
    "group_advantages": advantages,
}


# ---- the comparison


def check(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> str | None:
    """What is wrong with the code on this case; None if nothing is."""
    try:
        if case["call"] in LOSSES:
            return check_loss(case, dtype)
        if case["call"] in WEIGHT_CALLS:
            return check_weights(case, dtype)
    except Exception as error:  # a case that raises has failed; the others still run
        return f"{type(error).__name__}: {error}"
    return f"unknown call {case['call']!r}"


def check_loss(case: dict[str, Any], dtype: torch.dtype) -> str | None:
    exact = dtype == torch.float64
    args = with_vocabulary(case["args"])
    for name in case.get("diff") or []:
        args[name] = leaves(args[name], dtype)
    value = LOSSES[case["call"]](Batcher(dtype), args)
    expect = case["expect"]
    if problem := differs(value.item(), expect["value"], 1e-9 if exact else 1e-4):
        return f"value: {problem}"
    wanted = expect.get("grad") or {}
    inputs = [leaf for name in wanted for leaf in (args[name] if isinstance(args[name], list) else [args[name]])]
    grads = iter(torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ())
    for name in wanted:
        found = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf in (args[name] if isinstance(args[name], list) else [args[name]])
            for grad in [next(grads)]
        ]
        found = [grad.tolist() for grad in found] if isinstance(args[name], list) else found[0].tolist()
        if problem := differs(found, wanted[name], 1e-8 if exact else 1e-4):
            return f"gradient of {name}{problem}"
    return None


LOGITS = ("pl_w", "rl_w", "pl_l", "rl_l", "student_logits", "teacher_logits")


def with_vocabulary(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, in which logits of a response without tokens (`[]`) are [0, V]: V as in the case's other
    logits."""
    size = next((len(args[name][0]) for name in LOGITS if args.get(name)), 1)
    empty = {name: torch.zeros(0, size) for name in LOGITS if args.get(name) == []}
    return args | empty


def leaves(values: Any, dtype: torch.dtype) -> Any:
    """Differentiable tensors: one per row where the rows are ragged responses, one for a table of logits."""
    if isinstance(values, torch.Tensor):
        return values.to(dtype).requires_grad_()
    if values and isinstance(values[0], list) and len({len(row) for row in values}) > 1:
        return [torch.tensor(row, dtype=dtype, requires_grad=True) for row in values]
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def check_weights(case: dict[str, Any], dtype: torch.dtype) -> str | None:
    found, expect = WEIGHT_CALLS[case["call"]](case["args"]), case["expect"]
    for name in found.keys() & expect.keys():
        value = found[name](expect) if callable(found[name]) else found[name]
        if problem := differs(value, expect[name], 1e-9 if dtype == torch.float64 else 1e-4):
            return f"{name}{problem}"
    return None if "result" in expect else "the case expects no result"


def differs(found: Any, wanted: Any, tolerance: float) -> str | None:
    """The first entry that is not within tolerance * max(1, |wanted|)."""
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if isinstance(wanted, dict):
        if missing := wanted.keys() - found.keys():
            return f": no {sorted(missing)}"
        return next(
            (f".{key}{problem}" for key in wanted if (problem := differs(found[key], wanted[key], tolerance))), None
        )
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            return f": {len(found) if isinstance(found, list) else found} entries, expected {len(wanted)}"
        return next(
            (
                f"[{i}]{problem}"
                for i, pair in enumerate(zip(found, wanted, strict=True))
                if (problem := differs(*pair, tolerance))
            ),
            None,
        )
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        near = isinstance(found, int | float) and (
            found == wanted or math.isclose(found, wanted, rel_tol=0, abs_tol=tolerance * max(1.0, abs(wanted)))
        )
    else:
        near = found == wanted
    return None if near else f": {found!r}, expected {wanted!r}"


def run(path: Path, dtype: torch.dtype = torch.float64, tokenizers: Path | None = None) -> tuple[int, list[str]]:
    """Cases passed, and a line for each that failed."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, list):
        return check_turns(document, tokenizers or path.resolve().parent.parent / "data" / "tokenizers")
    cases = document["cases"]
    failures = [f"{case['id']} ({case['call']}): {problem}" for case in cases if (problem := check(case, dtype))]
    return len(cases) - len(failures), failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument(
        "--tokenizers", type=Path, help="where the tokenizers of turn rows lie; default ../data/tokenizers"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    passed, failures = run(options.path, getattr(torch, options.dtype), options.tokenizers)
    for line in failures:
        print(f"FAILED {line}")
    print(f"{passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
