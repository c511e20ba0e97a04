"""Flows - take a trained model, or a run's pairs, out of the store: into a directory, or to the Hugging Face hub.

An export is a list of files, each a path in the store or bytes made here; a directory gets copies of them, the hub one
commit. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_in, is_adapter_only
from data_contracts.artifact import EXTERNAL, NOT_DATA, ArtifactRef
from data_contracts.checkpoint import MODEL_SUFFIXES, check_model_directory, external_model
from data_contracts.errors import ConfigError
from data_contracts.files import temporary_beside
from data_contracts.identity import digest_file
from data_contracts.ledger import cost_rows, format_table, read_account, sum_rows
from data_contracts.store import Store
from data_contracts.words import format_bytes, plural
from flows.cli.finished import PlayedRun, read_run
from flows.cli.hub import check_new, push
from flows.cli.rows import CONFIGURATIONS, write_rows
from flows.cli.version import version
from flows.config import RunConfig
from flows.report.cards import (
    SETTINGS_FILE,
    CardFacts,
    Digest,
    Licences,
    data_card,
    model_card,
    name_of_model,
    shared_settings,
)
from stages.models.turn_settings import JinjaFile
from tasks.data.source import Source

CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"


class ExportFile(NamedTuple):
    """A file of an export."""

    name: str
    """Inside the export, with forward slashes."""
    content: Path | bytes

    @property
    def size(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size


class Options(NamedTuple):
    """What the command line says."""

    to: Path | None
    hub: str | None
    private: bool
    data: bool
    iteration: int | None
    licences: Licences
    base: str | None

    def check(self) -> None:
        """Raises: ConfigError, before anything is read, for options that do not go together or would overwrite."""
        if (self.to is None) == (self.hub is None):
            raise ConfigError("say where to: either --to DIR or --hub owner/name")
        if self.private and self.hub is None:
            raise ConfigError("--private goes with --hub")
        if self.data and self.iteration is not None:
            raise ConfigError("--data exports the rows of all iterations: leave --iteration out")
        needed = {"--policy-license": self.licences.policy, "--data-license": self.licences.data}
        missing = [name for name, value in needed.items() if value is None]
        if self.hub is not None and missing:
            raise ConfigError(
                f"others will see it, so its card must say under which licences: add {' and '.join(missing)} (e.g. "
                "apache-2.0; `unknown` if you do not know)"
            )
        if self.to is not None:
            refuse_used(self.to)


def export(config: RunConfig, store: Store, options: Options) -> list[str]:
    """Export the model of a run, or its rows. Returns the lines to print. Raises: ConfigError, TransientError."""
    options.check()
    if options.hub is not None:
        check_new(options.hub, options.data)
    with tempfile.TemporaryDirectory() as scratch:
        run = read_run(config, store, Path(scratch))
        if options.data:
            files, what = data_files(run, store, options, Path(scratch)), f"the rows of {config.name}"
        else:
            iteration, policy = run.policy(options.iteration)
            files = model_files(run, store, options, iteration, policy)
            what = f"{config.name}, iteration {iteration}"
        size = f"{format_bytes(sum(file.size for file in files))} in {plural(len(files), 'file')}"
        if options.to is not None:
            write(files, options.to)
            address = str(options.to)
        else:
            contents = [(file.name, file.content) for file in files]
            address = push(contents, str(options.hub), options.private, options.data, what)
    return [f"{address}: {what}, {size}", *_next_lines(options, address, is_adapter=has_adapter(files))]


def _next_lines(options: Options, address: str, is_adapter: bool) -> list[str]:
    name = options.hub or address
    lines = []
    if options.data:
        lines.append(f'read it: datasets.load_dataset("{name}")')
    elif is_adapter:
        lines.append(f'load it: peft.AutoPeftModelForCausalLM.from_pretrained("{name}")')
    else:
        lines.append(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{name}"), or: vllm serve {name}')
    if None in options.licences:
        lines.append("its card calls licences not stated: say them with --policy-license ID and --data-license ID")
    return lines


def has_adapter(files: Sequence[ExportFile]) -> bool:
    """Whether the export is an adapter."""
    return any(file.name == ADAPTER_CONFIG for file in files)


# --- the model


def model_files(
    run: PlayedRun, store: Store, options: Options, iteration: int, policy: ArtifactRef
) -> list[ExportFile]:  # fmt: skip
    """Return weights or adapter, tokenizer, generation settings, card and settings of a policy.

    Raises: ConfigError for the start model, for a checkpoint that is not whole, and for an adapter of a base model that
    others could not find.
    """
    if policy == run.rehearsal.start or policy.key == EXTERNAL:
        raise ConfigError(
            f"iteration {iteration} of {run.config.name} is the start model ({policy.path}): nothing was trained there"
            + ("; the gate promoted no iteration" if iteration == 0 and options.iteration is None else "")
            + ". Name another with --iteration"
        )
    directory = Path(policy.path)
    check_model_directory(directory, chat_template=False)
    files = {path.name: ExportFile(path.name, path) for path in _public_files(directory)}
    base = options.base or run.config.policy.hub_id
    adapter = adapter_in(directory) if is_adapter_only(directory) else None
    if adapter is not None:
        del files["config.json"]  # with it, readers would take the adapter for a whole model
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
        settings["base_model_name_or_path"] = _base_for_others(run.config, options, base)
        files[ADAPTER_CONFIG] = ExportFile(ADAPTER_CONFIG, _json(settings))
        files[ADAPTER_WEIGHTS] = ExportFile(ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
    generation = _generation_config(run, directory, iteration)
    files[GENERATION_CONFIG] = ExportFile(GENERATION_CONFIG, _json(generation))
    if isinstance(template := run.config.sampling.template, JinjaFile):
        files[TEMPLATE] = ExportFile(TEMPLATE, template.jinja.encode())
    facts = _facts(run, store, options, iteration, policy.key, adapter is not None)
    files[CARD] = ExportFile(CARD, model_card(facts).encode())
    files[SETTINGS_FILE] = ExportFile(SETTINGS_FILE, shared_settings(run.config).encode())
    return [files[name] for name in sorted(files)]


def _public_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that a model is loaded from."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in MODEL_SUFFIXES and path.name not in NOT_DATA and path.name[0] != "."
    ]


def _base_for_others(config: RunConfig, options: Options, base: str | None) -> str:
    """Return the name of an adapter's base model: of the hub, or for a directory of this machine its path.

    Raises: ConfigError where others would get a path of this machine.
    """
    if base is not None:
        return base
    if options.hub is not None:
        raise ConfigError(
            f"the adapter belongs to {config.policy.path}, a directory of this machine: say where others get that "
            "model, with --base owner/name"
        )
    return str(Path(str(config.policy.path)).expanduser().resolve())


def _generation_config(run: PlayedRun, directory: Path, iteration: int) -> dict[str, Any]:
    """The run's own sampling, in transformers' words: what is not set here would be transformers' default, not the
    run's. The number of new tokens is left out: vLLM takes it for a limit that no request may exceed."""
    path = directory / GENERATION_CONFIG
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {name: value for name, value in before.items() if name.endswith("_token_id")}
    sampling = run.config.sampling
    settings["do_sample"] = sampling.temperature > 0
    if settings["do_sample"]:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    for step in run.rehearsal.steps:
        if step.record is not None and step.iteration == iteration and "stop_ids" in step.record.facts:
            settings["eos_token_id"] = step.record.facts["stop_ids"]
    return settings


# --- the rows


def data_files(run: PlayedRun, store: Store, options: Options, scratch: Path) -> list[ExportFile]:
    """Return the Parquet files of the run's rows, written to `scratch`, with card and settings. Raises: ConfigError."""
    configurations = write_rows(run, scratch / "rows")
    names = sorted(path.relative_to(scratch / "rows").as_posix() for path in (scratch / "rows").rglob("*.parquet"))
    facts = _facts(run, store, options, max(run.rehearsal.policies()), "", False)
    card = data_card(facts, {name: CONFIGURATIONS[name] for name in configurations})
    return [
        ExportFile(CARD, card.encode()),
        ExportFile(SETTINGS_FILE, shared_settings(run.config).encode()),
        *(ExportFile(name, scratch / "rows" / name) for name in names),
    ]


# --- what the cards say


def _facts(
    run: PlayedRun, store: Store, options: Options, iteration: int, key: str, is_adapter: bool
) -> CardFacts:  # fmt: skip
    return CardFacts(
        config=run.config,
        story=run.history.story(),
        iteration=iteration,
        base=options.base or run.config.policy.hub_id,
        is_adapter=is_adapter,
        key=key,
        inputs=_inputs(run, store),
        costs=_costs(run.config.name, store),
        version=version(),
        licences=options.licences,
    )


def _inputs(run: PlayedRun, store: Store) -> list[Digest]:
    """The start model, the models beside it and the data, each with its digest."""
    config, cache = run.config, store.root / "digests"
    inputs = [Digest("start model", name_of_model(config.policy), run.rehearsal.start.content)]
    for role, ref in run.rehearsal.models.items():
        if (named := getattr(config.models, role, None)) is not None:
            inputs.append(Digest(role, name_of_model(named), external_model(Path(ref.path), cache).content))
    inputs += _sources("training prompts", config.prompts.train_source)
    if config.prompts.heldout_source is not None:
        inputs += _sources("held-out prompts", config.prompts.heldout_source)
    return inputs


def _sources(role: str, source: Source) -> list[Digest]:
    """A source with the digest of its file; what lies on the hub is known by its revision."""
    if source.mix:
        return [digest for share in source.mix for digest in _sources(role, share.source)]
    if source.hub_id is not None:
        return [Digest(role, source.hub_id, f"revision {source.revision or 'not pinned'}")]
    path = Path(str(source.path)).expanduser()
    if path.is_file():
        return [Digest(role, path.name, digest_file(path))]
    return [
        Digest(role, path.name, "not known: not on this machine any more" if not path.exists() else "several files")
    ]


def _costs(name: str, store: Store) -> list[dict[str, str]]:
    """A row per stage of what the run cost; [] if it has no ledger."""
    try:
        rows = sum_rows(cost_rows(read_account(store, name)), ("stage",))
    except ConfigError:
        return []
    titles, cells = format_table(rows, ("stage",))
    return [dict(zip(titles, line, strict=True)) for line in cells]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# --- into a directory


def refuse_used(directory: Path) -> None:
    """Raises: ConfigError if something lies at `directory` already; an empty directory is nothing."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise ConfigError(f"{directory} is there already and not empty: name another directory, or remove it")


def write(files: Sequence[ExportFile], directory: Path) -> None:
    """Make a directory of copies, whole or not at all. Raises: ConfigError if it cannot be written."""
    directory = directory.expanduser().absolute()
    work = temporary_beside(directory)
    try:
        for file in files:
            path = work / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.content, bytes):
                path.write_bytes(file.content)
            else:
                shutil.copyfile(file.content, path)  # the content alone: its mode is that of a new file
        refuse_used(directory)
        os.rename(work, directory)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror} ({error.filename})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
