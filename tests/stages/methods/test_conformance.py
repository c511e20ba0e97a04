"""The conformance vectors, through `python -m tests.conformance`; and a few cases worked out by hand, which need no file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conformance import check, main, run

SHARED = Path(os.environ.get("SELFPLAY_SHARED") or Path(__file__).resolve().parents[4] / "shared")
VECTORS = [SHARED / "conformance" / name for name in ("vectors.json", "vectors_2026.json")]
NO_VECTORS = pytest.mark.skipif(
    not all(path.is_file() for path in VECTORS), reason=f"no vector files {VECTORS}; set SELFPLAY_SHARED"
)

LOG2 = math.log(2)
SIGMOID_HALF = 1 / (1 + math.exp(-0.5))
BY_HAND = [
    # h = 0.5 ((1 + 0) - (-1)) = 1; -sigma(-1) * 0.5 per chosen token
    {
        "call": "dpo",
        "args": {"pol_w": [-1.0, -0.5], "ref_w": [-2.0, -0.5], "pol_l": [-3.0], "ref_l": [-2.0], "beta": 0.5},
        "diff": ["pol_w", "pol_l"],
        "expect": {
            "value": 0.3132616875182228,
            "grad": {"pol_w": [-0.13447071068499755] * 2, "pol_l": [0.13447071068499755]},
        },
    },
    # (2 - 1/(2 * 0.25))^2 = 0
    {
        "call": "ipo",
        "args": {"pol_w": [-1.0, -0.5], "ref_w": [-2.0, -0.5], "pol_l": [-3.0], "ref_l": [-2.0], "tau": 0.25},
        "expect": {"value": 0.0},
    },
    # (LR_w - 2 * 0.3)^2 + (LR_l + 2 * 0.2)^2 = 0.4^2 + 0.6^2
    {
        "call": "sppo_pair",
        "args": {
            "pol_w": [-1.0],
            "ref_w": [-2.0],
            "pol_l": [-3.0],
            "ref_l": [-2.0],
            "p_w": 0.8,
            "p_l": 0.3,
            "eta": 2.0,
        },
        "diff": ["pol_w", "pol_l"],
        "expect": {"value": 0.52, "grad": {"pol_w": [0.8], "pol_l": [-1.2]}},
    },
    # means -1 and -2, beta 1, gamma 0.5: l(0.5)
    {
        "call": "simpo",
        "args": {"pol_w": [-1.0, -1.0], "pol_l": [-2.0], "beta": 1.0, "gamma": 0.5},
        "expect": {"value": -math.log(SIGMOID_HALF)},
    },
    # z0 = max(0, mean(1, 0)) = 0.5; LR = 1 and -1 with beta 1: (1 - sigma(0.5) + 1 - sigma(1.5)) / 2
    {
        "call": "kto_flat",
        "args": {
            "pols": [[-1.0], [-3.0]],
            "refs": [[-2.0], [-2.0]],
            "desirable": [True, False],
            "kl_logratios": [1.0, 0.0],
            "beta": 1.0,
        },
        "expect": {"value": (2 - SIGMOID_HALF - 1 / (1 + math.exp(-1.5))) / 2},
    },
    # NLL: 4 nats over 3 tokens of the batch, not a mean of means; preference term log 2 in both pairs
    {
        "call": "cpo_flat",
        "args": {"chosen": [[-1.0, -2.0], [-1.0]], "rejected": [[-3.0], [-1.0]], "beta": 0.1},
        "diff": ["chosen"],
        "expect": {"value": LOG2 + 4 / 3, "grad": {"chosen": [[-0.025 - 1 / 3] * 2, [-0.025 - 1 / 3]]}},
    },
    # ratio clipped at 1.2 for A > 0: 1.2 A without gradient; beta 0
    {
        "call": "grpo",
        "args": {
            "pols": [[math.log(0.5)]],
            "olds": [[math.log(0.25)]],
            "refs": [[math.log(0.5)]],
            "adv": [2.0],
            "beta": 0.0,
        },
        "diff": ["pols"],
        "expect": {"value": -2.4, "grad": {"pols": [[0.0]]}},
    },
    # h_w = 1 - (0.5 * 0 + 0.5 * 0.5) = 0.75 beside -1; h_l = 0: (0.75 - 1/(2 * 1))^2, twice 0.25 per chosen token
    {
        "call": "inpo",
        "args": {
            "pol_w": [-1.0],
            "start_w": [-2.0],
            "old_w": [-1.5],
            "pol_l": [-3.0],
            "start_l": [-3.0],
            "old_l": [-3.0],
            "eta": 1.0,
            "rho": 0.5,
        },
        "diff": ["pol_w", "pol_l"],
        "expect": {"value": 0.0625, "grad": {"pol_w": [0.5], "pol_l": [-0.5]}},
    },
    # the opponents' mixture is 3/4 (-1.5) + 1/4 (-1.5): the same loss
    {
        "call": "mnpo",
        "args": {
            "pol_w": [-1.0],
            "start_w": [-2.0],
            "history_w": [[-1.0], [-3.0]],
            "pol_l": [-3.0],
            "start_l": [-3.0],
            "history_l": [[-3.0], [-3.0]],
            "lambdas": [3.0, 1.0],
            "eta": 1.0,
            "rho": 0.5,
        },
        "expect": {"value": 0.0625},
    },
    # A = 1 and -2, rho = 1 and e^0.5: -(1 - 2 e^0.5) / 2
    {
        "call": "opd",
        "args": {"pol": [-1.0, -0.5], "old": [-1.0, -1.0], "teacher": [0.0, -3.0]},
        "diff": ["pol"],
        "expect": {"value": (2 * math.exp(0.5) - 1) / 2, "grad": {"pol": [-0.5, math.exp(0.5)]}},
    },
    # |A| = 1 and 3: 1 + gamma (1 - 0/4), 1 + gamma (1 - 1/4)
    {
        "call": "iw_opd_weights",
        "args": {"old": [-1.0, -1.0], "teacher": [0.0, -4.0], "gamma": 2.0},
        "expect": {"result": [3.0, 2.5]},
    },
    # (1/2, 1/2) against (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3)
    {
        "call": "kd",
        "args": {"student_logits": [[math.log(0.25), math.log(0.75)]], "teacher_logits": [[0.0, 0.0]]},
        "expect": {"value": 0.5 * math.log(2) + 0.5 * math.log(2 / 3)},
    },
    # sorted (3/4, 1/4) against (1/2, 1/2, 0): 1/4 + 1/4
    {
        "call": "uld",
        "args": {
            "student_logits": [[math.log(0.25), math.log(0.75)]],
            "teacher_logits": [[0.0, 0.0, -1e9], [9.0, 0.0, 0.0]],
        },
        "expect": {"value": 0.5},
    },
    # near = (1 - 0)^2 over the overlap of one token, far = (2 - 1)^2; 1 - 1 + 0.25
    {"call": "triplet", "args": {"d": [1.0, 5.0], "b": [0.0], "c": [2.0], "margin": 0.25}, "expect": {"value": 0.25}},
    # exp(clamp): e^-0.5, e^1, e^1.5
    {
        "call": "swift_weights_shared",
        "args": {"teacher_lp": [-5.0, -1.0, -0.1], "student_lp": [-1.0, -2.0, -5.0]},
        "expect": {"result": [math.exp(-0.5), math.e, math.exp(1.5)]},
    },
    # one word for the teacher, two tokens for the student, then a word the teacher never scored
    {
        "call": "swift_weights_cross",
        "args": {
            "text": "ab c",
            "student_spans": [[0, 1], [1, 2], [2, 4]],
            "student_lp": [-1.0, -2.0, -1.0],
            "teacher_spans": [[0, 2], [2, 4]],
            "teacher_lp": [-1.5, None],
        },
        "expect": {
            "result": {
                "weights": [math.exp(-0.5), math.exp(0.5), 1.0],
                "components": [[0, 2, "WORD"], [2, 4, "WORD"]],
                "student_component": [0, 0, 1],
                "teacher_component": [0, 1],
            }
        },
    },
    # the mean of two exponentials, not the exponential of a mean
    {
        "call": "swift_weights_cross",
        "args": {
            "text": "ab",
            "student_spans": [[0, 2]],
            "student_lp": [-1.0],
            "teacher_spans": [[0, 1], [1, 2]],
            "teacher_lp": [-1.0, -0.5],
            "empty": "merge",
        },
        "expect": {"result": {"weights": [(1 + math.exp(0.5)) / 2]}},
    },
    {
        "call": "tgdpo_weights",
        "args": {"reward": [0.5, -3.0], "winning": True, "alpha": 0.5, "floor": 0.1},
        "expect": {"result": [1.25, 0.1], "nonpositive": 1},
    },
    {"call": "tis_code_rank", "args": {"raw": [0.3, -1.0, 0.3]}, "expect": {"result": [1.0, 0.7, 1.3]}},
    # 0.125 and 2.675: numpy's own rounding moves the second to 2.68
    {
        "call": "tis_code_raw",
        "args": {"lp_pos": [0.0, 0.0], "lp_neg": [-0.125, -2.675], "winning": True},
        "expect": {"result": [0.12, 2.67]},
    },
    {"call": "swift_code_normalise", "args": {"w": [0.0, 0.0]}, "expect": {"result": [0.5, 0.5]}},
]


@pytest.mark.parametrize("number", range(len(BY_HAND)))
def test_a_case_worked_out_by_hand(number):
    assert check({"id": f"hand/{number}", **BY_HAND[number]}) is None


def test_a_wrong_expectation_fails():
    case = json.loads(json.dumps(BY_HAND[0])) | {"id": "x"}
    case["expect"]["value"] += 2e-9
    assert "value" in check(case)
    case["expect"]["value"] -= 2e-9
    case["expect"]["grad"]["pol_w"][1] += 2e-8
    assert "gradient of pol_w[1]" in check(case)


def test_an_unknown_call_counts_as_failed(tmp_path, capsys):
    path = tmp_path / "vectors.json"
    path.write_text(
        json.dumps({"cases": [{"id": "a", "call": "no_such", "args": {}, "expect": {}}, {"id": "b", **BY_HAND[0]}]})
    )
    assert main([str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"


@NO_VECTORS
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_shared_vector_passes(path, dtype):
    passed, failures = run(path, dtype)
    assert not failures and passed > 0


POLICY, REFERENCE, IDS = [[0.2, -0.4, 1.0], [0.0, 0.5, -1.0]], [[0.1, 0.3, -0.2], [1.0, 0.0, 0.0]], [2, 0]


def log_softmax(logits: list[list[float]]) -> np.ndarray:
    values = np.asarray(logits)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("empty", ["w", "l"])
@pytest.mark.parametrize(
    ("call", "settings"),
    [
        ("tdpo", {"version": 1}),
        ("tdpo", {"version": 2, "alpha": 0.5}),
        ("swift", {"weights": [2.0, 0.5]}),
        ("tisdpo", {"weights": [2.0, 0.5], "use_eta": False}),
    ],
)
def test_logits_of_a_response_without_tokens_are_an_empty_table(call, settings, empty):
    """A vector file writes `[]` for [0, V]; what is left of the loss is the other side's part."""
    other = "l" if empty == "w" else "w"
    args = {f"pl_{empty}": [], f"rl_{empty}": [], f"ids_{empty}": [], "beta": 0.5}
    args |= {f"pl_{other}": POLICY, f"rl_{other}": REFERENCE, f"ids_{other}": IDS}
    policy, reference = log_softmax(POLICY), log_softmax(REFERENCE)
    ratios = (policy - reference)[[0, 1], IDS]
    divergence = (np.exp(reference) * (reference - policy)).sum()
    if call == "tdpo":
        margin = ratios.sum() + divergence * settings.get("alpha", 1.0)
        args |= settings
    else:
        margin = ratios @ np.asarray(settings["weights"])
        args |= {f"w_{empty}": [], f"w_{other}": settings["weights"]}
        args |= {name: value for name, value in settings.items() if name != "weights"}
    value = math.log1p(math.exp(-0.5 * margin * (1 if other == "w" else -1)))
    case = {
        "call": call,
        "args": args,
        "diff": [f"pl_{empty}"],
        "expect": {"value": value, "grad": {f"pl_{empty}": []}},
    }
    for dtype in (torch.float64, torch.float32):
        assert check(case, dtype) is None


@pytest.mark.parametrize("call", ["kd", "jsd", "kd_mixed", "uld"])
def test_a_distillation_of_no_token_is_zero(call):
    args = {"student_logits": [], "teacher_logits": [], "ids": []}
    case = {
        "call": call,
        "args": args,
        "diff": ["student_logits"],
        "expect": {"value": 0.0, "grad": {"student_logits": []}},
    }
    assert check(case) is None
