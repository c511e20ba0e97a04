"""What the tests share: a model that fits in a thimble, an empty store, artifacts in it, and the files beside the project.

The model is made here, so no test needs a download: two random Llama layers with tied embeddings and a byte-level BPE trained on five
sentences. It is a real Hugging Face directory, and every engine (transformers, vLLM, DeepSpeed) loads it.
"""

import os

# Before torch or Prefect is imported, here and in every process a test starts.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("SELFPLAY_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
    os.environ.pop(_name, None)

import fcntl
import http.server
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from data_contracts.artifact import ArtifactRecord
from data_contracts.identity import canonical_json, digest_text, fingerprint
from data_contracts.prompts import prompt_row
from data_contracts.shards import shard_path, to_table, write_shard
from data_contracts.store import Store
from stages.running.history import events

# The same examples every time, and as long as a busy machine takes.
settings.register_profile("ours", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

# The fake judges are asked by many threads at once; the default backlog of 5 resets a connection now and then on a busy machine.
http.server.ThreadingHTTPServer.request_queue_size = 128

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 320
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep in the warm sun.",
    "She sells sea shells by the sea shore, and the shells that she sells are sea shells for sure.",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood? As much as he could.",
    "Peter Piper picked a peck of pickled peppers; where is the peck that Peter Piper picked?",
    "Write one short sentence about the weather, then list three things that people do in the rain.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture
def store(tmp_path) -> Store:
    """An empty store; nothing of it is on disk yet."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The files beside the project (SELFPLAY_SHARED, or ../shared). The project runs without them, so a test may not need them."""
    path = Path(os.environ.get("SELFPLAY_SHARED") or ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"{path} is not there: set SELFPLAY_SHARED to the directory of shared test data")
    return path


def build_model(directory: Path, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """A complete model directory. Weights wider than usual, or every token would be about as likely as every other."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # TokenizersBackend: beside a known architecture, transformers 5 would load that family's tokenizer class and change the ids.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1.7  # some responses end by themselves, others are cut
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Never write into it: all tests share it. Copy it first."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_model():
    return build_model


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """made_once(name, make) -> what make(directory) returns, made by the first pytest worker that asks.

    The other workers wait for it and read the value and the directory: never write into what lies there.
    """
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def value_of(name: str, make: Callable[[Path], Any]) -> Any:
        directory, saved = common / name, common / f"{name}.pickle"
        with open(common / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not saved.is_file():
                directory.mkdir()
                value = make(directory)
                saved.write_bytes(pickle.dumps(value))
        return pickle.loads(saved.read_bytes())

    return value_of


def prompt_rows(count: int, first: int = 0) -> list[dict]:
    """Rows of `prompts`, each about a number of its own, short enough for the tiny model."""
    things = ("a fox", "the sea", "some wood", "pickled peppers", "the rain", "lazy dogs", "the sun")
    return [
        prompt_row(
            [{"role": "user", "content": f"Say {number} words about {things[number % len(things)]}."}],
            prompt_id=f"p{number:03d}",
            checks=[{"name": "max_words", "value": 6}],
            response=f"{things[number % len(things)]} is number {number}.",
            source="test",
        )
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="session")
def make_rows():
    return prompt_rows


@pytest.fixture(scope="session")
def make_prompts():
    """make_prompts(store, rows or a count) -> ArtifactRef: a `prompts` artifact, signed."""

    def make(store: Store, rows=4):
        return _publish(store, "prompts", prompt_rows(rows) if isinstance(rows, int) else rows)

    return make


@pytest.fixture(scope="session")
def make_artifact():
    """make_artifact(store, kind, rows) -> ArtifactRef: any artifact of rows, signed, in one shard."""
    return _publish


def _publish(store: Store, kind: str, rows: list[dict]):
    digest = digest_text(canonical_json(json.loads(json.dumps(rows, default=float))))
    key = fingerprint("test", "1", {"rows": digest}, {})
    write_shard(shard_path(store.directory(kind, key), 0), to_table(rows, kind))
    record = ArtifactRecord(
        kind=kind,
        key=key,
        stage="test",
        version="1",
        config={"rows": digest},
        inputs={},
        content="",
        files=[],
        rows=len(rows),
    )
    return store.sign(record).ref(str(store.directory(kind, key)))


@pytest.fixture
def outside_package(tmp_path, monkeypatch):
    """outside_package(name, source, {group: {name: target}}) -> directory: a module of another package and its entry points, for this
    process and those it starts."""

    def make(name: str, source: str, groups: dict[str, dict[str, str]]) -> Path:
        directory = tmp_path / name
        metadata = directory / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (directory / f"{name}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            f"[{group}]\n" + "".join(f"{key} = {target}\n" for key, target in points.items())
            for group, points in groups.items()
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(directory))
        monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)
        return directory

    yield make
    for module in [
        name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[module]


@pytest.fixture(scope="session")
def run_stage_command(tmp_path_factory):
    """run_stage_command(stage, config, inputs, store, **environment) -> CompletedProcess of `python -m stages STAGE SPEC.json`."""

    def run(stage: str, config: dict, inputs: dict, store: Store, **environment: str) -> subprocess.CompletedProcess:
        spec = tmp_path_factory.mktemp("spec") / "spec.json"
        inputs = {name: ref.model_dump() if hasattr(ref, "model_dump") else str(ref) for name, ref in inputs.items()}
        spec.write_text(json.dumps({"config": config, "inputs": inputs, "store": str(store.root)}))
        command = [sys.executable, "-m", "stages", stage, str(spec)]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def tries_of(directory: Path, name: str) -> list[list[int]]:
    """For each try at an artifact, the indices of its events of a name: shards written, steps done."""
    tries: list[list[int]] = []
    for event in events(directory):
        if event["event"] == "start":
            tries.append([])
        elif event["event"] == name:
            tries[-1].append(event["index"])
    return tries


def pretend_slurm(home: Path) -> Path:
    """Slurm's commands as scripts in a new directory, to put on PATH; what was asked lies there afterwards, job by job."""
    home.mkdir()
    stub = Path(__file__).with_name("assets").joinpath("slurm_stub.py").read_text()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        (home / name).write_text(f"#!{sys.executable}\n{stub}")
        (home / name).chmod(0o755)
    return home
