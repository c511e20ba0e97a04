"""Stages - whether a model directory holds the model that its config describes: tensors by name and shape, architecture,
arithmetic. Reads config.json and the headers of the weights; no tensor.

transformers fills a tensor that it does not find with random numbers and goes on, anew at every load: sampler, weigher
and trainer then hold different models. Here it is asked to load the headers alone, on torch's meta device, so that its
own renaming of tensors applies; `refuse_misfit` reads its report, there and after every true load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import redirect_stderr
from io import StringIO
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_contracts.adapter import ADAPTER_CONFIG
from data_contracts.checkpoint import header_of, weight_files
from data_contracts.errors import ConfigError
from stages.models.lazy import import_transformers, torch
from stages.models.templates import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Task = Literal["causal", "classifier", "served"]
"""What a model is loaded as: a language model, a sequence classifier, or a language model that vLLM serves."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OTHER_KIND = re.compile(r"(For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)|EncoderModel)$")
"""Architectures that are no language model."""
OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$")
"""Constants that old versions of transformers saved among the weights."""


def check_model(directory: Path, task: Task) -> None:
    """Check config and headers of a model directory.

    Raises: ConfigError naming what keeps the model from being loaded as `task`, or what would be random in it.
    """
    settings = read_json(directory / "config.json")
    _check_settings(directory, settings, task)
    if task == "served":
        return  # vLLM knows other architectures and quantised weights, and compares tensors itself
    model_class, config = _model_class(directory, task)
    headers = read_headers(directory)
    model, report = _load_headers(directory, model_class, config, headers)
    refuse_misfit(directory, model, report)
    _check_arithmetic(directory, model, headers)


def read_headers(directory: Path) -> dict[str, dict[str, Any]]:
    """Return tensor name -> its entry in the header of a safetensors file: dtype, shape, data_offsets."""
    headers: dict[str, dict[str, Any]] = {}
    for path in weight_files(directory):
        headers |= json.loads(header_of(path))
    headers.pop("__metadata__", None)
    return headers


def _check_settings(directory: Path, settings: Mapping[str, Any], task: Task) -> None:
    where = f"the model in {directory}"
    if (directory / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{where} is an adapter: merge it into its base model and give that directory")
    if settings.get("quantization_config") and task != "served":
        method = (settings["quantization_config"] or {}).get("quant_method", "?")
        raise ConfigError(
            f"{where} has quantised weights ({method}), and log-probs and training need floating-point ones: give the "
            "model that was quantised"
        )
    names = settings.get("architectures") or ["?"]
    if task == "causal" and OTHER_KIND.search(str(names[0])):
        raise ConfigError(
            f"{where} is a {names[0]}, not a causal language model: give a model of a class ...ForCausalLM"
        )
    if settings.get("is_encoder_decoder"):
        raise ConfigError(
            f"{where} is an encoder-decoder ({names[0]}), and prompt and answer are one text here: give a decoder-only "
            "language model"
        )
    text = settings.get("text_config") or settings
    positions = text.get("max_position_embeddings")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise ConfigError(
            f"config.json of {directory}: max_position_embeddings is {positions!r}, and must be at least 1"
        )
    _check_eos(directory, text)


def _check_eos(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises: ConfigError for an `eos_token_id` in config.json that is no id of the vocabulary."""
    eos_ids, size = settings.get("eos_token_id"), settings.get("vocab_size")
    for value in eos_ids if isinstance(eos_ids, list) else [eos_ids]:
        if value is None:
            continue
        if type(value) is not int or value < -1 or (type(size) is int and value >= size):
            limit = f" below {size}" if type(size) is int else ""
            raise ConfigError(f"config.json of {directory}: eos_token_id is {eos_ids!r}, and must be token ids{limit}")


def _model_class(directory: Path, task: Task) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return transformers' class and config for a directory. Raises: ConfigError where it has none for the task."""
    import_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = read_json(directory / "config.json")
    model_type = settings.get("model_type")
    if settings.get("auto_map") and model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"the model in {directory} brings Python code of its own (auto_map), transformers has none for its type "
            f"{model_type!r}, and code that comes with a model is not run: give a model of a type that transformers has"
        )
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its config classes raise
        raise ConfigError(f"config.json of {directory} describes no model: {_first_line(error)}") from None
    auto = AutoModelForSequenceClassification if task == "classifier" else AutoModelForCausalLM
    mapping: Any = auto._model_mapping
    if type(config) not in mapping:
        kind = "sequence classifier" if task == "classifier" else "causal language model"
        raise ConfigError(f"the model in {directory} is of type {model_type!r}, of which there is no {kind}")
    model_class = mapping[type(config)]
    return (model_class[0] if isinstance(model_class, list | tuple) else model_class), config


def _load_headers(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    headers: Mapping[str, Mapping[str, Any]],
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return the model on the meta device, and transformers' report on names and shapes of the tensors."""
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, FLOATS.get(entry["dtype"], "float32")), device="meta")
        for name, entry in headers.items()
    }
    settings = {"state_dict": tensors, "output_loading_info": True, "device_map": "meta", "dtype": torch.float32}
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            load: Any = model_class.from_pretrained  # whose type knows no report
            return load(None, config=config, ignore_mismatched_sizes=True, **settings)
    except Exception as error:  # an activation that nobody knows, a width that does not divide, ...
        raise ConfigError(
            f"config.json of {directory} describes no model that can be built: {_first_line(error)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def refuse_misfit(directory: Path | str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Compare a model with the files it was loaded from; print the names of tensors that are for another task.

    report: what `from_pretrained(..., output_loading_info=True)` returns beside the model
    Raises: ConfigError naming tensors that are missing, of another shape, or of layers that the config does not have.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        name, remedy = type(model).__name__, "fetch the model again, or mend its config.json"
        if name.endswith("ForSequenceClassification"):
            remedy = "it is no reward model, or not all of it is there"
        raise ConfigError(
            f"the weights in {directory} lack {len(missing)} tensors of a {name}, e.g. {missing[:3]}, which would be "
            f"random: {remedy}"
        )
    mismatched = sorted(report["mismatched_keys"])
    shapes = [f"{name} {tuple(stored)}, not {tuple(expected)}" for name, stored, expected in mismatched]
    if shapes:
        raise ConfigError(
            f"the weights in {directory} have other shapes than config.json describes: {'; '.join(shapes[:3])}"
        )
    surplus = sorted(name for name in report["unexpected_keys"] if not OLD_BUFFERS.search(name))
    layers = _of_more_layers(model, surplus)
    if layers:
        raise ConfigError(
            f"the weights in {directory} have {len(layers)} tensors of layers that config.json does not describe, e.g. "
            f"{layers[:3]}: one of the two is of another model"
        )
    if surplus:
        print(
            f"{directory}: {len(surplus)} tensors are of another task and are not read, e.g. {surplus[:3]}", flush=True
        )


def _of_more_layers(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return the tensors that differ from one of the model's by a layer's number alone."""
    if not names:
        return []
    prefix = f"{model.base_model_prefix}."
    patterns = {re.sub(r"\d+", "#", name.removeprefix(prefix)) for name, _ in model.named_parameters()}
    return [
        name
        for name in names
        if re.search(r"\.\d+\.|^\d+\.", name) and re.sub(r"\d+", "#", name.removeprefix(prefix)) in patterns
    ]


def _check_arithmetic(directory: Path, model: PreTrainedModel, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: ConfigError for weights that are stored as whole numbers: quantised, without the scales."""
    prefix = f"{model.base_model_prefix}."
    weights = {name.removeprefix(prefix) for name, _ in model.named_parameters(remove_duplicate=False)}
    odd = [name for name in headers if name.removeprefix(prefix) in weights and headers[name]["dtype"] not in FLOATS]
    if odd:
        raise ConfigError(
            f"{len(odd)} weights in {directory} are {headers[odd[0]]['dtype']}, e.g. {odd[0]}, and must be floating-point "
            f"({', '.join(FLOATS)}): give the model that was quantised"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '?').strip().splitlines()[0]:.300}"
