"""The transformers sampler: exact log-probs, the distribution that was asked for, and a candidate that depends on its
seed alone.

Strategy: the tiny model in float32; greedy decoding is compared with transformers' own, draws with probabilities worked
out by hand.
"""

import numpy as np
import pytest
import torch

from data_contracts.errors import ContractError
from stages.models.policy import load_causal_lm, score_responses
from stages.models.turns import Turns
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.stage import SamplingConfig
from stages.sampling.transformers import Transformers, _draw

STOPS = [1, 4]


def sampler(model, batch_size: int = 32, stops=STOPS, **changes) -> Transformers:
    backend = {"name": "transformers", "dtype": "float32", "runtime": {"batch_size": batch_size}}
    config = SamplingConfig.model_validate({"backend": backend, "max_new_tokens": 12} | changes)
    return Transformers(config.backend, config, str(model), stops, "cpu")


@pytest.fixture(scope="module")
def prompts(tiny_model, make_rows) -> list[Prompt]:
    turns = Turns(tiny_model)
    rows = make_rows(7)
    rows[3]["messages"][0]["content"] *= 3  # lengths differ, or there is no padding to get wrong
    return [
        Prompt(row["prompt_id"], turns.prompt(row["messages"]), candidate_seeds(0, row["prompt_id"], 4)) for row in rows
    ]


@pytest.fixture(scope="module")
def candidates(tiny_model, prompts):
    return sampler(tiny_model).generate(prompts)


def test_a_candidate_does_not_depend_on_the_batch_it_is_decoded_in(tiny_model, prompts, candidates):
    for batch_size in (1, 5):
        for one, other in zip(sampler(tiny_model, batch_size).generate(prompts), candidates, strict=True):
            assert [candidate.token_ids for candidate in one] == [candidate.token_ids for candidate in other]
            for left, right in zip(one, other, strict=True):
                assert np.allclose(left.token_logps, right.token_logps, atol=1e-5)
    backwards = sampler(tiny_model).generate(prompts[::-1])[::-1]
    assert [[candidate.token_ids for candidate in group] for group in backwards] == [
        [candidate.token_ids for candidate in group] for group in candidates
    ]


def test_log_probs_are_the_models_own_before_temperature_and_top_p(tiny_model, prompts):
    for changes in ({}, {"temperature": 0.5, "top_p": 0.8}, {"temperature": 0.0}):
        groups = sampler(tiny_model, **changes).generate(prompts)
        flat = [(prompt.ids, candidate) for prompt, group in zip(prompts, groups, strict=True) for candidate in group]
        scored = score_responses(
            load_causal_lm(str(tiny_model), "float32", "cpu"),
            [ids for ids, _ in flat],
            [candidate.token_ids for _, candidate in flat],
            4096,
        )
        for (_, candidate), logps in zip(flat, scored, strict=True):
            assert np.abs(np.array(candidate.token_logps) - logps).max() < 1e-4


def test_a_candidate_ends_at_the_first_stop_id_or_is_cut(candidates):
    flat = [candidate for group in candidates for candidate in group]
    assert {candidate.finish_reason for candidate in flat} == {"stop", "length"}
    for candidate in flat:
        stops = [position for position, token in enumerate(candidate.token_ids) if token in STOPS]
        if candidate.finish_reason == "stop":
            assert stops == [len(candidate.token_ids) - 1]
        else:
            assert stops == [] and len(candidate.token_ids) == 12
        assert len(candidate.token_logps) == len(candidate.token_ids)


def test_temperature_0_is_what_transformers_itself_decodes(tiny_model, prompts):
    model = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    for prompt, group in zip(prompts, sampler(tiny_model, temperature=0.0, stops=[1]).generate(prompts), strict=True):
        ids = torch.tensor([prompt.ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1, use_cache=True
        )
        assert {tuple(candidate.token_ids) for candidate in group} == {tuple(expected[0, len(prompt.ids) :].tolist())}


def counts(temperature: float, top_p: float, top_k: int, number: int = 4000) -> np.ndarray:
    """How often each of four tokens of probability 0.1, 0.2, 0.3, 0.4 is drawn, as a share."""
    logps = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(number, 1)
    drawn = _draw(logps, [np.random.default_rng(seed) for seed in range(number)], temperature, top_p, top_k)
    return np.bincount(drawn, minlength=4) / number


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "expected"),
    [
        (1.0, 1.0, 0, [0.1, 0.2, 0.3, 0.4]),
        (0.5, 1.0, 0, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # squares
        (1.0, 0.7, 0, [0, 0, 3 / 7, 4 / 7]),  # 0.4 + 0.3 reach 0.7
        (1.0, 0.75, 0, [0, 2 / 9, 3 / 9, 4 / 9]),
        (1.0, 0.01, 0, [0, 0, 0, 1]),  # the likeliest is always kept
        (0.0, 1.0, 0, [0, 0, 0, 1]),
        (0.5, 1.0, 2, [0, 0, 9 / 25, 16 / 25]),
        (1.0, 0.75, 3, [0, 0, 3 / 7, 4 / 7]),  # of the three, 0.4 and 0.3 are 7 / 9
        (1.0, 1.0, 9, [0.1, 0.2, 0.3, 0.4]),  # more than there are
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_p, top_k, expected):
    shares = counts(temperature, top_p, top_k)
    # Four standard deviations of a share of 4000 draws.
    assert np.abs(shares - expected).max() < 4 * 0.5 / 4000**0.5
    assert (shares[np.array(expected) == 0] == 0).all()


def test_a_draw_at_the_very_end_of_the_mass_is_still_a_token_of_the_nucleus():
    class Edge:
        def random(self):
            return np.nextafter(1.0, 0.0)

    logps = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert _draw(logps, [Edge()], 1.0, 0.5) == [1]
    assert _draw(logps, [Edge()], 1.0, 1.0) == [3]


def test_a_model_that_diverged_is_said_to_be(tiny_model, prompts):
    broken = sampler(tiny_model)
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ContractError, match="NaN or infinite: its weights are damaged"):
        broken.generate(prompts[:1])


def test_the_padding_of_an_embedding_is_never_sampled(padded_model, prompts):
    turns = Turns(padded_model)
    assert turns.blank_ids == list(range(320, 384))
    drawn = sampler(padded_model)
    free = {token for group in drawn.generate(prompts[:3]) for candidate in group for token in candidate.token_ids}
    assert max(free) >= 320  # what the mask is for
    drawn.blank_ids = turns.blank_ids
    masked = [candidate for group in drawn.generate(prompts[:3]) for candidate in group]
    assert max(token for candidate in masked for token in candidate.token_ids) < 320
    assert max(logp for candidate in masked for logp in candidate.token_logps) < -1  # the model's own, before the mask
