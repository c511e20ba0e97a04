"""ROUGE-L against the package rouge-score, on real dialogues."""

import json
from itertools import pairwise

import pytest

from data_contracts.errors import ConfigError
from data_contracts.prompts import prompt_row
from stages.scoring.base import Candidates, Services, open_scorer
from stages.scoring.rouge import RougeL, best_rouge_l, rouge_l


def test_by_hand():
    # lcs "the cat": precision 2/3, recall 2/4, F1 = 2 * (2/3) * (1/2) / (7/6) = 4/7
    assert rouge_l("the cat sat", "The cat, lay down!") == pytest.approx(4 / 7)
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("?!", "?!") == 0.0
    assert rouge_l("same words", "same words") == 1.0
    assert best_rouge_l("a b", ["c", "a b"]) == 1.0


def test_it_is_the_packages_number_on_dialogues(shared):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    with open(shared / "data" / "dialogsum" / "dialogsum.dev.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(150), strict=False)]
    pairs = [(row["dialogue"], row["summary"]) for row in rows] + [
        (a["summary"], b["summary"]) for a, b in pairwise(rows)
    ]
    for text, reference in pairs:
        assert rouge_l(text, reference) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure, abs=1e-12)


def test_as_a_scorer_it_compares_with_the_prompts_response():
    prompt = prompt_row([{"role": "user", "content": "Who sat?"}], prompt_id="a", response="The cat, lay down!")
    scorer = open_scorer(RougeL.Config(), "cpu", Services())
    texts = Candidates.of_texts("Who sat?", ["the cat sat", "dogs", ""])
    (scores,) = scorer.score([texts._replace(prompt=prompt)])
    assert scores.scores.tolist() == pytest.approx([4 / 7, 0.0, 0.0])
    without = prompt_row([{"role": "user", "content": "Who?"}], prompt_id="b")
    RougeL.check_prompts(scorer.config, [prompt])
    with pytest.raises(ConfigError, match=r"1 of 2 prompts have none \(b\): give prompts that have one"):
        RougeL.check_prompts(scorer.config, [prompt, without])
