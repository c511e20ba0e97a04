"""python -m stages NAME SPEC.json: build one artifact. `python -m stages methods`: what can be trained.

SPEC.json: {"config": {...}, "inputs": {"prompts": "<key or path>", ...}, "store": "store"}. An input is a key in the
store (or the start of one) or a model directory. Exit codes: 0 built (or already there), 2 the request is wrong, 3-5
see data_contracts/errors.py.
"""

from __future__ import annotations

import os


def set_defaults() -> None:
    """Set the variables that a stage needs in its environment, unless the user has set them."""
    defaults = {
        # Read when the OpenMP runtime loads, so before anything imports torch: threads that spin while they wait make
        # each other slow as soon as the machine has other work (measured: vLLM 65 against 450 tokens/s beside one busy
        # process on 2 cores).
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRITON_PRINT_AUTOTUNING": "0",
        # To ask whether there is a GPU must not initialise CUDA: a process that did cannot fork vLLM's engine any more.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # CUDA_VISIBLE_DEVICES then counts GPUs as nvidia-smi and the pipeline's locks do, not by their speed.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if os.path.exists("/dev/nvidiactl"):
        # Packed batches have another shape at each step: segments that grow lose less to fragments.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


set_defaults()

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import check_model_directory, digests_kept_in, external_model
from data_contracts.config import parse
from data_contracts.errors import ConfigError, PipelineError, print_error
from data_contracts.files import disk_errors_explained
from data_contracts.redaction import redact_output
from data_contracts.store import Store
from stages.execute import LOCK_HELD, execute, execute_share
from stages.running.claims import WORKER
from stages.running.cost import before_fork, process_start
from stages.running.loopback import bypass_proxies_on_loopback
from stages.running.rendezvous import node_rank
from stages.stage import STAGES

if TYPE_CHECKING:
    from stages.methods.base import Method


def main(arguments: list[str]) -> int:
    redact_output()
    bypass_proxies_on_loopback()
    if arguments == ["methods"]:
        return print_methods()
    if len(arguments) != 2 or arguments[0] not in STAGES:
        print(
            f"usage: python -m stages {{{'|'.join(STAGES)}}} SPEC.json\n       python -m stages methods",
            file=sys.stderr,
        )
        return 2
    try:
        spec = _read(Path(arguments[1]))
        store = Store(spec.get("store"))
        stage = STAGES[arguments[0]]
        config = stage.parse(spec["config"])
        inputs = {name: _input(value, store) for name, value in spec["inputs"].items()}
        with disk_errors_explained(store.root), digests_kept_in(store):
            if WORKER in os.environ:
                execute_share(stage, config, inputs, store, os.environ[WORKER])
                return 0
            runtime = getattr(config, "runtime", None)
            if getattr(runtime, "num_nodes", 1) > 1 and (node := node_rank()):
                stage.load().take_part(config, store.directory(stage.produces, stage.key(config, inputs)), node)
                return 0
            record = execute(stage, config, inputs, store, launched=_launched())
    except PipelineError as error:
        print(f"@error {json.dumps({'type': type(error).__name__, 'message': str(error)})}", flush=True)
        return print_error(error)
    if LOCK_HELD not in os.environ:
        print(store.directory(record.kind, record.key))
    return 0


def _launched() -> float:
    """When this process was asked for, in seconds since the epoch: when the kernel started it, unless it is a fork."""
    if before_fork.launched is not None:
        return before_fork.launched
    return process_start()


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    named = isinstance(spec, dict) and {"config", "inputs"} <= spec.keys() <= {"config", "inputs", "store"}
    if not named or not isinstance(spec["inputs"], dict) or not isinstance(spec.get("store", ""), str):
        raise ConfigError(f'{path} must hold {{"config": ..., "inputs": ..., "store": ...}}')
    return spec


def _input(value: Any, store: Store) -> ArtifactRef:
    if isinstance(value, dict):
        return parse(ArtifactRef, value, "an input")
    if not isinstance(value, str):
        raise ConfigError(f"an input must be a key in the store, a model directory or a reference, got {value!r:.80}")
    if Path(value).is_dir():
        check_model_directory(value, chat_template=False)
        return external_model(Path(value), store.root / "digests")
    record = store.resolve(value)
    return record.ref(str(store.directory(record.kind, record.key)))


def print_methods() -> int:
    """Print each method with its equation and its needs. A broken plug-in costs its own line, never the list."""
    from stages.methods import METHODS

    for name in METHODS.names():
        try:
            lines = _described(METHODS.get(name))
        except Exception as error:  # code of another package may fail in any way
            lines = [f"cannot be used: {error}"]
        print("\n".join([f"{name:16} {lines[0]}", *(f"{'':16} {line}" for line in lines[1:])]))
    return 0


def _described(method: type[Method]) -> list[str]:
    """The idea of a method, its source, and what it needs at the default settings; one line each."""
    from stages.weighting.weights import WEIGHTS

    doc = vars(method).get("__doc__") or sys.modules[method.__module__].__doc__ or ""
    idea = doc.strip().partition("\n")[0].removeprefix("Method - ")
    models = WEIGHTS.get(method.WEIGHTS or "ones").NEEDS - {"reference", "importance"}
    if "teacher_logits" in method.NEEDS:
        models |= {"teacher"}
    needs = [_pairings(method), *sorted(model.removesuffix("_unshifted") + " model" for model in models)]
    if method.NEEDS & {"kl_policy_reference", "kl_reference_policy", "anchor", "mismatched"}:
        needs.append("the reference in memory while training")
    return [line for line in (idea, method.SOURCE, f"needs {'; '.join(needs)}") if line]


def _pairings(method: type[Method]) -> str:
    """What the rows of a method can be made of, and the pairings that make them; its default pairing first."""
    from stages.scoring.pairing import PAIRINGS

    is_single = method.SIDES == ("chosen",)
    groups = {PAIRINGS.get(method.PAIRING).made_of: [method.PAIRING]}
    for name in PAIRINGS.names():
        if name != method.PAIRING and PAIRINGS.get(name).is_single == is_single:
            groups.setdefault(PAIRINGS.get(name).made_of, []).append(name)
    return ", or ".join(f"{source} (pairing {', '.join(names)})" for source, names in groups.items())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk and signed. Taking engines apart politely costs up to 4 s a stage and can still change the
    # exit code.
    os._exit(code)
