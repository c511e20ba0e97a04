"""Stages - an engine kept supplied with requests: shards are written one by one, their requests run side by side.

An engine that got one shard at a time would wait for the slowest answer of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from stages.sampling.base import Prompt


class Output(Protocol):
    """What an engine says of a request."""

    request_id: str
    finished: bool


class OpenShard:
    """A shard whose requests the engine has."""

    def __init__(self, prompts: Sequence[Prompt], requests: Sequence[str]):
        self.prompts, self.requests = prompts, requests
        """`requests`: the id of each candidate's request, prompt by prompt."""
        self.outputs: dict[str, Any] = {}
        """By id of the request."""

    @property
    def is_complete(self) -> bool:
        return len(self.outputs) == len(self.requests)


def feed(
    shards: Iterable[Sequence[Prompt]],
    least: int,
    add: Callable[[Sequence[Prompt]], Sequence[str]],
    step: Callable[[], Iterable[Output]],
) -> Iterator[OpenShard]:
    """Yield the shards in their order, complete.

    least: requests that the engine has at least, while shards are left. add: hands the requests of a shard to the
    engine and returns their ids. step: lets the engine work and returns what it has finished. An empty shard is yielded
    after all before it, and before any after it is read.
    """
    source = iter(shards)
    is_open, must_drain = True, False
    waiting: deque[OpenShard] = deque()
    owners: dict[str, OpenShard] = {}
    while True:
        while is_open and not must_drain and len(owners) < least:
            prompts = next(source, None)
            if prompts is None:
                is_open = False
                break
            shard = OpenShard(prompts, add(prompts) if prompts else [])
            owners |= dict.fromkeys(shard.requests, shard)
            waiting.append(shard)
            must_drain = not prompts
        while waiting and waiting[0].is_complete:
            yield waiting.popleft()
        if not waiting:
            if not is_open:
                return
            must_drain = False
            continue
        for output in step():
            if output.finished:
                owners.pop(output.request_id).outputs[output.request_id] = output
