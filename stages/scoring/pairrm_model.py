r"""Stages - PairRM's network on plain transformers: DeBERTa-v2 encoder, three hidden states, one small head.

    l_ij = head([h_source, h_i]) - head([h_source, h_j]),   P(i beats j) = sigmoid(l_ij)

(Jiang, Ren and Lin 2023, arXiv:2306.02561, section 3.2, as released: llm-blender 0.0.2.) l_ij belongs to one order of
the two candidates, and l_ij != -l_ji. The attributes are named as in the released weights, so both repositories load
strictly.

Axes: N pairs, L padded tokens, H hidden units.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from data_contracts.errors import ConfigError
from stages.models.lazy import import_transformers
from stages.scoring.deberta import Encoder, covers
from stages.scoring.models import load_strictly, read_in_float32, read_tensors
from stages.scoring.pairrm_tokens import MARKERS, Limits, PairTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import DebertaV2Config

DEBERTA_V3_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "hidden_act": "gelu", "layer_norm_eps": 1e-7, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "max_relative_positions": -1, "max_position_embeddings": 512, "type_vocab_size": 0,
}  # fmt: skip
"""The backbone of `llm-blender/PairRM`, whose config.json describes the ranker only."""
TOKENIZER_FILES = ("tokenizer.json", "spm.model")


class PairNetwork(nn.Module):
    """Encoder and head."""

    def __init__(self, config: DebertaV2Config, num_tasks: int):
        super().__init__()
        from transformers import DebertaV2Model

        self.pretrained_model = DebertaV2Model(config)
        self._encoder: Encoder | None = None
        hidden = config.hidden_size
        # Numbered as in the released weights; the dropout of 0.05 is for training only.
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Dropout(0.0), nn.Linear(hidden, num_tasks)
        )

    def forward(self, input_ids_NL: Tensor, lengths: Sequence[int], markers_N3: Tensor) -> Tensor:
        """l_ij of every row, float32, [N]. `markers_N3`: the indices of source, first and second marker."""
        source_NH, first_NH, second_NH = self._encode(input_ids_NL, lengths, markers_N3).unbind(1)
        first = self.head_layer(torch.cat([source_NH, first_NH], dim=-1))
        second = self.head_layer(torch.cat([source_NH, second_NH], dim=-1))
        return (first - second).mean(dim=-1)

    def _encode(self, input_ids_NL: Tensor, lengths: Sequence[int], markers_N3: Tensor) -> Tensor:
        """The hidden states of the markers, [N, 3, H]."""
        if covers(self.pretrained_model.config):
            self._encoder = self._encoder or Encoder(self.pretrained_model)
            return self._encoder(input_ids_NL, lengths, markers_N3)
        positions = torch.arange(input_ids_NL.shape[1], device=input_ids_NL.device)
        mask = positions < torch.tensor(lengths, device=input_ids_NL.device)[:, None]
        hidden_NLH = self.pretrained_model(input_ids=input_ids_NL, attention_mask=mask.long()).last_hidden_state
        return hidden_NLH.gather(1, markers_N3[:, :, None].expand(-1, -1, hidden_NLH.shape[-1]))


class PairRanker(NamedTuple):
    """The network with its tokenizer."""

    network: PairNetwork
    tokenizer: PairTokenizer

    def logits(self, pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> list[float]:
        """l of each (source, first, second), given as token ids; one padded batch."""
        device = next(self.network.parameters()).device
        lengths = [sum(map(len, pair)) for pair in pairs]
        ids = torch.full((len(pairs), max(lengths)), self.tokenizer.pad_id, dtype=torch.long)
        markers = torch.zeros((len(pairs), 3), dtype=torch.long)
        for row, (source, first, second) in enumerate(pairs):
            ids[row, : lengths[row]] = torch.tensor([*source, *first, *second])
            ids[row, len(source) + len(first) + 1] = self.tokenizer.second_id
            markers[row] = torch.tensor([1, len(source) + 1, len(source) + len(first) + 1])
        with torch.inference_mode():
            return self.network(ids.to(device), lengths, markers.to(device)).float().cpu().tolist()


def load_ranker(directory: Path, tokenizer_directory: Path | None, dtype: str, device: str) -> PairRanker:
    """The ranker in a directory of either layout: `llm-blender/PairRM`, whose config.json describes the ranker, or
    `llm-blender/PairRM-hf`, whose config.json describes the encoder.

    Raises: ConfigError for another model, a tensor too few or too many, a tokenizer that is not its own.
    """
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    encoder_settings, directories = _layout(directory, settings)
    tensors = read_tensors(directory)
    embeddings = tensors.get("pretrained_model.embeddings.word_embeddings.weight")
    if embeddings is None:
        raise ConfigError(
            f"{directory} has no tensor pretrained_model.embeddings.word_embeddings.weight: not a PairRM checkpoint"
        )
    network = PairNetwork(_encoder_config(encoder_settings, len(embeddings)), int(settings.get("n_tasks") or 1))
    load_strictly(network, tensors, directory)
    if tokenizer_directory is not None:
        directories.insert(0, tokenizer_directory)
    with_files = [path for path in directories if any((path / name).is_file() for name in TOKENIZER_FILES)]
    if not with_files:
        raise ConfigError(
            f"{directory} holds no tokenizer: give scorer.tokenizer, e.g. {{hub_id: microsoft/deberta-v3-large}}, or "
            f"use PairRM-hf"
        )
    limits = Limits(settings.get("source_maxlength") or 1224, settings.get("candidate_maxlength") or 412)
    tokenizer = load_tokenizer(with_files[0], limits)
    source_id = tokenizer.source_id
    if source_id + len(MARKERS) != len(embeddings) or settings.get("source_prefix_id", source_id) != source_id:
        raise ConfigError(
            f"the tokenizer in {with_files[0]} puts PairRM's markers at {source_id}, the checkpoint has "
            f"{len(embeddings)} "
            "embeddings: they do not belong together"
        )
    network = network.to(device=device, dtype=getattr(torch, dtype)).eval()
    read_in_float32(network.head_layer)
    return PairRanker(network, tokenizer)


def _layout(directory: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """The encoder's settings, and the directories that may hold the tokenizer. Raises: ConfigError for another
    model."""
    if "ranker_type" not in settings:
        if settings.get("model_type") != "deberta-v2":
            raise ConfigError(
                f"{directory}/config.json is of model type {settings.get('model_type')!r}, not of a PairRM checkpoint "
                "(deberta-v2)"
            )
        return settings, [directory]
    if settings["ranker_type"] != "pairranker":
        raise ConfigError(
            f"{directory} is a ranker of type {settings['ranker_type']!r}; this scorer loads `pairranker`"
        )
    backbone = Path(str(settings.get("model_name")))
    described = DEBERTA_V3_LARGE
    if (backbone / "config.json").is_file():
        described = json.loads((backbone / "config.json").read_text())
    return described, [directory, backbone]


def _encoder_config(settings: dict[str, Any], vocabulary: int) -> DebertaV2Config:
    """transformers' config of the encoder, without dropout."""
    unused = ("architectures", "auto_map", "transformers_version", "dtype")
    described = {name: value for name, value in settings.items() if name not in unused}
    fixed = {"vocab_size": vocabulary, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return import_transformers().DebertaV2Config(**described | fixed)
