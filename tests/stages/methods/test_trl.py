"""Agreement with TRL on the losses that both have: loss and parameter gradients of a tiny model, each side with its own forward.

TRL is a development extra; without it these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is a development extra")
pytestmark = pytest.mark.filterwarnings("ignore")

from datasets import Dataset

from stages.methods import METHODS
from stages.methods.base import Pairs, Responses
from stages.models.policy import collate, response_logps
from tests.stages.methods.models import tiny_llama

PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 8, 6]]
CHOSEN = [[11, 12, 13, 2], [21, 2], [14, 15, 16, 17, 18, 2]]
REJECTED = [[10, 2], [22, 23, 24, 2], [19, 20, 2]]
GOLD = [[11, 30, 2], [21, 25, 26, 2], [14, 2]]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(32)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(
        models.WordLevel(
            {word: number for word, number in words.items() if number > 2 or word[0] == "<"}, unk_token="w31"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w31"
    )


@pytest.fixture
def models():
    """Policy and reference, float32 as TRL runs them."""
    return tiny_llama(0, dtype=torch.float32), tiny_llama(1, dtype=torch.float32)


def settings(tmp_path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        **more,
    }


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict(
        {
            name: [" ".join(f"w{i}" for i in ids if i > 2) for ids in column] if isinstance(column[0], list) else column
            for name, column in columns.items()
        }
    )


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def responses(model: Any, reference: Any, prompts: list[list[int]], answers: list[list[int]]) -> Responses:
    batch = collate(prompts, answers)
    with torch.no_grad():
        constants = response_logps(reference, batch)
    logps = response_logps(model, batch)
    return Responses(logps, constants, torch.ones_like(constants), batch.response_mask)


def ours(
    name: str, config: dict[str, Any], model: Any, reference: Any, labels: list[float] | None = None
) -> torch.Tensor:
    method = METHODS.get(name)
    config = method.Config(**config)
    if labels is None:
        sides = [responses(model, reference, PROMPTS, answers) for answers in (CHOSEN, REJECTED)]
        pairs = Pairs(
            *sides,
            torch.ones(3),
            torch.zeros(3),
            gold=responses(model, reference, PROMPTS, GOLD) if name == "tpo" else None,
        )
    else:
        rotated = [CHOSEN[-1], *CHOSEN[:-1]]
        single = responses(model, reference, PROMPTS, CHOSEN)
        pairs = Pairs(
            single, None, torch.tensor(labels), None, mismatched=responses(model, reference, PROMPTS, rotated)
        )
        step = {key: value.mean().detach() for key, value in method.step_values(config, pairs).items()}
        pairs = pairs._replace(step_means=step)
    return method.pair_loss(config, pairs).share(3, float(method.token_count(config, pairs).sum()))


def assert_agree(mine: torch.Tensor, theirs: torch.Tensor, model: Any) -> None:
    """To 1e-6 of the loss, and of the largest gradient entry."""
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    a, b = gradient(mine, model), gradient(theirs, model)
    assert float((a - b).abs().max()) <= 1e-6 * max(1.0, float(b.abs().max()))


DPO_LOSSES = [
    ("sigmoid", 0.0, "dpo", {}),
    ("hinge", 0.0, "spin", {"loss": "hinge"}),
    ("ipo", 0.0, "ipo", {"average": True}),
    ("robust", 0.2, "dpo", {"label_smoothing": 0.2, "robust": True}),
    ("sppo_hard", 0.0, "sppo", {"target": "hard"}),
    ("sigmoid_norm", 0.0, "spin_lengthnorm", {}),
]


@pytest.mark.parametrize(("loss_type", "smoothing", "name", "config"), DPO_LOSSES, ids=[case[0] for case in DPO_LOSSES])
def test_dpo_trainer(tmp_path, tokenizer, models, loss_type, smoothing, name, config):
    from trl import DPOConfig, DPOTrainer

    model, reference = models
    beta = 0.5
    args = DPOConfig(**settings(tmp_path, loss_type=[loss_type], beta=beta, label_smoothing=smoothing))
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=rows(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(
        [
            {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
            for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
        ]
    )
    theirs = trainer.compute_loss(trainer.model, inputs)
    strength = {"ipo": {"tau": beta}, "sppo": {"eta": 1 / beta}}.get(name, {"beta": beta})
    assert_agree(ours(name, config | strength, trainer.model, reference), theirs, trainer.model)


@pytest.mark.parametrize(("labels", "drifted"), [([True, False, True], False), ([False, False, True], True)])
def test_kto_trainer(tmp_path, tokenizer, models, labels, drifted):
    from trl import KTOConfig, KTOTrainer

    # One way round the mismatched log-ratio is negative and z0 is 0, the other way round it counts.
    model, reference = reversed(models) if drifted else models
    args = KTOConfig(
        **settings(tmp_path, beta=0.5, desirable_weight=1.25, undesirable_weight=0.75, per_device_train_batch_size=3)
    )
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=rows(prompt=PROMPTS, completion=CHOSEN, label=labels),
        processing_class=tokenizer,
    )
    rotated = [CHOSEN[-1], *CHOSEN[:-1]]
    inputs = trainer.data_collator(
        [
            {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": k, "label": label}
            for p, c, k, label in zip(PROMPTS, CHOSEN, rotated, labels, strict=True)
        ],
    )
    theirs = trainer.compute_loss(trainer.model, inputs)
    drift = responses(trainer.model, reference, PROMPTS, rotated).log_ratio().sum(-1).mean()
    assert (drift > 0.05) == drifted
    mine = ours(
        "kto", {"beta": 0.5, "lam_d": 1.25, "lam_u": 0.75}, trainer.model, reference, [float(label) for label in labels]
    )
    assert_agree(mine, theirs, trainer.model)


CPO_LOSSES = [
    ("sigmoid", 1.0, "cpo", {"beta": 0.5, "lam": 1.0}),
    ("simpo", 0.0, "simpo", {"beta": 0.5, "gamma": 0.3}),
]


@pytest.mark.parametrize(("loss_type", "alpha", "name", "config"), CPO_LOSSES, ids=[case[0] for case in CPO_LOSSES])
def test_cpo_trainer(tmp_path, tokenizer, models, loss_type, alpha, name, config):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, reference = models
    args = CPOConfig(
        **settings(tmp_path, max_length=64, loss_type=loss_type, beta=0.5, cpo_alpha=alpha, simpo_gamma=0.3)
    )
    trainer = CPOTrainer(
        model=model,
        args=args,
        train_dataset=rows(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED),
        processing_class=tokenizer,
    )
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, concatenated())
    assert_agree(ours(name, config, trainer.model, reference), theirs, trainer.model)


def test_orpo_trainers_odds_term(tmp_path, tokenizer, models):
    """Its likelihood covers the prompt as well, ours the response: only the odds-ratio term is compared."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, reference = models
    args = ORPOConfig(**settings(tmp_path, max_length=64, beta=0.3))
    trainer = ORPOTrainer(
        model=model,
        args=args,
        train_dataset=rows(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED),
        processing_class=tokenizer,
    )
    chosen, rejected = trainer.concatenated_forward(trainer.model, concatenated())[:2]
    theirs = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    method = METHODS.get("orpo")
    sides = [responses(trainer.model, reference, PROMPTS, answers) for answers in (CHOSEN, REJECTED)]
    mine = method.pair_loss(method.Config(lam=0.3), Pairs(*sides, torch.ones(3), torch.zeros(3))).loss.mean()
    assert_agree(mine, theirs, trainer.model)


def concatenated() -> dict[str, torch.Tensor]:
    """A batch in the layout of TRL's older trainers, right-padded."""
    batch = {}
    for side, answers in (("chosen", CHOSEN), ("rejected", REJECTED)):
        width = max(len(p) + len(a) for p, a in zip(PROMPTS, answers, strict=True))
        full = [p + a + [0] * (width - len(p) - len(a)) for p, a in zip(PROMPTS, answers, strict=True)]
        mask = [
            [1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in zip(PROMPTS, answers, strict=True)
        ]
        labels = [
            [-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in zip(PROMPTS, answers, strict=True)
        ]
        batch |= {
            f"{side}_input_ids": torch.tensor(full),
            f"{side}_attention_mask": torch.tensor(mask),
            f"{side}_labels": torch.tensor(labels),
        }
    return batch


@pytest.mark.parametrize(
    ("loss_type", "config"),
    [("sigmoid", {}), ("tpo-l", {"length_normalised": True, "gamma": 0.4})],
    ids=["sigmoid", "tpo-l"],
)
def test_tpo_trainer(tmp_path, tokenizer, models, loss_type, config):
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    model, reference = models
    args = TPOConfig(**settings(tmp_path, loss_type=loss_type, beta=0.5, tpo_alpha=0.7, tpo_l_gamma=0.4))
    data = rows(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED, reference=GOLD)
    trainer = TPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = trainer.data_collator(
        [
            {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "reference_ids": g}
            for p, c, r, g in zip(PROMPTS, CHOSEN, REJECTED, GOLD, strict=True)
        ],
    )
    theirs = trainer.compute_loss(trainer.model, inputs)
    assert_agree(ours("tpo", {"beta": 0.5, "alpha": 0.7} | config, trainer.model, reference), theirs, trainer.model)
