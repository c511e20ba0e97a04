"""Flows - talk to a trained model: each prompt is answered by the start model and by an iteration's, side by side.

Both are asked as the run asks for held-out answers: the same chat template, turn ends, temperature, top_p, top_k and limits,
and the same seed for both, so that what differs is the model. Each prompt is a conversation of its own.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, TextIO

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError
from data_contracts.prompts import Message
from data_contracts.store import Store
from flows.cli.finished import measured_policies
from flows.config import RunConfig
from flows.report.text import visible
from stages.models.policy import pick_device
from stages.models.turns import Turns
from stages.sampling import SAMPLERS
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.stage import SamplingConfig

NARROW = 60
"""Terminals of fewer columns show the answers one below the other."""
START = "start model"
MARK = "> "


class Speaker:
    """A model that answers prompts as the run's policies do."""

    def __init__(self, name: str, policy: ArtifactRef, sampling: SamplingConfig):
        self.name, self.sampling = name, sampling
        self.turns = Turns(policy.path, sampling)
        sampler, device = SAMPLERS.get("transformers"), pick_device(sampling.runtime.device)
        settings = SAMPLERS.config({"name": "transformers", "dtype": getattr(sampling.backend, "dtype", "bfloat16")})
        self.sampler = sampler(settings, sampling, policy.path, self.turns.stop_ids, device, self.turns.blank_ids)
        self._asked: Counter[str] = Counter()

    def answer(self, text: str) -> str:
        """Return one answer; asked again, another one. Raises: ConfigError for a prompt that the run would refuse."""
        ids = self.turns.prompt([Message(role="user", content=text)])
        limit = self.sampling.max_prompt_tokens
        if not 0 < len(ids) <= limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens, and the run allows 1 to {limit}: shorten it")
        seeds = candidate_seeds(self.sampling.seed + self._asked[text], text, 1)
        self._asked[text] += 1
        [[candidate]] = self.sampler.generate([Prompt(text, ids, seeds)])
        answer = visible(self.turns.read(candidate.token_ids).strip()) or "[nothing]"
        return answer if candidate.finish_reason == "stop" else f"{answer} [cut]"


class Answer(NamedTuple):
    """What one of the models says."""

    name: str
    text: str


def chat(config: RunConfig, store: Store, iteration: int | None, prompts: TextIO) -> None:
    """Answer prompts until there are no more: typed ones, or those of a file or pipe, one per line.

    Raises: ConfigError for a run without a trained model, and for an iteration that is not measured.
    """
    policies = measured_policies(store, config.name)
    trained = [number for number in policies if number]
    if not trained:
        raise ConfigError(
            f"the run {config.name} has no trained model yet in {store.root}: see `selfplay status {config.name}`"
        )
    iteration = trained[-1] if iteration is None else iteration
    if iteration not in trained:
        raise ConfigError(f"--iteration is {iteration}; trained and measured: {', '.join(map(str, trained))}")
    _silence_libraries()
    print(f"loading the start model and iteration {iteration} of {config.name} ...", file=sys.stderr, flush=True)
    sampling = config.sampling_for_heldout()
    speakers = [
        Speaker(START, policies[0], sampling),
        Speaker(f"iteration {iteration}", policies[iteration], sampling),
    ]
    for text in _prompts(prompts):
        try:
            answers = [Answer(speaker.name, speaker.answer(text)) for speaker in speakers]
        except ConfigError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        _show(text, answers, is_echoed=not prompts.isatty())


def _prompts(stream: TextIO) -> Iterator[str]:
    """Yield the prompts without blank lines: those of a pipe, or typed ones until Ctrl-D or Ctrl-C."""
    if not stream.isatty():
        yield from filter(None, map(str.strip, stream))
        return
    print("type a prompt; Ctrl-D ends", file=sys.stderr, flush=True)
    importlib.import_module("readline")  # arrow keys and a history in `input`
    while True:
        try:
            text = input(MARK).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            yield text


def _show(text: str, answers: list[Answer], is_echoed: bool) -> None:
    """Print the answers: beside each other in a terminal, else one below the other under the prompt."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if sys.stdout.isatty() and console.width >= NARROW:
        table = Table(*(answer.name for answer in answers), width=console.width)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(escape(answer.text) for answer in answers))
        console.print(table)
        return
    if is_echoed:
        print(MARK + visible(text))
    for answer in answers:
        print(f"{answer.name}: {answer.text}")
    print(flush=True)


def _silence_libraries() -> None:
    """Keep warnings and progress bars of libraries out of the conversation."""
    from stages.models.lazy import import_transformers

    warnings.simplefilter("ignore")
    logging = import_transformers().utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
