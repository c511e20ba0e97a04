"""A hundred wrong inputs, one table: the documented exit code, one sentence that says where and what, no model loaded, nothing written.

Strategy: the commands as they are typed (`selfplay run`, `python -m stages`, `data_contracts`, `data_contracts.gc`), but in this process, so a case costs
milliseconds; loading a model, starting a stage or a server is an assertion error. Each case is a file or a word with one thing wrong in it.
What a fresh process says is in tests/flows/test_bad_input.py.
"""

import builtins
import copy
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

import data_contracts.__main__ as store_command
import data_contracts.gc
import flows.cli.play
import flows.preflight
import stages.__main__ as stages_command
import stages.models.policy
import stages.sampling.check
import tasks.build
import tasks.data.lengths
from data_contracts.artifact import RECORD
from data_contracts.errors import ArtifactError, ConfigError, ContractError, TransientError
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from data_contracts.store import Store
from flows.cli.commands import main as selfplay
from stages.evaluation import sandbox

WRONG, BROKEN, DAMAGED = ConfigError.exit_code, ContractError.exit_code, ArtifactError.exit_code
LATER = TransientError.exit_code


REAL_CHECK = tasks.data.lengths.run_check


def check_here(python: str, request: Path) -> tuple[int, str]:
    """The check of the prompts, in this process, where it is this interpreter that is asked."""
    if python != sys.executable:
        return REAL_CHECK(python, request)
    return stages.sampling.check.main([str(request)]), ""


@pytest.fixture(autouse=True)
def nothing_may_load(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a wrong input got as far as a model, a stage or a server")

    monkeypatch.setattr(stages.models.policy, "load_causal_lm", refuse)
    monkeypatch.setattr(tasks.build, "run_work", refuse)
    monkeypatch.setattr(flows.cli.play, "prefect_server", refuse)
    monkeypatch.setattr(tasks.data.lengths, "run_check", check_here)
    flows.preflight._preflight.cache_clear()


class Desk:
    """A complete, correct run config, prompt files, model and stage input, each of which a case may spoil."""

    def __init__(self, root: Path, model: Path, rows: list[dict]):
        self.root, self.store = root, Store(root / "store")
        self.model = Path(shutil.copytree(model, root / "model"))
        self.train, self.heldout = root / "train.jsonl", root / "heldout.jsonl"
        lines = [json.dumps(row | {"checks": json.loads(row["checks"])}) + "\n" for row in rows]
        self.train.write_text("".join(lines[:8]))
        self.heldout.write_text("".join(lines[8:]))
        self.run = {
            "name": "tiny",
            "policy": {"path": str(self.model)},
            "iterations": 2,
            "prompts": {"train": str(self.train), "heldout": str(self.heldout), "per_iteration": 4},
            "method": {"name": "sppo", "eta": 20},
            "sampling": {"backend": {"name": "canned"}, "max_prompt_tokens": 64, "max_new_tokens": 8},
            "scoring": {"scorer": {"name": "length", "target_tokens": 8}},
            "evaluation": {"scorer": {"name": "length", "target_tokens": 8}},
        }
        self.config = root / "run.yaml"
        self.spoilt: set[Path] = set()
        """Files that the case itself made."""

    def play(self, *words: str) -> int:
        if not self.config.exists():
            self.config.write_text(yaml.safe_dump(self.run, sort_keys=False))
        return selfplay(["run", str(self.config), "--store", str(self.store.root), *words])


@pytest.fixture
def desk(tmp_path, tiny_model, make_rows) -> Desk:
    return Desk(tmp_path, tiny_model, [*make_rows(8), *make_rows(3, first=100)])


def setting(dotted: str, value) -> callable:
    """The run config with one setting changed; `...` takes it out."""

    def spoil(desk: Desk) -> int:
        data = desk.run
        *parents, last = dotted.split(".")
        for parent in parents:
            data = data.setdefault(parent, {})
        if value is ...:
            del data[last]
        else:
            data[last] = copy.deepcopy(value)
        return desk.play()

    return spoil


def text(content: str | bytes) -> callable:
    """The run config is this text."""

    def spoil(desk: Desk) -> int:
        desk.config.write_bytes(content if isinstance(content, bytes) else content.encode())
        return desk.play()

    return spoil


def more(line: str) -> callable:
    """The correct run config, and a line below it."""

    def spoil(desk: Desk) -> int:
        desk.config.write_text(yaml.safe_dump(desk.run, sort_keys=False) + line + "\n")
        return desk.play()

    return spoil


def words(*arguments: str) -> callable:
    return lambda desk: desk.play(*arguments)


def train(*lines: str | bytes | dict) -> callable:
    """A correct first prompt, then these lines."""

    def spoil(desk: Desk) -> int:
        first = desk.train.read_bytes().splitlines()[0]
        given = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        desk.train.write_bytes(b"\n".join([first, *given]) + b"\n")
        return desk.play()

    return spoil


def long_line(desk: Desk) -> int:
    """A correct first prompt, then one of 200 MB."""
    with desk.train.open("ab") as file:
        file.write(b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n')
    return desk.play()


def splits(split: str) -> callable:
    """A directory with the splits train and test, and a request for this one."""

    def spoil(desk: Desk) -> int:
        data = desk.root / "shards"
        data.mkdir()
        for name in ("train", "test"):
            shutil.copy(desk.train, data / f"{name}.jsonl")
        return setting("prompts.train", {"path": str(data), "split": split})(desk)

    return spoil


def hub(error: str, message: str) -> callable:
    """A request for a set of the hub, to which the library `datasets` answers with this error."""

    def spoil(desk: Desk) -> int:
        import datasets

        kind = getattr(datasets.exceptions, error, None) or getattr(builtins, error)
        with (
            mock.patch.object(datasets, "load_dataset", side_effect=kind(message)),
            mock.patch.object(datasets.config, "HF_HUB_OFFLINE", False),
        ):
            return setting("prompts.train", {"hub_id": "a/b"})(desk)

    return spoil


def model(name: str, content: str | bytes | None) -> callable:
    """A file of the model directory with another content; None: gone."""

    def spoil(desk: Desk) -> int:
        path = desk.model / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return desk.play()

    return spoil


def json_of_model(name: str, **changes) -> callable:
    def spoil(desk: Desk) -> int:
        path = desk.model / name
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
        return desk.play()

    return spoil


def only_pickles(desk: Desk) -> int:
    (desk.model / "model.safetensors").rename(desk.model / "pytorch_model.bin")
    return desk.play()


def weights_outside(desk: Desk) -> int:
    (desk.root / "outside.safetensors").write_bytes((desk.model / "model.safetensors").read_bytes())
    (desk.model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../outside.safetensors"}})
    )
    return desk.play()


def truncated_weights(desk: Desk) -> int:
    path = desk.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return desk.play()


def tensors(change) -> callable:
    """The model's weights, changed: `change` takes name -> tensor and returns such a mapping."""

    def spoil(desk: Desk) -> int:
        from safetensors.torch import load_file, save_file

        path = desk.model / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return desk.play()

    return spoil


def tokenizer_beyond(desk: Desk) -> int:
    """A word added to the tokenizer, and no row of the embedding for it."""
    path = desk.model / "tokenizer.json"
    data = json.loads(path.read_text())
    token = data["added_tokens"][0] | {"id": 320, "content": "newword", "special": False}
    path.write_text(json.dumps(data | {"added_tokens": [*data["added_tokens"], token]}))
    return desk.play()


def no_eos(desk: Desk) -> int:
    (desk.model / "generation_config.json").unlink()
    (desk.model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = desk.model / name
        data = json.loads(path.read_text())
        data.pop(key, None)
        path.write_text(json.dumps(data))
    return desk.play()


def shards_without_index(desk: Desk) -> int:
    path = desk.model / "model.safetensors"
    for number in (1, 2):
        desk.spoilt.add(Path(shutil.copy(path, desk.model / f"model-0000{number}-of-00002.safetensors")))
    path.unlink()
    return desk.play()


def only_an_adapter(desk: Desk) -> int:
    (desk.model / "config.json").unlink()
    (desk.model / "adapter_config.json").write_text("{}")
    moved = (desk.model / "model.safetensors").rename(desk.model / "adapter_model.safetensors")
    desk.spoilt |= {desk.model / "adapter_config.json", moved}
    return desk.play()


def other_model(name: str, **changes) -> callable:
    """Another model beside the policy, at the dotted setting `name`, with these changes of its config.json."""

    def spoil(desk: Desk) -> int:
        other = Path(shutil.copytree(desk.model, desk.root / "other"))
        desk.spoilt |= {other, *other.iterdir()}
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        section, _, field = name.rpartition(".")
        if section == "models":
            desk.run["method"] = {"name": "swift"}
            desk.run["scoring"] = {}
        if section == "tournament.baselines":
            desk.run["tournament"] = {"scorer": {"name": "length"}, "baselines": {field: {"path": str(other)}}}
        elif section == "models":
            desk.run["models"] = {field: {"path": str(other)}}
        else:
            desk.run["evaluation"] = {"scorer": {"name": field, "model": {"path": str(other)}}}
        return desk.play()

    return spoil


def environment(name: str, value: str) -> callable:
    """A correct request under a wrong environment variable: the store is asked for its lock and its room, as a build does."""

    def spoil(desk: Desk) -> int:
        os.environ[name] = value
        try:
            with desk.store.lock("generations", "k"):
                desk.store.check_room()
        except ConfigError as error:
            print(error)
            return error.exit_code
        finally:
            del os.environ[name]
            shutil.rmtree(desk.store.root, ignore_errors=True)
        return 0

    return spoil


def no_namespaces(desk: Desk) -> int:
    """A correct request to run what the model wrote, on a machine that grants no sandbox."""

    def refuse(*_):
        raise sandbox.NoSandbox("unshare (Operation not permitted)")

    run, sandbox.run = sandbox.run, refuse
    try:
        return setting("evaluation.suites", [{"name": "tidpo", "only": ["humaneval"], "allow_code": True}])(desk)
    finally:
        sandbox.run = run


def spec(**changes) -> callable:
    """`python -m stages sample SPEC.json` with these changes; `...` takes a field out."""

    def spoil(desk: Desk) -> int:
        config = {"backend": {"name": "canned"}, "max_new_tokens": 8, "max_prompt_tokens": 64}
        data = {"config": config, "inputs": {"policy": str(desk.model)}, "store": str(desk.store.root)} | changes
        path = desk.root / "spec.json"
        path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
        return stages_command.main(["sample", str(path)])

    return spoil


def spec_text(content: str) -> callable:
    def spoil(desk: Desk) -> int:
        (desk.root / "spec.json").write_text(content)
        return stages_command.main(["sample", str(desk.root / "spec.json")])

    return spoil


def stages_words(*arguments: str) -> callable:
    return lambda desk: stages_command.main(list(arguments))


def store_words(*arguments: str) -> callable:
    return lambda desk: store_command.main([*arguments, "--store", str(desk.store.root)])


def gc_words(*arguments: str) -> callable:
    return lambda desk: data_contracts.gc.main([*arguments, "--store", str(desk.store.root)])


GENERATION = {
    "prompt_id": "p0", "candidate": 0, "prompt_ids": [5], "token_ids": [6, 1], "token_logps": [-1.0, -1.0], "finish_reason": "stop", "seed": 1,
    "completion": "x",
}  # fmt: skip


def shard(kind: str, spoil_file) -> callable:
    """A shard of generations, spoilt, and read as `kind`."""

    def spoil(desk: Desk) -> int:
        path = shard_path(desk.root / "shards", 0)
        write_shard(path, to_table([GENERATION], "generations"))
        spoil_file(path)
        return _said(lambda: read_shards(path.parent, kind))

    return spoil


def row(kind: str, **changes) -> callable:
    def spoil(desk: Desk) -> int:
        value = {name: item for name, item in (GENERATION | changes).items() if item is not ...}
        return _said(lambda: to_table([GENERATION, value], kind))

    return spoil


def _said(do) -> int:
    try:
        do()
    except (ConfigError, ContractError, ArtifactError, TransientError) as error:
        print(error)
        return error.exit_code
    return 0


def pairs(method: str = "sppo", **changes) -> callable:
    """Rows of weighted_pairs as the trainer checks them, with one column wrong in the second."""

    def spoil(desk: Desk) -> int:
        from stages.methods import METHODS
        from stages.training.stage import check_rows

        good = {"pair_id": "q0/0-1", "chosen_ids": [3, 1], "rejected_ids": [4, 1]}
        good |= {
            f"{side}_{name}": [1.0, 1.0] for side in ("chosen", "rejected") for name in ("weights", "reference_logps")
        }
        return _said(
            lambda: check_rows(
                [] if changes.get("none") else [good, good | {"pair_id": "q1/0-1"} | changes], METHODS.config(method)
            )
        )

    return spoil


def record(content: str) -> callable:
    def spoil(desk: Desk) -> int:
        directory = desk.store.directory("generations", "0123456789abcdef")
        directory.mkdir(parents=True)
        (directory / RECORD).write_text(content)
        try:
            return _said(lambda: desk.store.load("generations", "0123456789abcdef"))
        finally:
            shutil.rmtree(desk.store.root)

    return spoil


RECORD_TEXT = json.dumps(
    {"kind": "generations", "key": "0123456789abcdef", "stage": "sample", "version": "1", "config": {}, "inputs": {}, "content": "",
     "files": [{"name": "../../../outside", "size": 1, "sha256": "0"}], "rows": 0}
)  # fmt: skip


def judge(*bodies: bytes, status: int = 200) -> callable:
    """A judge that answers so; what is said of its answer. 4xx that no further try cures are the request's fault."""

    def spoil(desk: Desk) -> int:
        import http.server
        import threading

        from stages.scoring.endpoint import Endpoint, EndpointRuntime

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(bodies[0])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        runtime = EndpointRuntime(base_url=f"http://127.0.0.1:{server.server_port}/v1", retries=0, timeout_seconds=5)
        replies = []
        try:
            code = _said(lambda: replies.extend(Endpoint(runtime, None).ask([{"model": "m", "messages": []}])))
        finally:
            server.shutdown()
            server.server_close()
        for reply in replies:
            print(reply.failure or repr(reply.text))
            code = BROKEN if reply.failure or not reply.text else 0
        return code

    return spoil


PAIR = {"prompt_id": "q", "prompt": "What is it?"}

CASES: dict[str, tuple[callable, int, tuple[str, ...]]] = {
    # --- run configs: the file
    "no run config": (lambda desk: selfplay(["run", "/no/such.yaml"]), WRONG, ("cannot read the run config /no/such.yaml", "No such file")),
    "a run config that is a directory": (lambda desk: selfplay(["run", "/tmp"]), WRONG, ("cannot read the run config /tmp", "directory")),
    "an empty run config": (text(""), WRONG, ("run.yaml must hold a mapping of settings, got NoneType",)),
    "a run config that is a list": (text("- a\n- b\n"), WRONG, ("must hold a mapping", "got list")),
    "a run config that is not YAML": (text("name: ["), WRONG, ("run.yaml is not valid YAML",)),
    "a run config that is not UTF-8": (text(b"name: \xff\xfe"), WRONG, ("is not UTF-8 text", "at byte 6")),
    "a run config with a tab": (text("name:\n\tx: 1"), WRONG, ("is not valid YAML", "\\t")),
    "a key given twice": (more("name: other"), WRONG, ("is not valid YAML", "the key 'name' is given twice, again in line")),
    "a nested key given twice": (more("weighting: {dtype: float32, dtype: bfloat16}"), WRONG, ("the key 'dtype' is given twice",)),
    "a date that does not exist": (more("seed: 2025-02-30"), WRONG, ("is not valid YAML", "day is out of range")),
    "Python in YAML": (more("seed: !!python/object/apply:os.getcwd []"), WRONG, ("is not valid YAML", "python/object/apply")),
    "a thousand brackets": (more("seed: " + "[" * 3000), WRONG, ("is not valid YAML",)),
    "a list as a key": (more("? [a]\n: 1"), WRONG, ("is not valid YAML",)),
    "an extends that is not there": (more("extends: none.yaml"), WRONG, ("cannot read the run config", "none.yaml")),
    "an extends of itself": (more("extends: run.yaml"), WRONG, ("extends itself",)),
    "an extends that is a number": (more("extends: 3"), WRONG, ("`extends` must name a file", "got 3")),
    # --- run configs: the settings
    "an unknown key": (setting("sampling.temprature", 1), WRONG, ("run.yaml cannot be used because of 1 problem:", "sampling.temprature: unknown key")),
    "a missing section": (setting("scoring", ...), WRONG, ("scoring: Field required",)),
    "a section that is a number": (setting("prompts", 3), WRONG, ("prompts: ", "(got 3)")),
    "a name that is a path": (setting("name", "../../etc"), WRONG, ("name: String should match", "(got '../../etc')")),
    "a name with a line break": (setting("name", "tiny\n"), WRONG, ("name: String should match",)),
    "a name that is too long": (setting("name", "x" * 61), WRONG, ("name: String should have at most 60",)),
    "no iterations": (setting("iterations", 0), WRONG, ("iterations: ", "greater than or equal to 1 (got 0)")),
    "half an iteration": (setting("iterations", 1.5), WRONG, ("iterations: ", "(got 1.5)")),
    "an infinite learning rate": (setting("training.learning_rate", float("inf")), WRONG, ("training.learning_rate: ", "finite")),
    "a learning rate that is not a number": (setting("training.learning_rate", float("nan")), WRONG, ("training.learning_rate: ",)),
    "a learning rate of zero": (setting("training.learning_rate", 0), WRONG, ("training.learning_rate: ", "greater than 0 (got 0)")),
    "a negative temperature": (setting("sampling.temperature", -1), WRONG, ("sampling.temperature: ", "(got -1)")),
    "a top_p above 1": (setting("sampling.top_p", 1.5), WRONG, ("sampling.top_p: ", "(got 1.5)")),
    "no candidates": (setting("sampling.num_candidates", 0), WRONG, ("sampling.num_candidates: ", "(got 0)")),
    "one candidate for pairs": (setting("sampling.num_candidates", 1), WRONG, ("need sampling.num_candidates >= 2",)),
    "an unknown sampler": (setting("sampling.backend", {"name": "vlm"}), WRONG, ("unknown sampler 'vlm'", "known: ", "Did you mean 'vllm'?")),
    "an unknown method": (setting("method", {"name": "dpoo"}), WRONG, ("unknown method 'dpoo'", "Did you mean 'dpo'?")),
    "an unknown option of a method": (setting("method", {"name": "dpo", "betta": 1}), WRONG, ("betta: unknown key",)),
    "a method without a name": (setting("method", {"beta": 1}), WRONG, ('must be a mapping with a "name"',)),
    "an unknown scorer": (setting("scoring.scorer", {"name": "lenght"}), WRONG, ("unknown scorer 'lenght'", "Did you mean 'length'?")),
    "no scorer where candidates are compared": (setting("scoring", {}), WRONG, ("needs scoring.scorer",)),
    "a seed in two places": (setting("training.seed", 3), WRONG, ("training.seed is set by the run's own `seed`",)),
    "a model by path and by hub id": (setting("policy.hub_id", "a/b"), WRONG, ("give exactly one of `path`",)),
    "a revision without a hub id": (setting("policy.revision", "main"), WRONG, ("`revision` goes with `hub_id`",)),
    "no teacher for weights that need one": (setting("method", {"name": "swift"}), WRONG, ("needs models.teacher",)),
    "a pairing of single responses for a method on pairs": (setting("scoring.pairing", "each"), WRONG, ("trains on pairs",)),
    "weights that need a teacher that is not there": (setting("weighting.weights", {"name": "swift"}), WRONG, ("swift needs models.teacher",)),
    # --- the command line
    "an override without a value": (words("--set", "iterations"), WRONG, ("an override looks like section.field=value, got 'iterations'",)),
    "an override that is not YAML": (words("--set", "method={name: dpo"), WRONG, ("the value of the override", "is not valid YAML")),
    "an override of an unknown key": (words("--set", "training.rate=1"), WRONG, ("training.rate: unknown key",)),
    "an override through a value": (words("--set", "iterations.x=1"), WRONG, ("goes through 'iterations', which is not a section",)),
    "an override given twice in itself": (words("--set", "method={name: dpo, name: ipo}"), WRONG, ("the key 'name' is given twice",)),
    "an unknown option": (words("--frobnicate"), WRONG, ("No such option: --frobnicate",)),
    "a store that is a file": (words("--store", "/etc/passwd/store"), WRONG, ("the store /etc/passwd/store cannot be made: /etc/passwd is a file",)),
    "a store that cannot be written": (words("--store", "/proc/store"), WRONG, ("the store /proc/store is not writable", "Set SELFPLAY_STORE")),
    "an unknown stage": (stages_words("sampel", "spec.json"), WRONG, ("usage: python -m stages {sample|score|",)),
    "a stage without a spec": (stages_words("sample"), WRONG, ("usage: python -m stages",)),
    "a key that nothing has": (store_words("show", "ffff"), WRONG, ("no artifact in", "has a key that starts with 'ffff'", "selfplay ls")),
    "a key that is a path": (store_words("show", "../../etc/passwd"), WRONG, ("no artifact in", "'../../etc/passwd'")),
    "an unknown store command": (store_words("shwo"), WRONG, ("invalid choice: 'shwo'",)),
    "a gc that keeps a negative number of runs": (gc_words("--keep-runs", "-1"), WRONG, ("--keep-runs is -1: it must be 0 or more",)),
    "a gc without a number": (gc_words("--keep-runs", "few"), WRONG, ("invalid int value: 'few'",)),
    # --- environment variables
    "a budget that is no amount": (environment("SELFPLAY_STORE_MAX_BYTES", "lots"), WRONG, ("SELFPLAY_STORE_MAX_BYTES is 'lots'", "e.g. 500G")),
    "a negative reserve": (environment("SELFPLAY_STORE_MIN_FREE_BYTES", "-5"), WRONG, ("SELFPLAY_STORE_MIN_FREE_BYTES is '-5'",)),
    "an unknown kind of lock": (environment("SELFPLAY_LOCKS", "redis"), WRONG, ("SELFPLAY_LOCKS is 'redis': it must be flock", "or lease")),
    # --- prompts
    "an empty prompt file": (lambda desk: (desk.train.write_text(""), desk.play())[1], WRONG, ("train.jsonl is empty",)),
    "a prompt that is not JSON": (train('{"prompt": "x"'), WRONG, ("train.jsonl line 2 is not valid JSON: ", "at column 15")),
    "a prompt that is a list": (train("[1]"), WRONG, ("line 2 must be a JSON object, got list",)),
    "a prompt with an unknown field": (train({"promt": "x"}), WRONG, ("line 2: no column holds a prompt (promt: 'x')",)),
    "a prompt without text": (train({"prompt_id": "a"}), WRONG, ("line 2: no column holds a prompt (prompt_id: 'a')",)),
    "a blank prompt": (train({"prompt": "  "}), WRONG, ("line 2: every message is blank",)),
    "a prompt that is a number": (train({"prompt": 5}), WRONG, ('line 2: "prompt" must be text, got 5',)),
    "no messages": (train({"messages": []}), WRONG, ('line 2: "messages" must be a non-empty list',)),
    "a role nobody knows": (train({"messages": [{"role": "robot", "content": "x"}]}), WRONG, ("one of system, user, assistant", "robot")),
    "a message too many": (
        train({"messages": [{"role": "assistant", "content": "x"}]}), WRONG, ("there is nothing before the assistant's turn",),
    ),
    "a prompt id given twice": (train(PAIR, PAIR | {"prompt": "Who is it?"}), WRONG, ("line 3: the prompt_id 'q' was already used in line 2",)),
    "a prompt id that is a list": (train({"prompt": "x", "prompt_id": [5]}), WRONG, ('"prompt_id" must be non-empty text, got [5]',)),
    "a chosen response without a rejected one": (train({"prompt": "x", "chosen": "y"}), WRONG, ('line 2: "rejected" must be non-empty text',)),
    "checks that are no list": (train({"prompt": "x", "checks": {"name": "a"}}), WRONG, ('"checks" must be a list of objects',)),
    "half a surrogate pair": (train('{"prompt": "\\ud800"}'), WRONG, ("holds half of a surrogate pair",)),
    "a prompt nested without end": (train("[" * 5000), WRONG, ("line 2 is nested too deeply",)),
    "a number of five thousand digits": (train('{"prompt": ' + "1" * 5000 + "}"), WRONG, ("line 2 is not valid JSON",)),
    "prompts that are not UTF-8": (train(b'{"prompt": "\xff"}'), WRONG, ("train.jsonl line 2: ", "bytes that are not UTF-8")),
    "too few prompts": (setting("prompts.per_iteration", 50), WRONG, ("has 8 prompts; 2 iterations of 50 need 100", "Lower prompts.per_iteration")),
    "held-out prompts that train": (
        lambda desk: (desk.heldout.write_bytes(desk.train.read_bytes()), desk.play())[1], WRONG, ("8 prompt id(s) are both in the training",),
    ),
    "a column that no line has": (
        setting("prompts.columns", {"prompt": "question"}), WRONG, ("train.jsonl has no column 'question' (columns.prompt); it has prompt_id",),
    ),
    "a column that nothing reads": (setting("prompts.columns", {"promt": "prompt"}), WRONG, ("prompts.columns.promt",)),
    "a split of a file": (
        setting("prompts.train", {"path": "deploy/prompts/tiny.jsonl", "split": "test"}), WRONG, ("is a file and has no splits",),
    ),
    "a split that a directory does not have": (splits("dev"), WRONG, ("has no split 'dev'; there are train, test",)),
    "two shapes in one file": (
        train({"conversations": [{"from": "human", "value": "x"}]}), WRONG, ("mixes shapes: line 1 is read as prompts, line 2 as conversations",),
    ),
    "a binary file": (
        lambda desk: (desk.train.write_bytes(b"\x7fELF\0\0\0\1" * 99), desk.play())[1], WRONG, ("train.jsonl is not text: it holds zero bytes",),
    ),
    "a line of 200 MB": (long_line, WRONG, ("train.jsonl line 9 is longer than 64 MiB",)),
    "a hub set that is not there": (
        hub("DatasetNotFoundError", "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), WRONG, ("the hub has no data set a/b", "doesn't exist"),
    ),
    "a hub set that is gated": (
        hub("DatasetNotFoundError", "Dataset 'a/b' is a gated dataset on the Hub. Visit it to ask for access."), WRONG, ("is a gated dataset",),
    ),
    "a hub set with another configuration": (
        hub("ValueError", "BuilderConfig 'x' not found. Available: ['main']"), WRONG, ("the data set a/b cannot be read: BuilderConfig 'x' not found",),
    ),
    "a hub that does not answer": (hub("ConnectionError", "no route"), LATER, ("the data set a/b could not be fetched", "no route")),
    "a prompt file that is not there": (setting("prompts.train", "/no/p.jsonl"), WRONG, ("cannot read the prompt file /no/p.jsonl: No such",)),
    # --- models and tokenizers
    "no model": (setting("policy.path", "/no/model"), WRONG, ("the model directory /no/model does not exist",)),
    "a model without a config": (model("config.json", None), WRONG, ("has no config.json",)),
    "a model config that is not JSON": (model("config.json", "{"), WRONG, ("config.json is not valid JSON",)),
    "a model config that is a list": (model("config.json", "[]"), WRONG, ("config.json names no `architectures`",)),
    "a model of no class": (json_of_model("config.json", architectures=...), WRONG, ("names no `architectures`",)),
    "a model without a tokenizer": (model("tokenizer.json", None), WRONG, ("has no tokenizer file",)),
    "a tokenizer that is not JSON": (model("tokenizer.json", "{'a'"), WRONG, ("tokenizer.json is not valid JSON",)),
    "a tokenizer in UTF-16": (model("tokenizer.json", '{"model": 1}'.encode("utf-16")), WRONG, ("tokenizer.json is not valid JSON",)),
    "a tokenizer with a byte order mark": (model("tokenizer.json", b"\xef\xbb\xbf{}"), WRONG, ("tokenizer.json is not valid JSON",)),
    "a tokenizer that is a number": (model("tokenizer.json", "5"), WRONG, ("tokenizer.json must hold a JSON object, got int",)),
    "a tokenizer that is another thing": (model("tokenizer.json", "{}"), WRONG, ("the tokenizer in", "cannot be loaded")),
    "generation settings that are not JSON": (model("generation_config.json", "no"), WRONG, ("generation_config.json is not valid JSON",)),
    "a model without a chat template": (model("chat_template.jinja", None), WRONG, ("has no chat template", "sampling.template: plain")),
    "a model without weights": (model("model.safetensors", None), WRONG, ("has no *.safetensors weights",)),
    "a model of pickles": (only_pickles, WRONG, ("has no *.safetensors weights (pickled .bin files are not read)",)),
    "truncated weights": (truncated_weights, WRONG, ("model.safetensors has", "the file is truncated or damaged; fetch it again")),
    "weights that are text": (model("model.safetensors", "hello"), WRONG, ("is not a readable safetensors file",)),
    "weights with a header without end": (model("model.safetensors", struct.pack("<Q", 2**60)), WRONG, ("is not a readable safetensors file",)),
    "weights with a header that is a list": (model("model.safetensors", struct.pack("<Q", 2) + b"[]"), WRONG, ("is not a readable safetensors",)),
    "an index that is not JSON": (model("model.safetensors.index.json", "{"), WRONG, ("is not an index of weights",)),
    "an index without weights": (model("model.safetensors.index.json", "{}"), WRONG, ("is not an index of weights", "weight_map")),
    "an index that leads elsewhere": (weights_outside, WRONG, ("names files outside of the model directory, e.g. '../outside.safetensors'",)),
    "limits beyond the context": (setting("sampling.max_new_tokens", 200), WRONG, ("= 264 exceeds the context of 256 positions",)),
    "a prompt longer than its limit": (setting("sampling.max_prompt_tokens", 3), WRONG, ("tokens, allowed are 1 to 3",)),
    "an interpreter that is not there": (setting("sampling.runtime.python", "/no/python"), WRONG, ("'/no/python' cannot be run",)),
    # --- models whose parts do not fit (the table of models in cases/)
    "a tensor that is missing": (
        tensors(lambda weights: {name: value for name, value in weights.items() if name != "model.norm.weight"}),
        WRONG, ("lack 1 tensors of a LlamaForCausalLM, e.g. ['model.norm.weight']", "which would be random"),
    ),
    "tensors of other names": (
        tensors(lambda weights: {f"x.{name}": value for name, value in weights.items()}), WRONG, ("lack 21 tensors of a LlamaForCausalLM",),
    ),
    "more layers than the file has": (json_of_model("config.json", num_hidden_layers=3), WRONG, ("lack 9 tensors", "model.layers.2.")),
    "fewer layers than the file has": (
        json_of_model("config.json", num_hidden_layers=1), WRONG, ("have 9 tensors of layers that config.json does not describe", "model.layers.1."),
    ),
    "a tensor of another shape": (json_of_model("config.json", intermediate_size=96), WRONG, ("have other shapes", "down_proj.weight (64, 128), not (64, 96)")),
    "whole numbers for weights": (
        tensors(lambda weights: {name: value.char() for name, value in weights.items()}), WRONG, ("are I8, e.g. ", "must be floating-point"),
    ),
    "no positions": (json_of_model("config.json", max_position_embeddings=0), WRONG, ("max_position_embeddings is 0, and must be at least 1",)),
    "no end of a response": (no_eos, WRONG, ("has no EOS token",)),
    "an end beyond the vocabulary": (json_of_model("generation_config.json", eos_token_id=999), WRONG, ("eos_token_id is 999, and must be token ids below 320",)),
    "an end that is a word": (json_of_model("generation_config.json", eos_token_id="x"), WRONG, ("eos_token_id is 'x'",)),
    "an end in the config that is a word": (json_of_model("config.json", eos_token_id="x"), WRONG, ("config.json of", "eos_token_id is 'x'")),
    "an end in the config beyond the vocabulary": (json_of_model("config.json", eos_token_id=[1, 320]), WRONG, ("eos_token_id is [1, 320]",)),
    "more tokens than rows": (tokenizer_beyond, WRONG, ("has 321 tokens, the model's embedding 320 rows: ['newword']",)),
    "an activation nobody knows": (json_of_model("config.json", hidden_act="xilu"), WRONG, ("describes no model that can be built", "xilu")),
    "an encoder-decoder": (json_of_model("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True), WRONG, ("is an encoder-decoder",)),
    "an encoder": (json_of_model("config.json", model_type="bert", architectures=["BertForMaskedLM"]), WRONG, ("is a BertForMaskedLM, not a causal language model",)),
    "a classifier as policy": (json_of_model("config.json", architectures=["LlamaForSequenceClassification"]), WRONG, ("not a causal language model",)),
    "code of a model's own": (
        json_of_model("config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}), WRONG, ("brings Python code of its own", "'mine'"),
    ),
    "a type nobody knows": (json_of_model("config.json", model_type="mine"), WRONG, ("describes no model",)),
    "quantised weights": (json_of_model("config.json", quantization_config={"quant_method": "gptq"}), WRONG, ("has quantised weights (gptq)",)),
    "only an adapter": (only_an_adapter, WRONG, ("adapter_config.json: peft_type is None, and only LORA can be merged",)),
    "shards without an index": (shards_without_index, WRONG, ("has 2 weight files and no model.safetensors.index.json",)),
    "a Git LFS pointer": (
        model("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), WRONG, ("is a Git LFS pointer: fetch the file",),
    ),
    "a teacher with a layer too many": (other_model("models.teacher", num_hidden_layers=3), WRONG, ("/other lack 9 tensors",)),
    "a baseline with a layer too many": (other_model("tournament.baselines.x", num_hidden_layers=3), WRONG, ("/other lack 9 tensors",)),
    "a teacher that scores with a layer too many": (other_model("scorer.teacher_logp", num_hidden_layers=3), WRONG, ("/other lack 9 tensors",)),
    "a reward model without its head": (
        other_model("scorer.reward_model"), WRONG, ("lack 1 tensors of a LlamaForSequenceClassification, e.g. ['score.weight']", "it is no reward model"),
    ),
    "a hub id that is none": (setting("policy", {"hub_id": "no such name"}), WRONG, ("policy.hub_id", "owner/name", "'no such name'")),
    # --- stage specs
    "a spec that is not there": (stages_words("sample", "/no/spec.json"), WRONG, ("cannot read /no/spec.json: No such file",)),
    "a spec that is not JSON": (spec_text("{"), WRONG, ("spec.json is not valid JSON",)),
    "a spec that is a list": (spec_text("[]"), WRONG, ('spec.json must hold {"config": ..., "inputs": ...',)),
    "a spec without inputs": (spec(inputs=...), WRONG, ('must hold {"config": ..., "inputs": ...',)),
    "inputs that are a list": (spec(inputs=["a"]), WRONG, ('must hold {"config": ..., "inputs": ...',)),
    "an input that is a number": (spec(inputs={"policy": 3}), WRONG, ("an input must be a key in the store", "got 3")),
    "an input that nobody knows": (spec(inputs={"teacher": "0" * 16}), WRONG, ("no artifact in",)),
    "an input that is missing": (spec(), WRONG, ("the stage sample got no input prompts",)),
    "an input that is half a reference": (spec(inputs={"policy": {"kind": "checkpoint"}}), WRONG, ("an input cannot be used because of 3 problems:", "key: Field required")),
    "an input that is no model": (spec(inputs={"policy": "/etc"}), WRONG, ("/etc has no config.json",)),
    "settings that nobody knows": (spec(config={"temprature": 1}), WRONG, ("settings of the stage sample cannot be used", "temprature: unknown key")),
    "a store that is a number": (spec(store=3), WRONG, ('must hold {"config": ..., "inputs": ...',)),
    # --- generations, pairs, shards, records
    "a shard that is empty": (shard("generations", lambda path: path.write_bytes(b"")), DAMAGED, ("cannot be read as Parquet", "Delete it")),
    "a shard that is text": (shard("generations", lambda path: path.write_text("x" * 90)), DAMAGED, ("cannot be read as Parquet",)),
    "a shard that was cut": (
        shard("generations", lambda path: path.write_bytes(path.read_bytes()[:-9])), DAMAGED, ("part-00000.parquet cannot be read",),
    ),
    "a shard of another kind": (shard("scored_pairs", lambda path: None), BROKEN, ("do not fit the contract of scored_pairs",)),
    "no shard": (shard("generations", Path.unlink), DAMAGED, ("holds no part-*.parquet shard of generations",)),
    "a row without a column": (row("generations", seed=...), BROKEN, ("generations row 1: missing ['seed']",)),
    "a row with a column too many": (row("generations", mood="good"), BROKEN, ("generations row 1: unknown ['mood']",)),
    "a row with nothing where something must be": (row("generations", completion=None), BROKEN, ("row 1: column completion is empty",)),
    "tokens that are words": (row("generations", token_ids=["a"]), BROKEN, ("generations row 1, column token_ids: ",)),
    "a token too large for its column": (row("generations", token_ids=[2**40]), BROKEN, ("generations row 1, column token_ids: ",)),
    "no pairs": (pairs(none=True), BROKEN, ("weighted_pairs: no rows to train on",)),
    "a pair without tokens": (pairs(chosen_ids=[]), BROKEN, ("row 1 (pair_id q1/0-1): chosen_weights has 2 values for 0 tokens",)),
    "a pair with a weight too few": (pairs(rejected_weights=[1.0]), BROKEN, ("rejected_weights has 1 values for 2 tokens", "Rebuild")),
    "a weight that is not a number": (pairs(chosen_weights=[1.0, float("nan")]), BROKEN, ("chosen_weights holds NaN or infinity",)),
    "a reference pass that is missing": (pairs(chosen_reference_logps=None), BROKEN, ("chosen_reference_logps has 0 values",)),
    "an infinite log-probability": (pairs(rejected_reference_logps=[-1.0, float("-inf")]), BROKEN, ("holds NaN or infinity",)),
    "half a record": (record(RECORD_TEXT[:60]), DAMAGED, ("record.json is damaged", "set aside")),
    "a record of a file elsewhere": (record(RECORD_TEXT), DAMAGED, ("record.json is damaged",)),
    "a record of another artifact": (
        record(RECORD_TEXT.replace("0123456789abcdef", "f" * 16).replace("../../../", "")), DAMAGED, ("it is that of generations ffff",),
    ),
    "the model's code without a sandbox": (no_namespaces, WRONG, ("unshare (Operation not permitted)", "evaluation.runtime.sandbox: false")),
    # --- what a judge answers
    "a judge that refuses the key": (judge(b"bad key", status=401), WRONG, ("refuses the key (401): bad key",)),
    "a judge that knows no such model": (judge(b"nope", status=404), WRONG, ("knows no such model or address (404)",)),
    "a judge that speaks no JSON": (judge(b"<html>"), BROKEN, ("judge's answer was damaged",)),
    "a judge that answers a list": (judge(b"[]"), BROKEN, ("judge's answer was damaged",)),
    "a judge without choices": (judge(b'{"choices": []}'), BROKEN, ("judge's answer was damaged",)),
    "a judge with a choice of nothing": (judge(b'{"choices": [null]}'), BROKEN, ("''",)),
    "a judge that is overloaded": (judge(b"", status=503), LATER, ("judge answered 503", "What was answered is kept")),
    "a judge out of credit": (judge(b"no credit", status=402), LATER, ("wants to be paid (402): no credit",)),
    "a judge that finds it too long": (judge(b"8192 tokens", status=413), WRONG, ("(413): 8192 tokens",)),
}  # fmt: skip


def test_the_table_is_as_long_as_it_claims():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_refused_in_a_sentence(name, desk, capsys):
    spoil, code, parts = CASES[name]
    before = {path for path in desk.root.rglob("*") if path.parts[-1] not in ("run.yaml", "spec.json")}
    try:
        got = spoil(desk)
    except SystemExit as stopped:  # argparse
        got = stopped.code
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert got == code, said
    for part in parts:
        assert part in said
    assert "Traceback" not in said
    assert not desk.store.root.exists(), sorted(desk.store.root.rglob("*"))
    made = {path for path in desk.root.rglob("*") if path.name not in ("run.yaml", "spec.json")}
    made -= before | desk.spoilt
    assert not {path for path in made if path.parts[-2:] and "shards" not in path.parts and path.name != "outside.safetensors"} - {
        desk.model / "pytorch_model.bin", desk.model / "model.safetensors.index.json"
    }  # fmt: skip


def test_a_correct_request_is_not_refused(desk, monkeypatch):
    """Else the table above would prove nothing: the same desk, nothing spoilt, gets as far as the server."""
    monkeypatch.setattr(flows.preflight, "fit_to_model", lambda prepared, *_: prepared)
    with pytest.raises(AssertionError, match="got as far as"):
        desk.play()


def test_an_interrupted_command_does_not_say_that_it_is_done(desk, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(flows.cli.play, "play", interrupted)
    assert desk.play() == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
