"""The canned sampler and the seeds: a candidate depends on its own seed, on nothing else, and keeps the EOS contract.

Strategy: many seeds, few ids, so that every case the contract knows comes up.
"""

import random

from hypothesis import given
from hypothesis import strategies as st

from stages.sampling.base import SEED_SPACE, Prompt, candidate_seeds
from stages.sampling.canned import Canned
from stages.sampling.stage import SamplingConfig


def sampler(stop_ids=(1,), vocabulary: int = 4, max_new_tokens: int = 6) -> Canned:
    config = SamplingConfig(backend={"name": "canned", "vocabulary": vocabulary}, max_new_tokens=max_new_tokens)
    return Canned(config.backend, config, "no model", list(stop_ids), "cpu")


def prompts(count: int, num_candidates: int = 3, seed: int = 0) -> list[Prompt]:
    return [Prompt(f"p{number}", [7], candidate_seeds(seed, f"p{number}", num_candidates)) for number in range(count)]


def test_the_seed_of_a_candidate_depends_on_run_seed_prompt_and_number_alone():
    assert candidate_seeds(0, "p1", 3) == candidate_seeds(0, "p1", 5)[:3]
    assert candidate_seeds(0, "p1", 3) != candidate_seeds(1, "p1", 3) != candidate_seeds(1, "p2", 3)
    # These numbers are part of what a generations key means: change them with the stage's version.
    assert candidate_seeds(0, "p1", 2) == [3841003133239829504, 3841003133239829505]


@given(st.integers(0, 2**40), st.text(), st.text())
def test_seeds_fit_a_signed_64_bit_column_and_do_not_run_into_each_other(seed, left, right):
    one, other = candidate_seeds(seed, left, 1024), candidate_seeds(seed, right, 1024)
    assert min(one) >= 0 and max(one) < SEED_SPACE < 2**63
    assert left == right or not set(one) & set(other)


def test_the_same_prompts_give_the_same_candidates():
    assert sampler().generate(prompts(20)) == sampler().generate(prompts(20))


def test_a_candidate_does_not_depend_on_the_other_prompts_or_their_order():
    together = dict(zip(range(20), sampler().generate(prompts(20)), strict=True))
    order = random.Random(0).sample(range(20), 20)
    for number, group in zip(order, sampler().generate([prompts(20)[number] for number in order]), strict=True):
        assert group == together[number] == sampler().generate([prompts(20)[number]])[0]


def test_candidates_of_one_prompt_differ():
    group = sampler(vocabulary=256, max_new_tokens=20).generate(prompts(1, num_candidates=8))[0]
    assert len({tuple(candidate.token_ids) for candidate in group}) == 8


def test_a_candidate_holds_a_stop_id_where_it_ended_and_nowhere_else():
    seen = set()
    for group in sampler(stop_ids=(1, 3)).generate(prompts(300)):
        for candidate in group:
            seen.add(candidate.finish_reason)
            stops = [position for position, token in enumerate(candidate.token_ids) if token in (1, 3)]
            ended = candidate.finish_reason == "stop"
            assert stops == ([len(candidate.token_ids) - 1] if ended else [])
            assert ended or len(candidate.token_ids) == 6
            assert 1 <= len(candidate.token_ids) <= 6 and len(candidate.token_logps) == len(candidate.token_ids)
            assert all(0 <= token < 4 for token in candidate.token_ids)
    assert seen == {"stop", "length"}


def test_a_model_that_names_no_stop_id_never_ends_a_response():
    assert {candidate.finish_reason for group in sampler(stop_ids=()).generate(prompts(50)) for candidate in group} == {
        "length"
    }
