"""README: "I want to add an engine", followed to the letter; and the same engine in another package.

Strategy: the row of README's table is read, a module is written as it says, and a real stage is built by the new engine.
"""

import importlib
from pathlib import Path

import pytest

from data_contracts.checkpoint import external_model
from data_contracts.config import parse
from data_contracts.errors import ConfigError
from stages.sampling.stage import SamplingConfig
from tasks.build import build
from tasks.execution import engines
from tasks.execution.config import ExecutionConfig

ROOT = Path(__file__).resolve().parents[2]
MY_ENGINE = '''"""Tasks - the engine of this test: processes of this machine, and a note of each."""

from tasks.launch import StageProcess


class MyEngine:
    def __init__(self, execution, store, log, inherit=()):
        self.log, self.inherit = log, inherit

    def start(self, work):
        self.log(f"my engine starts {work.name}")
        return MyHandle(work, self)


class MyHandle:
    def __init__(self, work, engine):
        self.process = StageProcess(
            work.arguments, log_file=work.log_file, log=engine.log, env=work.env, inherit=engine.inherit
        )

    def has_ended(self):
        return self.process.wait(0)

    def error(self):
        try:
            self.process.check()
        except Exception as error:
            return error

    def cancel(self):
        self.process.end()
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory on the path with the module in it."""
    (tmp_path / "my_engine.py").write_text(MY_ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_readme_says_how_and_the_new_engine_builds_what_any_other_builds(
    site, monkeypatch, store, tiny_model, make_prompts
):
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| engine |")]
    assert "a class with `start`" in row and "`ENGINES` in `tasks/execution/engines.py`" in row
    monkeypatch.setitem(engines.ENGINES, "mine", "my_engine:MyEngine")  # the one line
    config = SamplingConfig.model_validate(
        {"backend": {"name": "canned"}, "num_candidates": 2, "max_new_tokens": 6, "max_prompt_tokens": 64,
         "runtime": {"prompts_per_shard": 1, "device": "cpu"}}
    )  # fmt: skip
    inputs, lines = {"prompts": make_prompts(store, 3), "policy": external_model(tiny_model)}, []
    execution = parse(ExecutionConfig, {"profile": "mine", "workers": {"sample": 2}}, "execution")
    built = build("sample", config, inputs, store, lines.append, execution=execution)
    assert built.record.rows == 6
    short = built.ref.key[:8]
    started = [line for line in lines if line.startswith("my engine starts")]
    assert started == [f"my engine starts sample-{short}{worker}" for worker in ("-w0", "-w1", "")]


def test_an_engine_of_another_package_is_known_and_a_broken_one_costs_its_own_name(site):
    info = site / "my_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[selfplay.engines]\nmine = my_engine:MyEngine\nbroken = no_such_module:Engine\n"
    )
    importlib.invalidate_caches()
    assert engines.profiles()[-2:] == ["broken", "mine"]
    mine = parse(ExecutionConfig, {"profile": "mine"}, "execution")
    assert type(engines.executor_for(mine, None, print, [])).__name__ == "MyEngine"
    broken = parse(ExecutionConfig, {"profile": "broken"}, "execution")
    with pytest.raises(
        ConfigError, match=r"the engine 'broken' \(no_such_module:Engine\) does not load: ModuleNotFound"
    ):
        engines.executor_for(broken, None, print, [])
