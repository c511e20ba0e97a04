"""Flows - the cards (README.md) of what leaves a run: of an exported model, and of its pairs as a data set.

A card says only what the run's artifacts and the person who exports say. Licences are stated by that person or called
not stated; nothing is guessed. Paths of this machine appear as the last part of the path.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config
from data_contracts.installation import BROUGHT, ROOT
from data_contracts.redaction import redact
from data_contracts.rows import ReportRow
from flows.config import PATHS, RunConfig
from flows.report.page import markdown_table
from flows.report.story import Story
from flows.report.text import as_markdown, visible
from stages.registry import Named

SETTINGS_FILE = "selfplay.yaml"
"""In an export: the settings of the run that made it."""
NOT_STATED = "not stated"
MACHINE_SETTINGS = ("execution", "runtime")
"""Sections that say where and how fast a run works, never what comes out."""


class Licences(NamedTuple):
    """What the person who exports says of the licences; None: nothing."""

    policy: str | None
    data: str | None


class Digest(NamedTuple):
    """A file or data set that a run read."""

    role: str
    name: str
    digest: str


class CardFacts(NamedTuple):
    """What a card says beside the run's story."""

    config: RunConfig
    story: Story
    iteration: int
    base: str | None
    """Name of the start model on the hub; None: only its directory's name is known."""
    is_adapter: bool
    key: str
    """Of the exported checkpoint in its store; "" where rows are exported."""
    inputs: Sequence[Digest]
    costs: Sequence[Mapping[str, Any]]
    """Rows of a table: what each stage cost; [] if no ledger is there."""
    version: str
    """Of this program."""
    licences: Licences

    @property
    def title(self) -> str:
        return f"{self.config.name}, iteration {self.iteration}"

    @property
    def start(self) -> str:
        """The start model, as people may be told."""
        return self.base or name_of_model(self.config.policy)


def name_of_model(model: ModelRef) -> str:
    """Return the hub id of a model, with its revision, or the last part of its path."""
    if model.hub_id is None:
        return Path(str(model.path)).name
    return f"{model.hub_id}@{model.revision}" if model.revision else model.hub_id


def model_card(facts: CardFacts) -> str:
    """Return README.md of an exported model: YAML that the hub reads, then what was done, measured and paid."""
    method = facts.config.method.name
    head = {
        "license": facts.licences.policy,
        "base_model": facts.base,
        "base_model_relation": ("adapter" if facts.is_adapter else "finetune") if facts.base else None,
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-play", method],
    }
    what = "A LoRA adapter" if facts.is_adapter else "A model"
    lines = [
        f"# {as_markdown(facts.title)}",
        "",
        f"{what} made from {as_markdown(facts.start)} by {facts.iteration} of {facts.config.iterations} iterations of "
        f"self-play with {method}.",
        "",
        *_use(facts),
        *_method(facts.config),
        *_data(facts.inputs, facts.story.data),
        *_results(facts),
        *_costs(facts.costs),
        *_reproduction(facts),
        *_licences(facts.licences),
    ]
    return _card(head, lines)


def data_card(facts: CardFacts, configurations: Mapping[str, str]) -> str:
    """Return README.md of the exported pairs and generations. configurations: name -> what one of its rows is."""
    head = {
        "license": facts.licences.data,
        "task_categories": ["text-generation"],
        "tags": ["self-play", "preference", facts.config.method.name],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]}
            | ({"default": True} if number == 0 else {})
            for number, name in enumerate(configurations)
        ],
    }
    lines = [
        f"# Rows of the self-play run {as_markdown(facts.config.name)}",
        "",
        f"Answers of {as_markdown(facts.start)}, and of its later iterations, and what was trained on. Each message "
        "list holds `{role, content}` objects; `iteration` says which round of self-play a row is of.",
        "",
        *(f"- `{name}`: {meaning}" for name, meaning in configurations.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("DIRECTORY OR OWNER/NAME", "{next(iter(configurations))}", split="train")',
        "```",
        "",
        *_method(facts.config),
        *_data(facts.inputs, facts.story.data),
        *_reproduction(facts),
        *_licences(facts.licences),
    ]
    return _card(head, lines)


def shared_settings(config: RunConfig) -> str:
    """Return the run's settings as YAML for others: no machine's settings, and of paths the last part only."""
    return yaml.safe_dump(_shared(config), sort_keys=False)


def equation(method: Any) -> str:
    """Return the loss as the method's own docstring says it, with the meaning of its symbols; "" if it says none.

    >>> from stages.methods import METHODS
    >>> equation(METHODS.get("spin")).splitlines()[0]
    'loss = l(beta (LR(truth) - LR(generation))); logistic is DPO with these pairs.'
    """
    text = inspect.getdoc(method.pair_loss) or ""
    return re.split(r"\n(?=Shapes:|Deviates from|At policy|>>>)|(?<=\.) Shapes:", text)[0].strip()


def _card(head: Mapping[str, Any], lines: Sequence[str]) -> str:
    stated = {name: value for name, value in head.items() if value}
    return visible(redact(f"---\n{yaml.safe_dump(stated, sort_keys=False)}---\n\n" + "\n".join(lines).strip() + "\n"))


def _use(facts: CardFacts) -> list[str]:
    """How to load the model and ask it something."""
    load = ['model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")']
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.is_adapter:
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        load = ['model = AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto")']
    sampling = facts.config.sampling
    ids = [
        'messages = [{"role": "user", "content": "Name a fruit."}]',
        'ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]',
    ]
    if not sampling.is_chat:
        ids = ['ids = tokenizer("Name a fruit.", return_tensors="pt")["input_ids"]']
    return [
        "```python",
        *imports,
        "",
        'name = "DIRECTORY OR OWNER/NAME"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        *load,
        *ids,
        f"answer = model.generate(ids, max_new_tokens={sampling.max_new_tokens})[0, ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        "```",
        "",
        f"generation_config.json holds the run's own sampling (temperature {sampling.temperature:g}, top_p "
        f"{sampling.top_p:g}, top_k {sampling.top_k or 'none'}) and the tokens that end an answer. In the run, answers had at "
        f"most {sampling.max_new_tokens} tokens and prompts {sampling.max_prompt_tokens}.",
        "",
    ]


def _method(config: RunConfig) -> list[str]:
    settings = json.dumps(config.method.model_dump(mode="json"))
    lines = ["## Method", "", f"{config.method.name}: {as_markdown(config.spec.SOURCE)}", ""]
    if text := equation(config.spec):
        lines += ["```", text, "```", ""]
    return [*lines, f"Settings: `{settings}`", ""]


def _data(inputs: Sequence[Digest], notes: Sequence[str]) -> list[str]:
    rows = [{"what": item.role, "name": item.name, "SHA-256": item.digest} for item in inputs]
    lines = ["## What went in", "", markdown_table(rows), ""]
    if notes:
        lines += ["```", *(line.replace("```", "'''") for line in notes), "```", ""]
    return lines


def _results(facts: CardFacts) -> list[str]:
    story, iteration = facts.story, facts.iteration
    lines = [
        "## Results",
        "",
        "On held-out prompts that the run never trained on; intervals are 95 %, from a bootstrap paired by prompt.",
        "",
    ]
    if gain := story.gains[iteration]:
        lines += [f"- held-out score, against the start model: {_interval(gain)}"]
        lines += [f"- the same at equal length: {_interval(gain['controlled'])}", ""]
    measured = [{name: value for name, value in row.items() if not name.endswith(" s")} for row in story.rows]
    lines += [markdown_table(measured), ""]
    if rows := _benchmarks(story.reports[0], story.reports[iteration]):
        lines += ["### Benchmarks", "", markdown_table(rows), ""]
    return lines


def _interval(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _benchmarks(before: Sequence[ReportRow], after: Sequence[ReportRow]) -> list[dict[str, Any]]:
    """A row per number that is not of the held-out prompts, the start model's beside it."""

    def text(row: ReportRow) -> str:
        if row["low"] is not None and row["high"] is not None:
            return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        return f"{row['value']:.3f}" + (f" +- {row['stderr']:.3f}" if row["stderr"] is not None else "")

    def name(row: ReportRow) -> tuple[str, str, str]:
        return row["suite"], row["task"], row["metric"]

    started = {name(row): text(row) for row in before}
    return [
        {
            "benchmark": f"{row['task']}/{row['metric']}",
            "n": row["n"],
            "shots": "" if row["n_shot"] is None else row["n_shot"],
            "start model": started.get(name(row), ""),
            "this model": text(row),
        }
        for row in after
        if row["suite"] != "heldout"
    ]


def _costs(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not costs:
        return []
    return ["## Cost", "", "Of the whole run, stage by stage.", "", markdown_table([dict(row) for row in costs]), ""]


def _reproduction(facts: CardFacts) -> list[str]:
    return [
        "## Reproduce",
        "",
        f"`{SETTINGS_FILE}` holds the run's settings (seed {facts.config.seed}). Put the files and models that it names "
        "beside it, with the digests above, then:",
        "",
        f"    selfplay run {SETTINGS_FILE}",
        "",
        f"Made by {facts.version}" + (f"; the checkpoint's key is {facts.key}." if facts.key else "."),
        "",
    ]


def _licences(licences: Licences) -> list[str]:
    return [
        "## Licences",
        "",
        f"- start model: {as_markdown(licences.policy or NOT_STATED)}",
        f"- data: {as_markdown(licences.data or NOT_STATED)}",
        "",
        "As stated by whoever exported this; not checked.",
        "",
    ]


def _shared(value: Any, key: str = "") -> Any:
    """A setting as plain data: of a section what differs from its defaults, and the name of a plug-in always."""
    if isinstance(value, Config):
        fields = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if name not in MACHINE_SETTINGS
            and (
                getattr(value, name) != field.get_default(call_default_factory=True)
                or (isinstance(value, Named) and name == "name")
            )
        }
        return _shared(fields)
    if isinstance(value, dict):
        return {name: _shared(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shared(item, key) for item in value]
    if isinstance(value, str) and (key in PATHS or Path(value).is_absolute()):
        return _shared_path(value)
    return value


def _shared_path(path: str) -> str:
    """The path of a file that the pipeline brings, as every installation has it; of all others the last part."""
    if path.startswith(BROUGHT):
        return path
    if Path(path).is_relative_to(ROOT / BROUGHT):
        return Path(path).relative_to(ROOT).as_posix()
    return Path(path).name
