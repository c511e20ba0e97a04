"""Contracts - the error tree: who was wrong, and whether another try can help.

Every class takes one message only, so that it survives pickling between processes. A message says what, where, got, expected and
what to do next. `exit_code` is what a command ends with; 2 is reserved for "the request is wrong, nothing was written".
"""

from __future__ import annotations

import sys


class PipelineError(Exception):
    """Anything this project raises on purpose."""

    exit_code = 1


class ConfigError(PipelineError, ValueError):
    """The request is wrong: config, prompt file, model directory. Raised before any model loads; never retried."""

    exit_code = 2


class ContractError(PipelineError, ValueError):
    """An artifact breaks its promise. The message names kind, path, row id and column."""

    exit_code = 3


class ArtifactError(PipelineError, RuntimeError):
    """An artifact is missing, unfinished or damaged."""

    exit_code = 4


class StageError(PipelineError, RuntimeError):
    """A stage process died. The message carries its exit code, log path and last lines."""

    exit_code = 5


class TransientError(PipelineError, RuntimeError):
    """Worth another try (a server that did not answer, a port in use). The only class that is retried."""

    exit_code = 75


BY_NAME = {cls.__name__: cls for cls in (ConfigError, ContractError, ArtifactError, StageError, TransientError)}


def print_error(error: PipelineError) -> int:
    """How every command ends with an error of ours: one message on stderr. Returns: the exit code."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code
