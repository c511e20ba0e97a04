"""What leaves a run: a directory that transformers, peft and datasets load, or one commit to a stand-in of the hub."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data_contracts.adapter import ADAPTER
from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError
from data_contracts.ledger import FILE
from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.cli.commands import main
from flows.cli.export import Licences, Options, model_files, write
from flows.cli.finished import read_run
from flows.config import load_run

OPTIONS = Options(None, None, False, False, None, Licences(None, None), None)


def front(directory: Path) -> tuple[dict, str]:
    """The YAML head of a card, and its text."""
    head, text = re.fullmatch(r"---\n(.*?)---\n(.*)", (directory / "README.md").read_text(), re.DOTALL).groups()
    return yaml.safe_load(head), text


@pytest.fixture(scope="module")
def exported(undisturbed, tmp_path_factory) -> Path:
    """The final model of the undisturbed run, written under a narrow umask."""
    out = tmp_path_factory.mktemp("exports") / "model"
    before = os.umask(0o027)
    try:
        licences = ["--policy-license", "apache-2.0", "--data-license", "mit"]
        assert main(["export", "tiny", "--store", str(undisturbed.store), "--to", str(out), *licences]) == 0
    finally:
        os.umask(before)
    return out


def test_the_directory_holds_a_whole_model_of_the_umasks_modes_and_nothing_of_the_store(exported, undisturbed):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "README.md", "selfplay.yaml", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o640}
    assert not list(exported.parent.glob(".*"))
    checkpoint = undisturbed.store / "runs/tiny/iter_02/train"
    assert (exported / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert not (exported / "model.safetensors").samefile(checkpoint / "model.safetensors")


def test_plain_transformers_loads_it_and_samples_as_the_run_did(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 1.0, 0)
    assert settings.eos_token_id == [1] and settings.max_new_tokens is None
    code = front(exported)[1].split("```python\n")[1].split("```")[0].replace("DIRECTORY OR OWNER/NAME", str(exported))
    exec(compile(code, "the card's example", "exec"), {})
    messages = [{"role": "user", "content": "Say a word."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Say a word.<|end|><|assistant|>"


def test_its_card_says_what_was_done_measured_and_paid_and_no_path_of_this_machine(exported, undisturbed):
    head, text = front(exported)
    assert head["license"] == "apache-2.0" and head["tags"] == ["self-play", "sppo"] and "base_model" not in head
    assert "loss = sum over the kept responses of (LR(y) - eta (p - 1/2))^2" in text and "Wu et al. 2024" in text
    digest = hashlib.sha256(Path(load_run(undisturbed.config).prompts.train_source.path).read_bytes()).hexdigest()
    assert f"| training prompts | train.jsonl | {digest} |" in text
    gain = re.search(r"gain ([+-][\d.]+ \[[^]]+\])", undisturbed.first.out)[1]
    assert f"against the start model: {gain}" in text
    assert re.search(r"at equal length: [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", text)
    assert "| stage | seconds |" in text and "| train |" in text
    assert "- start model: apache-2.0\n- data: mit\n" in text
    settings = (exported / "selfplay.yaml").read_text()
    for machines_own in (str(undisturbed.store), str(undisturbed.config.parent), "/tmp"):
        assert machines_own not in text + settings


def test_its_settings_are_those_of_the_run_once_the_files_lie_beside_them(exported, undisturbed, tmp_path):
    run = load_run(undisturbed.config)
    path = shutil.copy(exported / "selfplay.yaml", tmp_path)
    shutil.copytree(run.policy.path, tmp_path / Path(run.policy.path).name)
    for source in (run.prompts.train_source, run.prompts.heldout_source):
        shutil.copy(source.path, tmp_path)
    repeated = load_run(path)
    assert repeated.training_for(0).identity() == run.training_for(0).identity()
    assert repeated.sampling_for_training().identity() == run.sampling_for_training().identity()
    assert repeated.scoring_for_pairs().identity() == run.scoring_for_pairs().identity()


def test_nothing_is_overwritten_and_what_cannot_be_exported_is_said(undisturbed, exported, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["export", "tiny", "--store", str(undisturbed.store), *arguments]) == 2
        return capsys.readouterr().err

    before = sorted((path.name, path.stat().st_mtime_ns) for path in exported.iterdir())
    assert "not empty: name another directory" in refused("--to", str(exported))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in exported.iterdir()) == before
    assert "either --to DIR or --hub owner/name" in refused()
    assert "either --to DIR or --hub owner/name" in refused("--to", str(tmp_path / "x"), "--hub", "me/x")
    assert "--private goes with --hub" in refused("--to", str(tmp_path / "x"), "--private")
    assert "--policy-license and --data-license" in refused("--hub", "me/x")
    licences = ["--policy-license", "mit", "--data-license", "unknown"]
    assert "HF_HUB_OFFLINE is set" in refused("--hub", "me/x", *licences)
    assert "must be owner/name" in refused("--hub", "x", *licences)
    assert "no measured iteration 7: --iteration takes 0, 1, 2" in refused(
        "--to", str(tmp_path / "x"), "--iteration", "7"
    )
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    one = ["export", "tiny", "--store", str(undisturbed.store), "--to", str(tmp_path / "empty"), "--iteration", "1"]
    assert main(one) == 0
    out = capsys.readouterr().out
    assert "tiny, iteration 1" in out and "licences not stated" in out
    assert "by 1 of 2 iterations" in front(tmp_path / "empty")[1] and "license" not in front(tmp_path / "empty")[0]


def test_a_run_without_ledger_or_end_is_exported_by_iteration_only(undisturbed, tmp_path, capsys):
    last = (undisturbed.store / "runs/tiny/iter_02/train").resolve().name
    leave_out = shutil.ignore_patterns(last, FILE, "prefect", "mlflow*")
    store = shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True, ignore=leave_out)
    assert not (store / "runs/tiny" / FILE).exists()
    assert main(["export", "tiny", "--store", str(store), "--to", str(tmp_path / "out")]) == 2
    assert "not complete" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["export", "tiny", "--store", str(store), "--to", str(tmp_path / "out"), "--iteration", "1"]) == 0
    assert "## Cost" not in front(tmp_path / "out")[1]


def test_the_rows_are_read_by_datasets_in_the_conversational_format(undisturbed, tmp_path):
    from datasets import load_dataset

    out = tmp_path / "rows"
    assert main(["export", "tiny", "--store", str(undisturbed.store), "--data", "--to", str(out)]) == 0
    assert front(out)[0]["configs"][0]["default"] and "license" not in front(out)[0]
    run = undisturbed.store / "runs/tiny"
    pairs = [
        row for name in ("iter_01", "iter_02") for row in read_shards(run / name / "score", "scored_pairs").to_pylist()
    ]
    prompts = {row["prompt_id"]: row for row in read_shards(run / "iter_01/prompts", "prompts").to_pylist()}
    preferences = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(preferences) == len(pairs)
    for row, pair in zip(preferences, pairs, strict=True):
        assert row["chosen"] == [{"role": "assistant", "content": pair["chosen"]}]
        assert row["rejected"] == [{"role": "assistant", "content": pair["rejected"]}]
        assert row["score_chosen"] == pair["score_chosen"] and row["win_rate_rejected"] == pair["win_rate_rejected"]
        if row["iteration"] == 1:
            assert row["prompt"] == prompts[row["prompt_id"]]["messages"]
    generations = load_dataset(str(out), "generations", split="train", cache_dir=str(tmp_path / "cache"))
    first = read_shards(run / "iter_01/sample", "generations").to_pylist()
    assert [row["completion"][0]["content"] for row in generations][: len(first)] == [
        row["completion"] for row in first
    ]
    assert set(generations["iteration"]) == {1, 2} and set(generations["finish_reason"]) <= {"stop", "length"}


# --- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's HTTP API a push asks for: repositories, LFS uploads, one commit; kept in `server.repositories`."""

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/tree/main.*|/revision/main.*|\?.*)?", self.path)
        repository = self.server.repositories.get((match[1], match[2])) if match else None
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "oid": "0", "size": 1} for name in repository["files"]])
        else:
            siblings = [{"rfilename": name} for name in repository["files"]]
            self.answer({"id": match[2], "sha": "0" * 40, "siblings": siblings})

    def do_POST(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_mine":
            self.body()
            return self.answer({"error": "Invalid credentials"}, 401)
        text, address = self.body(), f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(text)
            name = f"{asked['organization']}/{asked['name']}"
            files = {".gitattributes": b""}
            self.server.repositories[asked.get("type", "model"), name] = asked | {"files": files, "commits": []}
            return self.answer({"url": f"{address}/{name}", "name": name})
        if self.path.endswith("/objects/batch"):
            transfers, objects = ["basic"], json.loads(text)["objects"]
            links = [{**item, "actions": {"upload": {"href": f"{address}/lfs/{item['oid']}"}}} for item in objects]
            return self.answer({"transfer": transfers[0], "objects": links})
        if self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(text)["content"].split("---\n")[1])
            return self.answer({"errors": [], "warnings": []})
        kind, name, action = re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)/(\w+)", self.path).groups()
        repository = self.server.repositories[kind, name]
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(text)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit"
        for line in map(json.loads, text.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["commits"].append(value["summary"])
            elif line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                repository["files"][value["path"]] = self.server.lfs[value["oid"]]
        url = f"{address}/{name}/commit/{'1' * 40}"
        return self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def do_PUT(self) -> None:
        content = self.body()
        self.server.lfs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories, server.lfs = {}, {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{server.server_port}", repositories=server.repositories, lfs=server.lfs
        )
        server.shutdown()


def test_a_push_is_one_commit_into_a_new_repository_with_the_files_of_the_directory(
    hub, tools, undisturbed, exported
):  # fmt: skip
    """All in one process of its own: the hub's client reads its address when it is imported."""
    code = f"""
import os
from flows.cli.commands import main
common = ["export", "tiny", "--store", {str(undisturbed.store)!r}]
common += ["--policy-license", "apache-2.0", "--data-license", "mit", "--hub"]
os.environ["HF_TOKEN"] = "hf_another"
print("refused", main([*common, "me/tiny"]))
os.environ["HF_TOKEN"] = "hf_mine"
print("pushed", main([*common, "me/tiny", "--private"]))
print("again", main([*common, "me/tiny"]))
print("rows", main([*common, "me/rows", "--data"]))
"""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = tools.finish([sys.executable, "-c", code], **environment)
    codes = re.findall(r"^(refused|pushed|again|rows) (\d+)$", done.out, re.MULTILINE)
    assert codes == [("refused", "2"), ("pushed", "0"), ("again", "2"), ("rows", "0")], done.out
    assert "hf auth login" in done.out and f"{hub.url}/me/tiny: tiny, iteration 2" in done.out
    assert "is there already and holds 8 files" in done.out

    repository = hub.repositories["model", "me/tiny"]
    assert repository["visibility"] == "private" and repository["commits"] == ["tiny, iteration 2"]
    files = {name: content for name, content in repository["files"].items() if name != ".gitattributes"}
    assert files == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert (exported / "model.safetensors").read_bytes() in hub.lfs.values()
    files = hub.repositories["dataset", "me/rows"]["files"]
    assert {"preferences/iter_01.parquet", "generations/iter_02.parquet", "README.md"} <= files.keys()


# --- adapters, and vLLM


def test_an_adapter_is_exported_as_peft_reads_it_with_a_card_that_names_its_base(undisturbed, tiny_model, tmp_path):
    """The checkpoint is made here: of the tiny model's tokenizer, its config.json and an adapter, without weights."""
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    checkpoint = tmp_path / "checkpoint"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_model, checkpoint, ignore=weights)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    model.save_pretrained(checkpoint / ADAPTER)

    store = Store(undisturbed.store)
    run = read_run(load_run(undisturbed.config), store, tmp_path)
    policy = ArtifactRef(kind="checkpoint", key="0123456789abcdef", path=str(checkpoint), content="c")
    write(model_files(run, store, OPTIONS, 2, policy), tmp_path / "out")
    head, text = front(tmp_path / "out")
    assert head["library_name"] == "peft" and f"A LoRA adapter made from {Path(run.config.policy.path).name}" in text
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)

    with pytest.raises(ConfigError, match="where others get that model, with --base owner/name"):
        model_files(run, store, OPTIONS._replace(hub="me/x"), 2, policy)
    files = model_files(run, store, OPTIONS._replace(hub="me/x", base="them/tiny"), 2, policy)
    settings = json.loads(next(file.content for file in files if file.name == "adapter_config.json"))
    assert settings["base_model_name_or_path"] == "them/tiny"
    card = next(file.content for file in files if file.name == "README.md").decode()
    assert "base_model: them/tiny\nbase_model_relation: adapter" in card


@pytest.mark.slow
def test_vllm_loads_it_and_ends_its_answers_where_the_run_did(exported, tools):
    code = f"""
from vllm import LLM
llm = LLM({str(exported)!r}, max_model_len=128, enforce_eager=True)
settings = llm.get_default_sampling_params()
settings.max_tokens = 24
answer = llm.chat([[{{"role": "user", "content": "Say a word."}}]] * 8, settings)
print("ANSWERS", settings.temperature, settings.top_p, [len(item.outputs[0].token_ids) for item in answer])
"""
    done = tools.finish([sys.executable, "-c", code], VLLM_CPU_KVCACHE_SPACE="1")
    assert done.code == 0, done.out[-3000:]
    assert "ANSWERS 1.0 1.0 [" in done.out
