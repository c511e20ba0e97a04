"""Stages - python -m stages.sampling.check REQUEST.json: can these models be loaded, and do these prompts fit the
policy? Reads configs, headers and tokenizers, no weights.

REQUEST.json: {"model": directory, "sets": [{"sampling": config, "prompts": Arrow file, "truncate": bool}, ...],
"models": [[directory, task], ...]}; tasks: stages/models/architecture.py. Writes answer.json beside it: the `Verdicts`
of each set (stages/sampling/prompt_lengths.py), or, with exit code 2, one sentence where no prompt could be used,
whatever it says.

A chat template is a program that came with a model: here, in a process of its own, it runs under limits of time and
memory before any stage runs it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError
from stages.models.architecture import check_model
from stages.models.lazy import import_auto_classes
from stages.models.tokens import load_tokenizer
from stages.models.turns import Turns, unusable
from stages.sampling.prompt_lengths import PromptChecker, Verdicts, check_file
from stages.sampling.stage import SamplingConfig, check_context

ANSWER = "answer.json"
TEMPLATE_SECONDS = 20
"""For the few short conversations that a template is asked about; the slowest of the real ones takes 0.1 s."""
TEMPLATE_BYTES = 4 << 30
"""What a template may take of memory, beyond what this process has."""


@contextmanager
def limits(model: str) -> Iterator[None]:
    """Time and memory for a chat template. Raises: ConfigError where it needs more."""

    def late(*_: Any) -> None:
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(TEMPLATE_SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + TEMPLATE_BYTES, hard))
        yield
    except (TimeoutError, MemoryError) as error:
        limit = f"{TEMPLATE_SECONDS} s" if isinstance(error, TimeoutError) else f"{TEMPLATE_BYTES >> 30} GiB"
        raise ConfigError(
            f"the chat template of {model} did not come to an end within {limit}: it has a loop too many. "
            "Mend it, or give another one as sampling.template {file: x.jinja}"
        ) from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def preload() -> None:
    """Import what `main` will; once for many processes, before any is forked (stages/forkserver.py)."""
    import_auto_classes()


def main(arguments: list[str]) -> int:
    """Answer the request in the file that is the one argument. Returns: the exit code."""
    path = Path(arguments[0])
    request = json.loads(path.read_text(encoding="utf-8"))
    answer = path.with_name(ANSWER)
    try:
        for directory, task in request["models"]:
            check_model(Path(directory), task)
        tokenizer = load_tokenizer(request["model"])
        verdicts = [_check_set(item, request["model"], tokenizer) for item in request["sets"]]
    except ConfigError as error:
        answer.write_text(json.dumps(str(error)), encoding="utf-8")
        return error.exit_code
    answer.write_text(json.dumps(verdicts), encoding="utf-8")
    return 0


def _check_set(item: dict[str, Any], model: str, tokenizer: Any) -> Verdicts:
    config = SamplingConfig.model_validate(item["sampling"])
    with limits(model):
        turns = Turns(model, config, tokenizer)
    check_context(config, turns)
    reason_to_drop = None
    if config.special_tokens_in_data != "text":
        reason_to_drop = partial(unusable, settings=config, turns=turns)
    checker = PromptChecker(turns.prompt, config.max_prompt_tokens, item["truncate"], reason_to_drop)
    return check_file(item["prompts"], checker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
