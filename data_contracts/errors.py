"""Contracts - the error tree: whose mistake it was, and whether another try can help.

Every class takes one message only, so that it survives pickling between processes. A message says what is wrong, where,
what was found, what was expected and what to do next. A command ends with the `exit_code` of its error; 2 is reserved
for "the request is wrong, nothing was written".
"""

from __future__ import annotations

import sys

from data_contracts.redaction import redact


class PipelineError(Exception):
    """Any error that this project raises on purpose."""

    exit_code = 1

    def __init__(self, *arguments: object):
        """A message never holds a secret, wherever it will be shown: on stderr, in a log, as a state in Prefect."""
        super().__init__(*(redact(value) if isinstance(value, str) else value for value in arguments))


class ConfigError(PipelineError, ValueError):
    """The request is wrong: config, prompt file, model directory. Raised before any model loads; never retried."""

    exit_code = 2


class ContractError(PipelineError, ValueError):
    """An artifact breaks its promise. The message names kind, path, row and column."""

    exit_code = 3


class ArtifactError(PipelineError, RuntimeError):
    """An artifact is missing, unfinished or damaged."""

    exit_code = 4


class NewerRecordError(ArtifactError):
    """A record was written by a newer version of this program, which this one must not touch."""


class StageError(PipelineError, RuntimeError):
    """A stage process died. The message carries its exit code, the path of its log and its last lines."""

    exit_code = 5


class TransientError(PipelineError, RuntimeError):
    """Another try may help (a server that did not answer, a port in use). The only class that is retried."""

    exit_code = 75


BY_NAME: dict[str, type[PipelineError]] = {
    cls.__name__: cls
    for cls in (ConfigError, ContractError, ArtifactError, NewerRecordError, StageError, TransientError)
}


def print_error(error: PipelineError) -> int:
    """Print an error on stderr, as every command does when an error of ours ends it, and return the exit code."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code
