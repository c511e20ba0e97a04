"""Flows - `selfplay data`: what a run would read of a source, or of the sources of a run config. Only --out writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_contracts.checkpoint import has_chat_template
from data_contracts.config import load_yaml, parse
from data_contracts.errors import ConfigError
from data_contracts.files import open_atomic, remove_abandoned_beside
from data_contracts.prompts import own_line
from data_contracts.words import plural
from flows.config import load_run
from stages.models.turns import Turns
from stages.sampling.stage import SamplingConfig
from stages.scoring.checks import validate_checks
from tasks.data.display import LEGEND, SAMPLED, as_seen, contents, histograms, lengths
from tasks.data.drops import Drops
from tasks.data.lengths import fit_to_model
from tasks.data.memory import Memory
from tasks.data.preparation import hold_out, prepare
from tasks.data.prompt_set import PromptSet
from tasks.data.reading import read_source
from tasks.data.selection import NEARLY_HELD_OUT, near_heldout, without
from tasks.data.source import PromptsConfig, Source
from tasks.models import locate, model_named

SHOWN_ROWS = 3
SHOWN_PROBLEMS = 5
SIMILARITY = PromptsConfig.model_fields["duplicate_similarity"].default


class Options(NamedTuple):
    """What the command line says beside the source."""

    split: str | None = None
    name: str | None = None
    revision: str | None = None
    columns: Sequence[str] = ()
    """`ours=theirs` each."""
    limit: int | None = None
    seed: int = 0
    policy: str | None = None
    """A model directory, or a hub id."""
    sampling: str = "{}"
    """Settings of the sample stage as YAML, e.g. {template: plain, max_prompt_tokens: 1024}."""
    heldout: str | None = None
    """Another source, as YAML or a path."""
    out: Path | None = None


def describe(source: str, options: Options) -> Iterator[str]:
    """The lines of `selfplay data`. Raises: ConfigError for what a run would refuse too."""
    if source.endswith((".yaml", ".yml")):
        yield from _describe_run(source, options)
        return
    parsed = source_of(source, options)
    reading = read_source(parsed, options.seed)
    yield f"{parsed}: {reading.rows} rows, read as {reading.shape} from the columns {', '.join(reading.used)}"
    yield from reading.notes
    prompts, drops = reading.prompts, reading.drops
    if options.heldout is not None:
        heldout = read_source(_source(options.heldout), options.seed).prompts
        near = near_heldout(prompts, heldout, SIMILARITY)
        yield f"{len(near)} rows are nearly one of {len(heldout)} held-out prompts (similarity {SIMILARITY} and more)"
        prompts, more_drops = without(prompts, near, NEARLY_HELD_OUT)
        drops.update(more_drops)
    sampling = parse(SamplingConfig, load_yaml(options.sampling, "--sampling") or {}, "--sampling")
    model = None if options.policy is None else locate(model_named(options.policy), False)
    yield from _describe_rows(prompts, drops, model, sampling)
    yield from _write(prompts, options.out)


def _describe_run(path: str, options: Options) -> Iterator[str]:
    """The prompts of a run config, fitted to its pairing and its model."""
    run = load_run(path)
    prepared = prepare(run.prompts, run.seed, run.reads)
    model = locate(run.policy, run.sampling.template == "chat")
    samplings = (run.sampling_for_training(), run.sampling_for_heldout())
    prepared = fit_to_model(prepared, run.prompts, samplings, model, Memory(None))
    prepared = hold_out(prepared, run.prompts, run.seed, Memory(None))
    yield f"{path}: {prepared.lines()[0]} for {run.method.name} with pairing {run.pairing}"
    yield from prepared.notes
    yield from _describe_rows(prepared.train, prepared.drops, model, samplings[0])
    if prepared.heldout_drops.counts:
        yield "held-out rows that are not used:"
        yield prepared.heldout_drops.text()
    yield from _write(prepared.train, options.out)
    prepared.check(run.prompts)


def _describe_rows(prompts: PromptSet, drops: Drops, model: Path | None, sampling: SamplingConfig) -> Iterator[str]:
    yield f"{len(prompts)} rows can be used: {'; '.join(contents(prompts)) or 'none'}"
    if drops.counts:
        yield f"{drops.counts.total()} rows are dropped:"
        yield drops.text()
    yield from _unusable_checks(prompts)
    turns = None
    if model is not None:
        plain = sampling.is_chat and not has_chat_template(model)
        turns = Turns(model, sampling.model_copy(update={"template": "plain"}) if plain else sampling)
        yield f"as the policy in {model} sees them ({LEGEND}):"
    for index in range(min(SHOWN_ROWS, len(prompts))):
        yield f"--- {prompts.where(index)}"
        if turns is None:
            yield own_line(prompts[index])
        else:
            yield from as_seen(prompts[index], turns, sampling.max_new_tokens)
    if turns is None:
        yield "--policy MODEL shows rows as its tokens, counts them, and names prompts that are too long"
        return
    counts = lengths(prompts, turns)
    yield from histograms(counts)
    if counts:
        longer = int((counts["prompt"] > sampling.max_prompt_tokens).sum())
        num_counted = len(counts["prompt"])
        yield f"{longer} of {num_counted} prompts that were counted have more than {sampling.max_prompt_tokens} tokens"
    if len(prompts) > SAMPLED:
        yield f"tokens are those of {len(counts['prompt'])} rows, evenly spaced"


def _unusable_checks(prompts: PromptSet) -> Iterator[str]:
    """Name the rows whose checks the scorer `checks` refuses, and with it a run."""
    problems: list[str] = []
    for index, row in enumerate(prompts):
        if row["checks"] != "[]":
            try:
                validate_checks(json.loads(row["checks"]))
            except ConfigError as error:
                problems.append(f"  {prompts.where(index)}: {error}")
    if problems:
        yield f"{plural(len(problems), 'row')} with checks that the scorer `checks` refuses, and with them the run:"
        yield from problems[:SHOWN_PROBLEMS]
        if len(problems) > SHOWN_PROBLEMS:
            yield f"  and {len(problems) - SHOWN_PROBLEMS} more"


def _write(prompts: PromptSet, out: Path | None) -> Iterator[str]:
    """Write the rows that can be used as JSON lines of our own format."""
    if out is None:
        return
    if out.exists():
        raise ConfigError(f"{out} is there already: name another file with --out")
    try:
        with open_atomic(out) as file:
            for row in prompts:
                file.write((own_line(row) + "\n").encode())
        remove_abandoned_beside(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    yield f"{len(prompts)} rows are in {out}"


def source_of(text: str, options: Options) -> Source:
    """The source that an argument and its options name. Raises: ConfigError."""
    source = _source(text)
    changes = {name: getattr(options, name) for name in ("split", "name", "revision", "limit")}
    changes["columns"] = dict(_column(assignment) for assignment in options.columns)
    set_fields = {name: value for name, value in changes.items() if value}
    return parse(Source, source.model_dump(exclude_defaults=True) | set_fields, text)


def _source(text: str) -> Source:
    """A path, or a mapping in YAML."""
    return parse(Source, load_yaml(text, text) if text.startswith("{") else text, text)


def _column(assignment: str) -> tuple[str, str]:
    ours, separator, theirs = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--column looks like prompt=question, got {assignment!r}")
    return ours, theirs
