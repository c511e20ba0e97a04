r"""Stages - ArmoRM's network on plain transformers (its own file does not import on transformers 5).

    r = W h_last                                             num_objectives rewards, no bias
    g = softmax(mlp(h_gate) / temperature) * logit_scale     how much each counts, decided by the prompt alone
    score = sum_o g_o (r T)_o                                T: reward_transform_matrix, takes verbosity out

h_last: hidden state of the last token; h_gate: of the first token of the last assistant header (Wang et al. 2024,
arXiv:2406.12845, section 3.2 and Eq. 3, as released with RLHFlow/ArmoRM-Llama3-8B-v0.1). Both positions follow from
lengths; upstream searches for the padding id and misses the last token when that is the end of turn.

Axes: N rows, L padded tokens, H hidden units, O objectives.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaConfig


class Gating(nn.Module):
    """g, how much each objective counts: a perceptron on one hidden state."""

    def __init__(self, inner: int, outer: int, hidden: int, num_hidden: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = [inner, *[hidden] * num_hidden, outer]
        self.layers = nn.ModuleList(nn.Linear(width, next_width) for width, next_width in pairwise(sizes))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, O]."""
        for layer in self.layers[:-1]:
            hidden_NH = torch.relu(layer(hidden_NH))
        return torch.softmax(self.layers[-1](hidden_NH) / self.temperature, dim=1) * self.logit_scale


class ArmoNetwork(nn.Module):
    """The network; its attributes are named as in the released weights."""

    def __init__(self, config: LlamaConfig):
        """`config`: with the released num_objectives, gating_hidden_dim, gating_n_hidden and gating_temperature."""
        super().__init__()
        from transformers import LlamaModel

        settings = config.to_dict()
        num_objectives = settings["num_objectives"]
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, num_objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(num_objectives))
        self.gating = Gating(
            config.hidden_size,
            num_objectives,
            settings["gating_hidden_dim"],
            settings["gating_n_hidden"],
            settings["gating_temperature"],
        )

    def forward(self, ids_NL: Tensor, mask_NL: Tensor, gate_N: Tensor) -> Tensor:
        """The score of each row, [N]; `gate_N`: index of the token that the gate reads."""
        hidden_NLH = self.model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids_NL), device=ids_NL.device)
        rewards_NO = self.regression_layer(hidden_NLH[rows, mask_NL.sum(dim=1) - 1])
        weights_NO = self.gating(hidden_NLH[rows, gate_N])
        return (weights_NO.float() * (rewards_NO @ self.reward_transform_matrix).float()).sum(dim=1)
