"""Stages - model families whose attention is not what torch's fused kernel computes.

transformers gives `scaled_dot_product_attention` to every family that runs with it, and passes it what it understands:
a cap on the attention's logits (Gemma 2) is dropped without a word, and Falcon's ALiBi comes out otherwise than from
its own code. Such models take `eager`, transformers' plain products. tests/stages/models/test_families.py holds a small
model of every family against `eager` and writes the table of docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_contracts.artifact import ArtifactRef
from stages.models.templates import read_json

SOFTCAP = "attn_logit_softcapping"
"""Setting of config.json: attention logits are capped, c tanh(logits / c). null: they are not."""

CAPPED = {"gemma2": 50.0, "vaultgemma": 50.0}
"""Families that cap where config.json does not say."""


def attention_of(settings: Mapping[str, Any]) -> str | None:
    """The attention that a model must run with, from its config.json; None: transformers' own choice is right."""
    text = settings.get("text_config") or settings
    if text.get(SOFTCAP, CAPPED.get(str(text.get("model_type")))) is not None:
        return "eager"
    if text.get("model_type") == "falcon" and text.get("alibi"):
        return "eager"
    return None


def attention_in(directory: str | Path) -> str | None:
    """The same, of a model directory."""
    return attention_of(read_json(Path(directory) / "config.json"))


def attention_addition(inputs: Iterable[ArtifactRef]) -> dict[str, Any]:
    """What a stage's key says where a model among its inputs had run with an attention that is not its own."""
    models = [ref for ref in inputs if ref.kind == "checkpoint"]
    if any(attention_in(model.path) for model in models):
        return {"attention": "eager"}
    return {}
