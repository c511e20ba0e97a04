"""Flows - push files to the Hugging Face hub: a new repository, and one commit in it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_contracts.checkpoint import HUB_ID
from data_contracts.errors import ConfigError, TransientError

OF_THE_HUB = (".gitattributes",)
"""Files that the hub itself puts into a new repository."""


def check_new(repository: str, is_data: bool) -> None:
    """Refuse a repository that holds something, before anything is read or sent.

    Raises: ConfigError for a bad name, a used repository, or no permission; TransientError if the hub does not answer.
    """
    if not HUB_ID.fullmatch(repository) or "/" not in repository:
        raise ConfigError(f"--hub is {repository!r}: it must be owner/name, of letters, digits, dots and dashes")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _errors_explained(repository):
        try:
            names = HfApi().list_repo_files(repository, repo_type=_kind(is_data))
        except RepositoryNotFoundError:
            return
    if used := [name for name in names if name not in OF_THE_HUB]:
        raise ConfigError(
            f"{repository} is there already and holds {len(used)} files ({used[0]}, ...): name another repository, or "
            "delete that one on the hub first"
        )


def push(
    files: Sequence[tuple[str, Path | bytes]], repository: str, private: bool, is_data: bool, message: str
) -> str:  # fmt: skip
    """Make the repository, unless an earlier try did, and commit the files to it. Returns its address.

    Files are read where they lie. Nothing is seen of a push that fails: the commit comes last.
    Raises: as `check_new`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _errors_explained(repository):
        url = api.create_repo(repository, private=private, repo_type=_kind(is_data), exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files]
        api.create_commit(repository, operations, commit_message=message, repo_type=_kind(is_data))
    return str(url)


def _kind(is_data: bool) -> str:
    return "dataset" if is_data else "model"


@contextmanager
def _errors_explained(repository: str) -> Generator[None]:
    """Raises: ConfigError where the hub refuses, TransientError where it does not answer."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set, so the hub is not asked: unset it to push") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        sentence = str(error).strip().splitlines()[0]
        if status in (401, 403):
            raise ConfigError(
                f"the hub refuses to write {repository} ({sentence}): log in with `hf auth login`, with a token that "
                "may write there"
            ) from None
        if 400 <= status < 500 and status != 429:
            raise ConfigError(f"the hub refuses {repository}: {sentence}") from None
        raise TransientError(f"the hub failed on {repository} ({sentence}); run the same command again") from None
    except (OSError, RuntimeError) as error:  # the network's own errors, and those of its upload threads
        cause = error.__cause__ or error
        raise TransientError(
            f"{repository} could not be pushed ({type(cause).__name__}: {cause}); nothing is to be seen of it yet. Run "
            "the same command again"
        ) from None
