"""An engine is kept supplied across shards, and shards come out in their order.

Strategy: an engine of a few lines that finishes its youngest requests first, two at a time.
"""

import pytest

from stages.sampling.base import Prompt
from stages.sampling.canned import Canned
from stages.sampling.feeding import OpenShard, feed


class Engine:
    """Finishes the youngest two of its requests at each step; remembers how many it had, and had been given."""

    def __init__(self):
        self.requests: dict[str, Prompt] = {}
        self.count, self.held = 0, []

    def add(self, prompts):
        ids = []
        for prompt in prompts:
            for _ in prompt.seeds:
                ids.append(str(self.count))
                self.requests[ids[-1]] = prompt
                self.count += 1
        return ids

    def step(self):
        self.held.append((len(self.requests), self.count))
        young = list(self.requests)[-2:]
        return [Done(request, self.requests.pop(request)) for request in young] + [Done("of a later step", None, False)]


class Done:
    def __init__(self, request_id, prompt, finished=True):
        self.request_id, self.prompt, self.finished = request_id, prompt, finished


def shards(count: int) -> list[list[Prompt]]:
    """Shards of two prompts with three candidates each."""
    return [[Prompt(f"p{shard}-{row}", [5], [1, 2, 3]) for row in range(2)] for shard in range(count)]


def prompts_of(shard: OpenShard) -> list[str]:
    return [shard.outputs[request].prompt.prompt_id for request in shard.requests]


@pytest.mark.parametrize(("least", "most"), [(1, 6), (7, 12), (12, 16), (100, 30)])
def test_shards_come_in_order_and_the_engine_has_enough_requests(least, most):
    engine = Engine()
    done = list(feed(shards(5), least, engine.add, engine.step))
    assert [shard.prompts for shard in done] == shards(5)
    for number, shard in enumerate(done):
        assert prompts_of(shard) == [f"p{number}-0"] * 3 + [f"p{number}-1"] * 3
    assert max(held for held, _ in engine.held) == most
    assert all(held >= least for held, added in engine.held if added < 30)  # until nothing is left to add


def test_nothing_is_read_beyond_an_empty_shard_before_all_are_done():
    engine, read, done = Engine(), [], []

    def source():
        for shard in [*shards(2), [], *shards(1), [], []]:
            read.append(len(done))
            yield shard

    for shard in feed(source(), 100, engine.add, engine.step):
        done.append(shard)
    assert [len(shard.prompts) for shard in done] == [2, 2, 0, 2, 0, 0]
    assert read == [0, 0, 0, 3, 3, 5]  # shards that were done when each was read
    assert list(feed([], 5, engine.add, engine.step)) == []


def test_the_engine_has_its_next_requests_before_a_shard_is_written():
    engine = Engine()
    stream = feed(shards(3), 1, engine.add, engine.step)
    next(stream)
    assert engine.count == 12 and len(engine.requests) == 6


def test_a_sampler_without_a_queue_makes_one_shard_at_a_time(monkeypatch):
    calls = []
    monkeypatch.setattr(Canned, "generate", lambda self, prompts: calls.append(prompts) or [[]] * len(prompts))
    stream = Canned(None, None, "", [], "cpu").generate_all(iter([*shards(2), []]))
    assert next(stream) == [[], []] and calls == shards(1)
    assert list(stream) == [[[], []], []] and calls == shards(2)
