"""The parts of benchmarks.gpu_check: each drives a stage's own code on random models, and returns its figures by name."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks._gpu_models import kind_of, model_directory, model_flops, random_text, shape_of_kind, texts
from stages.running.gpus import peak_flops

GIB = 2**30
Figures = dict[str, Any]


class Check(NamedTuple):
    """Where a part works, and on what."""

    work: Path
    smoke: bool
    device: str

    def model(self, name: str) -> str:
        return model_directory(self.work, name, self.smoke, self.device)

    def result(self, part: str) -> Figures:
        """What an earlier part found; {} if it failed or was left out."""
        path = self.work / f"{part}.json"
        return json.loads(path.read_text()) if path.is_file() else {}


# -- the machine


def machine(check: Check) -> Figures:
    """Versions, the card, and its ceilings for copies and matrix products."""
    import torch

    figures: Figures = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in ("transformers", "deepspeed", "vllm"):
        try:
            figures[name] = version(name)
        except PackageNotFoundError:
            figures[name] = "absent"
    if check.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        figures |= {"card": card.name, "memory_gib": round(card.total_memory / GIB, 1), "cuda": torch.version.cuda}
        figures["cards"] = torch.cuda.device_count()
    side = 256 if check.smoke else 8192
    left, right = (torch.randn(side, side, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    figures["product_tflops"] = 2 * side**3 / _seconds(check, lambda: left @ right) / 1e12
    block = torch.zeros(side * side * 4, device=check.device)
    target = torch.empty_like(block)
    figures["copy_tb_per_second"] = 8 * block.numel() / _seconds(check, lambda: target.copy_(block)) / 1e12
    peak = peak_flops(str(figures.get("card")))
    figures["peak_tflops"] = figures["product_tflops"] if peak is None else peak / 1e12
    return figures


def _seconds(check: Check, call: Callable[[], object], repeats: int = 10) -> float:
    """Mean seconds of a call, the device's work included, after two for the warm-up."""
    call(), call()
    _wait(check)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(check)
    return (time.perf_counter() - began) / repeats


def _wait(check: Check) -> None:
    import torch

    if check.device == "cuda":
        torch.cuda.synchronize()


def _peak_gib(check: Check) -> float:
    """Most memory that this process held: the allocator's on a GPU, the resident set else."""
    import torch

    if check.device == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _release(check: Check) -> None:
    """Give memory back and count its peak anew."""
    import torch

    from stages.models.memory import free_device_memory

    free_device_memory()
    if check.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _mfu(check: Check, flops: float, seconds: float) -> Figures:
    """Achieved TFLOP/s, and their share of the card's peak."""
    rate = flops / seconds / 1e12
    peak = check.result("machine").get("peak_tflops")
    return {"tflops": rate} | ({"mfu": rate / peak} if peak else {})


# -- training


class Work(NamedTuple):
    """A training to be timed."""

    model: str
    steps: int
    batch: int
    prompt: int
    response: int
    """Tokens of each side."""
    batch_tokens: int
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    adapter: dict[str, Any] | None = None
    """Settings of `training.adapter`; activations are computed again then, as on a small card."""

    def tiny(self) -> Work:
        return self._replace(steps=2, prompt=12, response=10, batch_tokens=128, batch=min(self.batch, 2))

    @property
    def group(self) -> int:
        """Tokens of a pair, its prompt once."""
        return self.prompt + 2 * self.response


FULL = {
    "train_1.8b": Work("1.8b", 6, 16, 512, 768, 8192, "adamw"),
    "train_135m": Work("135m", 8, 64, 512, 768, 32_768, "adamw"),
    "train_swift": Work("1.8b", 24, 2, 100, 150, 8192),
    "train_lora": Work("1.8b", 6, 2, 1536, 512, 4096, adapter={"name": "lora", "rank": 16}),
}
"""Packed pairs of 2,048 tokens; SWIFT's setting, two pairs a step; and the preset swift-qwen1.5-1.8b-1x24."""


def _request(check: Check, part: str) -> tuple[Work, dict[str, Any]]:
    """The training, and benchmarks.train's request for it."""
    work = FULL[part].tiny() if check.smoke else FULL[part]
    chance, vocabulary = random.Random(0), kind_of(work.model, check.smoke).size["vocab_size"]

    def ids(count: int) -> list[int]:
        return [chance.randrange(2, vocabulary) for _ in range(count)]

    pairs = [
        {"prompt_ids": ids(work.prompt), "chosen_ids": ids(work.response), "rejected_ids": ids(work.response)}
        for _ in range(work.batch * (work.steps + 1))
    ]
    directory = check.work / part
    directory.mkdir(exist_ok=True)
    request = {"model": check.model(work.model), "directory": str(directory), "pairs": pairs, "batch": work.batch}
    request |= {"batch_tokens": work.batch_tokens, "dtype": "bfloat16", "threads": None, "micro": 4}
    request |= {"adapter": work.adapter, "runtime": {"gradient_checkpointing": work.adapter is not None}}
    return work, request | {"device": check.device, "optimizer": work.optimizer, "trl_dtype": "weights"}


def training(part: str) -> Callable[[Check], Figures]:
    """The part that times the weigh stage's reference pass and the train stage's loop."""

    def measure(check: Check) -> Figures:
        from benchmarks.train import ours, reference

        work, request = _request(check, part)
        passed = reference(request)
        _release(check)
        trained = ours(request)
        pairs_per_second = trained["pairs"] / trained["seconds"]
        lengths = [work.prompt + work.response] * (2 * work.batch)
        shape = shape_of_kind(kind_of(work.model, check.smoke))
        flops = model_flops(shape, work.batch * work.group, 2 * work.batch * work.response, lengths, 3)
        figures = {"pairs_per_second": pairs_per_second, "tokens_per_second": pairs_per_second * work.group}
        figures |= _mfu(check, flops, work.batch / pairs_per_second)
        figures["reference_tokens_per_second"] = passed["pairs"] * work.group / passed["seconds"]
        return figures | _memory_of_training(check, work) | {"losses": trained["losses"]}

    return measure


def _memory_of_training(check: Check, work: Work) -> Figures:
    """Peak memory, and what `selfplay plan` says of this training."""
    from flows.forecast.memory import rows_of, training_memory, with_slack
    from stages.training.config import TrainingConfig

    config = TrainingConfig.model_validate(
        {
            "optimizer": work.optimizer,
            "adapter": work.adapter,
            "runtime": {"gradient_checkpointing": work.adapter is not None},
        }
    )
    rows = rows_of(work.batch_tokens, work.prompt, work.response, 2)
    planned, _ = training_memory(shape_of_kind(kind_of(work.model, check.smoke)), config, rows, 1, 1)
    return {"peak_gib": _peak_gib(check), "planned_gib": with_slack(planned) / GIB}


def trl(check: Check) -> Figures:
    """TRL's DPOTrainer on the pairs of train_1.8b, with its fastest settings; and our training beside it."""
    from benchmarks.train import trl as train_with_trl

    _, request = _request(check, "train_1.8b")
    result = train_with_trl(request, precompute=False)
    rate = result["pairs"] / result["seconds"]
    figures: Figures = {"pairs_per_second": rate, "peak_gib": _peak_gib(check)}
    if ours := check.result("train_1.8b"):
        gaps = [abs(left - right) for left, right in zip(ours["losses"], result["losses"], strict=True)]
        figures["ours_speed"] = ours["pairs_per_second"] / rate
        figures |= {"ours_memory": ours["peak_gib"] / figures["peak_gib"], "largest_loss_difference": max(gaps)}
    return figures


# -- weights, scores, samples


def weights(check: Check) -> Figures:
    """The weigh stage with SWIFT's weights across two tokenizers: an iteration with an empty store, and the next one."""
    from data_contracts.shards import SCHEMAS
    from stages.models.turn_settings import TurnConfig
    from stages.models.turns import Turns
    from stages.running.cost import loading

    count, words = (4, 8) if check.smoke else (512, 100)
    student, teacher = check.model("1.8b"), check.model("7b")
    turns, chance = Turns(student, TurnConfig(template="plain")), random.Random(0)
    prompts = [turns.plain(random_text(chance, words))[:words] for _ in range(count)]
    sides = [[turns.response(random_text(chance, 2 * words))[-int(1.5 * words) :] for _ in range(count)] for _ in "012"]
    figures: Figures = {}
    for iteration in range(2):
        rows = []
        for number, prompt in enumerate(prompts):
            row = dict.fromkeys(SCHEMAS["scored_pairs"].names) | {"prompt_id": str(number), "scorer": "none"}
            row |= {"pair_id": f"{number}/{iteration}", "prompt_ids": prompt, "win_rate_chosen": 1.0}
            row |= {"win_rate_rejected": 0.0, "chosen_candidate": -1, "rejected_candidate": 0}
            row |= {"chosen_ids": sides[0][number], "rejected_ids": sides[1 + iteration][number]}
            rows.append(row | {side: turns.read(row[f"{side}_ids"]) for side in ("chosen", "rejected")})
        config = {
            "weights": {"name": "swift"},
            "template": "plain",
            "runtime": {
                "batch_tokens": 512 if check.smoke else 32_768,
                "pairs_per_shard": 1024,
                "device": check.device,
            },
        }
        models = {"policy": student, "reference": student, "teacher": teacher}
        loaded, began = loading.seconds, time.perf_counter()
        out = _run_stage(check, "weigh", config, {"pairs": rows}, models, f"{iteration}")
        seconds = time.perf_counter() - began - (loading.seconds - loaded)
        name = ("first", "second")[iteration]
        figures |= {
            f"{name}_pairs_per_second": count / seconds,
            f"{name}_hours_of_50000": 50_000 * seconds / count / 3600,
        }
        assert (out / "part-00000.parquet").is_file()
    tokens = sum(map(len, prompts)) + sum(len(ids) for side in sides[:2] for ids in side)
    figures |= {"student_tokens_per_pair": tokens / count, "peak_gib": _peak_gib(check)}
    return figures | _planned_pass("7b", check, config["runtime"]["batch_tokens"], words, int(1.5 * words))


def _planned_pass(name: str, check: Check, budget: int, prompt: int, response: int) -> Figures:
    from flows.forecast.memory import pass_memory, rows_of, with_slack

    rows = rows_of(budget, prompt, response, 1)
    return {"planned_gib": with_slack(pass_memory(shape_of_kind(kind_of(name, check.smoke)), "bfloat16", rows)) / GIB}


def _run_stage(
    check: Check,
    stage: str,
    config: dict[str, Any],
    rows: dict[str, Sequence[Any]],
    models: dict[str, str],
    name: str = "0",
) -> Path:
    """Run a stage on rows and model directories, outside of any store's records; returns its output directory."""
    from data_contracts.artifact import ArtifactRef
    from data_contracts.shards import shard_path, to_table, write_shard
    from stages.job import Job
    from stages.stage import STAGES

    kinds = {role.rstrip("?"): kind for role, kind in STAGES[stage].consumes.items()}
    inputs = {}
    for role, values in rows.items():
        directory = check.work / f"{stage}-{role}-{name}"
        write_shard(shard_path(directory, 0), to_table(values, kinds[role]))
        inputs[role] = ArtifactRef(kind=kinds[role], key=f"check-{name}", path=str(directory), content=f"{role}-{name}")
    for role, directory in models.items():
        # The policy of every iteration is another model: only the teacher's half of the work can be found again.
        content = f"{role}-{name}" if role == "policy" else f"{role}-{name if role == 'reference' else 'fixed'}"
        inputs[role] = ArtifactRef(kind="checkpoint", key="external", path=directory, content=content)
    out = check.work / "store" / STAGES[stage].produces / f"check-{name}"
    out.mkdir(parents=True)
    STAGES[stage].load().run(Job(STAGES[stage], STAGES[stage].parse(config), inputs, out))
    return out


def pairrm(check: Check) -> Figures:
    """PairRM's network at its released size: pairs per second in 16-bit batches, and one by one in float32."""
    from benchmarks.pairrm import checkpoints, native
    from benchmarks.pairrm import texts as random_cases

    size, prompts = ("tiny", 2) if check.smoke else ("large", 16)
    ranker = str(checkpoints().build(check.work / "pairrm", size)["ranker"])
    cases = random_cases(prompts, 3 if check.smoke else 5, 32 if check.smoke else 512)
    request = {"ranker": ranker, "cases": cases, "device": check.device}
    request["threads"] = 1 if check.smoke else os.cpu_count()
    single = native(request | {"dtype": "float32", "batch_tokens": 1})
    _release(check)
    pairs = sum(len(case["candidates"]) * (len(case["candidates"]) - 1) for case in cases)
    exact = [x for matrix in single["logits"] for row in matrix for x in row]
    figures: Figures = {"one_by_one_pairs_per_second": pairs / single["seconds"]}
    for dtype in ("float16", "bfloat16"):
        run = native(request | {"dtype": dtype, "batch_tokens": 512 if check.smoke else 32_768})
        logits = [x for matrix in run["logits"] for row in matrix for x in row]
        gaps = [abs(left - right) for left, right in zip(exact, logits, strict=True)]
        same_side = [(left > 0) == (right > 0) for left, right in zip(exact, logits, strict=True) if left]
        figures |= {
            f"{dtype}_pairs_per_second": pairs / run["seconds"],
            f"{dtype}_speed": single["seconds"] / run["seconds"],
            f"{dtype}_largest_logit_difference": max(gaps),
            f"{dtype}_same_winner": sum(same_side) / max(1, len(same_side)),
        }
    return figures | {"peak_gib": _peak_gib(check)}


def sample(check: Check) -> Figures:
    """The sample stage at SWIFT's lengths: tokens per second, without the start of the engine. vLLM; transformers in a
    smoke."""
    import pyarrow.compute as pc

    from data_contracts.prompts import prompt_row
    from data_contracts.shards import read_shards
    from stages.running.cost import loading

    count, tokens = (2, 4) if check.smoke else (4096, 150)
    quickstart = texts()
    prompts = [
        prompt_row([{"role": "user", "content": quickstart[number % len(quickstart)]}], prompt_id=str(number))
        for number in range(count)
    ]
    config = {
        "backend": {"name": "transformers" if check.smoke else "vllm"},
        "num_candidates": 1,
        "template": "plain",
        "max_prompt_tokens": 512,
        "max_new_tokens": tokens,
        "runtime": {"prompts_per_shard": 1024, "device": check.device},
    }
    loaded, began = loading.seconds, time.perf_counter()
    out = _run_stage(check, "sample", config, {"prompts": prompts}, {"policy": check.model("1.8b")})
    start = loading.seconds - loaded
    seconds = time.perf_counter() - began - start
    produced = pc.sum(pc.list_value_length(read_shards(out, "generations")["token_ids"])).as_py()
    figures = {"tokens_per_second": produced / seconds, "start_seconds": start}
    return figures | {"hours_of_50000": 50_000 * 150 * seconds / produced / 3600}


def tests(check: Check) -> Figures:
    """`pytest -m gpu`: how many tests pass. Raises: RuntimeError if one fails."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/stages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join(lines)[:500] or done.stdout[-300:] + done.stderr[-300:])
    return dict(counts)
