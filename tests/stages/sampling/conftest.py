"""A policy whose embedding has more rows than its tokenizer has tokens, as Qwen's have."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def padded_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with 64 more rows, which it prefers to all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("padded") / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(384)
    with torch.no_grad():
        model.get_input_embeddings().weight[320:] = 2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    return directory
