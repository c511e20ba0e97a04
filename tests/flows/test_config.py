"""The settings of a run: composed from files and overrides, refused where they contradict each other, handed to the stages.

Strategy: one small run as a mapping; each test changes what it is about. No model, no prompt file is looked at here (see test_bad_input).
"""

import copy
import os
import re
from pathlib import Path

import pytest
import yaml

from data_contracts.config import parse
from data_contracts.errors import ConfigError
from flows.comparison import load_comparison
from flows.config import RunConfig, load_run, parse_assignment
from flows.preflight import _suite_with_digest, preflight
from stages.evaluation.lm_eval import check_suite
from stages.evaluation.stage import LMEvalSuite
from stages.evaluation.suites import check_data
from stages.methods import METHODS
from stages.stage import STAGES
from tasks.data.files import open_source

RUN = {
    "name": "tiny",
    "policy": {"path": "model"},
    "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
    "method": {"name": "sppo", "eta": 20},
    "scoring": {"scorer": {"name": "length"}},
    "evaluation": {"scorer": {"name": "length"}},
}


def run(**changes) -> RunConfig:
    """RUN with sections merged in; a `name` other than before replaces the whole plug-in."""
    data = copy.deepcopy(RUN)
    for section, values in changes.items():
        data[section] = data.get(section, {}) | values if isinstance(values, dict) and section != "method" else values
    return parse(RunConfig, data, "run.yaml")


def refused(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        run(**changes)
    return str(caught.value)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplign": {}}, "  samplign: unknown key; did you mean sampling?"),
        ({"sampling": {"temprature": 1}}, "  sampling.temprature: unknown key; did you mean temperature?"),
        (
            {"learning_rate": 1},
            "key; did you mean auxiliary.learning_rate or training.learning_rate or warm_start.learning_rate?",
        ),
        (
            {"scoring": {"scorer": {"name": "length", "target": 1}}},
            "scorer.target: unknown key; did you mean target_tokens?",
        ),
        (
            {"training": {"adapter": {"name": "lora", "rnk": 3}}},
            "training.adapter.rnk: unknown key; did you mean rank?",
        ),
        ({"prompts": {"train": {"path": "x", "colums": {}}}}, "colums: unknown key; did you mean columns?"),
        ({"reference": {"evry": 2}}, "reference.Every.evry: unknown key; did you mean every?"),
        ({"qqqq": 1}, "  qqqq: unknown key"),
        ({"sampling": {"runtime": {"shards": 1}}}, "  sampling.runtime.shards: unknown key"),
        (
            {"sampling": {"temperature": "hot"}},
            "  sampling.temperature: Input should be a valid number, unable to parse string as a number (got 'hot')",
        ),
        (
            {"sampling": {"num_candidates": 0}},
            "  sampling.num_candidates: Input should be greater than or equal to 1 (got 0)",
        ),
        ({"iterations": 2.5}, "  iterations: Input should be a valid integer"),
        ({"training": {"learning_rate": float("nan")}}, "  training.learning_rate: Input should be"),
        ({"training": {"dtype": "fp8"}}, "  training.dtype: Input should be 'bfloat16' or 'float32' (got 'fp8')"),
        ({"name": "My run"}, "  name: String should match pattern"),
        ({"policy": {"hub_id": "a/b"}}, "  policy: give exactly one of `path`"),
        ({"method": {"name": "spppo"}}, "  method: unknown method 'spppo'; known: "),
        ({"method": {"name": "spppo"}}, "Did you mean 'sppo'?"),
        ({"method": {"name": "sppo", "betta": 1}}, "  method.betta: unknown key; did you mean eta?"),
        ({"method": {"name": "sppo", "eta": -1}}, "  method.eta: Input should be greater than 0 (got -1)"),
        ({"method": {"eta": 1}}, '  method: must be a mapping with a "name"'),
        ({"method": 7}, '  method: must be a mapping with a "name"'),
        ({"scoring": {"scorer": {"name": "lenght"}}}, "Did you mean 'length'?"),
        ({"sampling": {"backend": {"name": "vlm"}}}, "Did you mean 'vllm'?"),
        (
            {"training": {"method": {"name": "dpo"}}},
            "training.method is set by the run's own `method`: remove it there",
        ),
        ({"training": {"seed": 1}}, "training.seed is set by the run's own `seed`"),
        ({"sampling": {"seed": 1}}, "sampling.seed is set by the run's own `seed`"),
        ({"sampling": {"num_candidates": 1}}, "need sampling.num_candidates >= 2"),
        ({"scoring": {"scorer": None}}, "pairing best_vs_worst needs scoring.scorer"),
        ({"method": {"name": "swift"}, "scoring": {"pairing": None}}, "needs models.teacher"),
    ],
)
def test_a_setting_that_is_wrong_is_named_by_its_path(changes, message):
    assert message in refused(**changes)


def test_every_problem_is_named_at_once():
    lines = refused(samplign={}, iterations="many", name="X").splitlines()
    assert lines[0] == "run.yaml cannot be used because of 3 problems:" and len(lines) == 4


# --- what the stages get


def test_a_bare_name_is_a_plug_in_with_its_defaults():
    assert run(method="dpo").method == run(method={"name": "dpo"}).method


def test_the_seed_and_the_method_of_the_run_reach_its_stages():
    config = run(seed=7)
    assert config.sampling_for_training().seed == config.sampling_for_heldout().seed == config.training_for(0).seed == 7
    assert config.training_for(0).method.eta == 20
    assert run(method="dpo").scoring_for_pairs().pairing == "best_vs_worst"
    assert run(method="spin").scoring_for_pairs().pairing == "truth_vs_generation"


def test_heldout_answers_are_one_per_prompt_unless_said_otherwise():
    assert run().sampling_for_heldout().num_candidates == 1
    assert run(sampling={"temperature": 0.7}).sampling_for_heldout().temperature == 0.7
    other = run(heldout_sampling={"num_candidates": 4, "temperature": 0.0}).sampling_for_heldout()
    assert (other.num_candidates, other.temperature) == (4, 0.0)


def test_runtime_settings_change_no_key_of_any_stage():
    one = run()
    other = run(
        sampling={"runtime": {"prompts_per_shard": 7, "python": "/other/python"}}, scoring={"runtime": {"prompts_per_shard": 7}},
        weighting={"runtime": {"pairs_per_shard": 7}}, training={"runtime": {"zero_stage": 2, "num_processes": 4, "batch_tokens": 9}},
        evaluation={"runtime": {"batch_tokens": 9}},
    )  # fmt: skip

    def keys(config):
        parts = {
            "sample": config.sampling_for_training(),
            "score": config.scoring_for_pairs(),
            "weigh": config.weighting_for_pairs(),
        }
        parts |= {"train": config.training_for(0), "evaluate": config.evaluation}
        return {name: STAGES[name].key(part, {}) for name, part in parts.items()}

    assert keys(one) == keys(other)
    assert keys(one)["train"] != keys(run(training={"learning_rate": 1e-3}))["train"]
    assert keys(one)["train"] != keys(run(method={"name": "sppo", "eta": 21}))["train"]


def test_rates_may_differ_by_iteration_and_the_last_one_goes_on():
    config = run(learning_rates=[1e-5, 1e-6])
    assert [config.training_for(iteration).learning_rate for iteration in range(3)] == [1e-5, 1e-6, 1e-6]
    assert run(training={"learning_rate": 3e-6}).training_for(5).learning_rate == 3e-6


def test_the_settings_survive_as_json():
    config = run(
        method={"name": "dpo", "beta": 0.3},
        sampling={"backend": {"name": "transformers", "runtime": {"batch_size": 3}}},
    )
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again == config and again.sampling.backend.runtime.batch_size == 3


# --- files and overrides


@pytest.fixture
def files(tmp_path):
    """files(name=mapping, ...) writes NAME.yaml each and returns the directory."""

    def write(**contents):
        for name, data in contents.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rate=1.0e-6", ("training.learning_rate", 1e-6)),
        ("iterations=2", ("iterations", 2)),
        ("method={name: dpo, beta: 0.2}", ("method", {"name": "dpo", "beta": 0.2})),
        ("name=a=b", ("name", "a=b")),
        ("prompts.reuse=true", ("prompts.reuse", True)),
        ("heldout_sampling=null", ("heldout_sampling", None)),
    ],
)
def test_an_override_is_read_as_yaml(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["iterations", "=2", ""])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"an override looks like section\.field=value, got "):
        parse_assignment(text)


def test_an_override_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse_assignment("method={name: dpo")


def test_a_rate_may_be_written_without_a_point(files):
    # YAML 1.1 reads 1e-6 as text; a number is what everybody means.
    directory = files(run=RUN | {"training": {"learning_rate": "1e-6"}})
    assert load_run(directory / "run.yaml").training.learning_rate == 1e-6
    assert (
        load_run(directory / "run.yaml", dict([parse_assignment("training.learning_rate=2e-6")])).training.learning_rate
        == 2e-6
    )


def test_overrides_reach_into_sections_that_the_file_does_not_have(files):
    config = load_run(
        files(run=RUN) / "run.yaml", {"training.runtime.zero_stage": 2, "iterations": 5, "method.eta": 30}
    )
    assert (config.training.runtime.zero_stage, config.iterations, config.method.eta) == (2, 5, 30)


def test_an_override_through_something_that_is_no_section_is_refused(files):
    with pytest.raises(ConfigError, match="the override 'name.x' goes through 'name', which is not a section"):
        load_run(files(run=RUN) / "run.yaml", {"name.x": 1})


def test_a_file_says_only_in_what_it_differs_from_those_it_extends(files):
    directory = files(
        base=RUN | {"sampling": {"temperature": 0.5, "runtime": {"prompts_per_shard": 3}}},
        small={"iterations": 1, "sampling": {"runtime": {"device": "cpu"}}},
        mine={"extends": ["base.yaml", "small.yaml"], "name": "mine", "method": {"name": "dpo"}},
    )
    config = load_run(directory / "mine.yaml")
    assert (config.name, config.iterations, config.sampling.temperature) == ("mine", 1, 0.5)
    assert (config.sampling.runtime.prompts_per_shard, config.sampling.runtime.device) == (3, "cpu")
    assert config.method.name == "dpo"  # of another name: SPPO's eta does not linger


def test_a_file_that_extends_itself_is_refused(files):
    directory = files(one={"extends": "two.yaml"}, two={"extends": "one.yaml"})
    with pytest.raises(ConfigError, match="extends itself"):
        load_run(directory / "one.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not valid YAML"), ("- a", "must hold a mapping of settings, got list"), ("", "must hold a mapping")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml {message}"):
        load_run(tmp_path / "run.yaml")


@pytest.mark.parametrize("extends", [7, [7], {"a": 1}, None])
def test_what_a_file_extends_must_be_the_name_of_one(files, extends):
    with pytest.raises(ConfigError, match="run.yaml"):
        load_run(files(run={"extends": extends}) / "run.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text"):
        load_run(tmp_path / "run.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the run config .*none\.yaml: No such file"):
        load_run(tmp_path / "none.yaml")


def test_auxiliary_models_are_trained_by_dpo_unless_their_section_says_otherwise():
    """The default of a training section is SPPO: a section that only sets a learning rate must not change the method."""
    plain = load_run("deploy/runs/tiny/tis_dpo_d.yaml", {"auxiliary": {"learning_rate": 0.5}})
    assert plain.auxiliary_training().method.name == "dpo" and plain.auxiliary_training().learning_rate == 0.5
    other = load_run("deploy/runs/tiny/tis_dpo_d.yaml", {"auxiliary": {"method": {"name": "simpo"}}})
    assert other.auxiliary_training().method.name == "simpo"


@pytest.mark.parametrize("order", [1, -1])
def test_another_name_takes_the_settings_of_the_plug_in_before_away(order):
    """As the README has it: --set method.name=dpo --set method.beta=0.1 on a config whose method has an eta."""
    overrides = dict(list({"method.name": "dpo", "method.beta": 0.3, "name": "mine"}.items())[::order])
    run = load_run("deploy/runs/quickstart.yaml", overrides)
    assert run.method.name == "dpo" and run.method.beta == 0.3 and run.name == "mine"
    assert load_run("deploy/runs/quickstart.yaml", {"method.name": "sppo"}).method.eta == 20  # the same name keeps them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"learning_rates": [1e-4, 0]}, "learning_rates.1: Input should be greater than 0"),
        ({"learning_rates": [-1e-4]}, "learning_rates.0: Input should be greater than 0"),
        ({"training": {"epochs": 10**9}}, "training.epochs: Input should be less than or equal to 10000"),
        ({"training": {"epochs": 2, "schedule_epochs": 1}}, "schedule_epochs is 1 and training.epochs 2: the schedule"),
        ({"tournament": {"scorer": "length", "baselines": {"a/b": {"path": "/m"}}}}, "'a/b' names files of the run"),
        (
            {"evaluation": {"scorer": {"name": "llm_judge", "model": "m", "samples": 5}}},
            "samples is 5 and temperature 0: every judgement would be the same",
        ),
    ],
)
def test_a_number_that_no_run_can_use_is_refused_at_once(make_run, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(make_run("refused", **settings))


def test_more_ranks_than_processors_are_refused_where_training_runs_on_them(make_run, store):
    run = load_run(make_run("ranks", training={"runtime": {"num_processes": 1000, "device": "cpu"}}))
    with pytest.raises(ConfigError, match=r"num_processes is 1000, and this machine has \d+ processors"):
        preflight(run, store)


@pytest.mark.parametrize("name", ["A=B", "", "A\0"])
@pytest.mark.parametrize("section", ["sampling.runtime", "execution"])
def test_a_name_that_no_environment_can_hold_is_refused(make_run, section, name):
    with pytest.raises(ConfigError, match="cannot be an environment variable"):
        load_run(make_run("variables"), {f"{section}.env": {name: "x"}})


def test_a_config_that_comes_through_a_pipe_is_read_once(make_run):
    path = make_run("piped")
    for _ in range(2):  # each pipe may have the number of the one before
        reader, writer = os.pipe()
        os.write(writer, path.read_bytes())
        os.close(writer)
        runs = [load_run(f"/dev/fd/{reader}") for _ in range(2)]
        os.close(reader)
        assert runs == [load_run(path)] * 2
    with pytest.raises(ConfigError, match="/dev/zero does not end within 16 MiB"):
        load_run("/dev/zero")


def test_a_suite_whose_questions_are_nowhere_is_refused(make_run, store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "mirror" / "ai2_arc").mkdir(parents=True)
    suite = {"name": "open_llm_v1", "only": ["arc_challenge", "gsm8k"]}
    missing = r"the suite open_llm_v1 reads data sets that are not here: openai/gsm8k \(gsm8k\)"
    scorer = {"name": "length", "target_tokens": 8}
    evaluation = {"scorer": scorer, "suites": [suite | {"data_root": str(tmp_path / "mirror")}]}
    with pytest.raises(ConfigError, match=missing + "; clone them there"):
        preflight(load_run(make_run("suite", evaluation=evaluation)), store)
    with pytest.raises(ConfigError, match=r"allenai/ai2_arc .*set data_root to a directory of clones"):
        preflight(load_run(make_run("suite", evaluation={"scorer": scorer, "suites": [suite]})), store)
    clone = tmp_path / "mirror" / "ai2_arc" / "test.jsonl"
    digests = []
    for text in ("a", "b", "a"):  # what a suite reads of data_root is part of the key
        clone.write_text(text)
        settings = LMEvalSuite(name="open_llm_v1", only=("arc_challenge",), data_root=str(tmp_path / "mirror"))
        digests.append(_suite_with_digest(settings).digest)
    assert digests[0] == digests[2] != digests[1]
    assert _suite_with_digest(settings.model_copy(update={"digest": "mine"})).digest == "mine"
    members = check_suite("open_llm_v1", ["arc_challenge", "gsm8k"])
    check_data("open_llm_v1", members, None, {"HF_HUB_OFFLINE": "0"})
    for name in ("hub/datasets--allenai--ai2_arc", "datasets/openai___gsm8k"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    check_data("open_llm_v1", members, None, os.environ)


# --- paths


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A directory with a config and data, and another one that commands are typed in."""
    for name in ("runs/data/train.jsonl", "runs/model/config.json", "here/data/heldout.jsonl", "here/data/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    prompts = {"train": "data/train.jsonl", "heldout": "data/heldout.jsonl"}
    config = {**RUN, "prompts": prompts, "models": {"teacher": {"path": "no/such"}}}
    (tmp_path / "runs" / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "runs"


def test_a_path_in_a_config_is_looked_for_beside_it_then_where_the_command_is_typed(beside):
    settings = load_run(beside / "run.yaml")
    assert settings.prompts.train.path == str(beside / "data" / "train.jsonl")  # there is one in both places
    assert settings.policy.path == str(beside / "model")
    assert settings.prompts.heldout.path == "data/heldout.jsonl"
    assert settings.models.teacher.path == "no/such"
    assert load_run("../runs/run.yaml").prompts.train == settings.prompts.train


def test_a_template_in_a_config_is_looked_for_beside_it_then_where_the_command_is_typed(beside):
    (beside / "mine.jinja").write_text("beside {{ messages[0].content }}")
    for name in ("mine", "other"):
        Path(f"{name}.jinja").write_text("typed {{ messages[0].content }}")
    for name, expected in (("mine", "beside"), ("other", "typed")):
        sampling = {"template": {"file": f"{name}.jinja"}}
        (beside / "own.yaml").write_text(yaml.safe_dump({"extends": "run.yaml", "sampling": sampling}))
        assert load_run(beside / "own.yaml").sampling.template.jinja.split()[0] == expected
    typed = load_run(beside / "own.yaml", {"sampling.template": {"file": "mine.jinja"}})
    assert typed.sampling.template.jinja.split()[0] == "typed"


def test_a_path_that_is_typed_is_meant_where_it_is_typed(beside):
    overrides = {"prompts.train": "data/train.jsonl", "policy.path": "model"}
    settings = load_run(beside / "run.yaml", overrides)
    assert (settings.prompts.train.path, settings.policy.path) == ("data/train.jsonl", "model")


def test_globs_mixes_and_extended_files_are_looked_for_beside_their_own_file(beside, tmp_path):
    mix = {"mix": [{"source": "data/*.jsonl"}, {"source": {"path": "data/train.jsonl", "limit": 3}}]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"extends": "runs/run.yaml", "prompts": {"train": mix}}))
    settings = load_run(tmp_path / "other.yaml")
    assert [share.source.path for share in settings.prompts.train.mix] == ["data/*.jsonl", "data/train.jsonl"]
    assert settings.policy.path == str(beside / "model")
    (beside / "mix.yaml").write_text(yaml.safe_dump({"extends": "run.yaml", "prompts": {"train": mix}}))
    shares = load_run(beside / "mix.yaml").prompts.train.mix
    assert [share.source.path for share in shares] == [f"{beside}/data/*.jsonl", f"{beside}/data/train.jsonl"]


def test_the_paths_of_the_presets_are_those_of_the_checkout():
    settings = load_run("deploy/runs/quickstart.yaml")
    assert settings.prompts.train.path == "deploy/prompts/quickstart_train.jsonl"
    assert settings.policy.path == "models/smollm2-135m-instruct"


def test_what_comes_with_the_pipeline_is_found_from_any_directory_behind_files_of_ones_own(beside):
    preset = "deploy/runs/tiny/sppo.yaml"
    assert load_run(preset).prompts.train.path == "deploy/prompts/tiny.jsonl"
    assert load_comparison("deploy/runs/compare/sppo_k.yaml").config.name == "sppo-k"
    (beside / "mine.yaml").write_text(yaml.safe_dump({"extends": preset, "iterations": 5}))
    assert load_run(beside / "mine.yaml").iterations == 5
    opened, _ = open_source(load_run(preset).prompts.train)
    assert len(opened) == 1
    Path(preset).parent.mkdir(parents=True)
    Path(preset).write_text(yaml.safe_dump({**RUN, "name": "own"}))
    assert load_run(preset).name == "own"
    with pytest.raises(ConfigError, match=r"deploy/runs/no\.yaml: No such file .*; `selfplay presets` lists"):
        load_run("deploy/runs/no.yaml")


# --- prompts


def test_a_path_is_short_for_a_source_and_what_stands_beside_it_counts_for_sources_that_say_nothing():
    columns = {"prompt": "question"}
    prompts = run(prompts={"columns": columns, "limit": 9}).prompts
    assert (prompts.train.path, prompts.train.columns) == ("train.jsonl", {})
    assert (prompts.train_source.columns, prompts.train_source.limit) == (columns, 9)
    assert (prompts.heldout_source.columns, prompts.heldout_source.limit) == (columns, None)
    own = {"path": "train.jsonl", "columns": {"prompt": "text"}, "limit": 3}
    mixed = run(prompts={"columns": columns, "train": {"mix": [{"source": own}, {"source": "b"}], "limit": 5}}).prompts
    parts = [share.source for share in mixed.train_source.mix]
    assert [(part.columns, part.limit) for part in parts] == [({"prompt": "text"}, 3), (columns, None)]
    assert mixed.train_source.limit == 5


def test_a_number_holds_out_a_part_of_the_training_prompts():
    assert run(prompts={"heldout": 0.05}).prompts.heldout_source is None
    for wrong in (0, 1, 5, -0.1):
        assert "prompts.heldout" in refused(prompts={"heldout": wrong})


# --- methods and pairings

PAIRS = ("best_vs_worst", "random_pair", "length_matched", "all_pairs", "truth_vs_generation", "given")
SINGLES = ("each", "truth", "given_each")


def reads_of(changes: dict) -> str:
    """What such a run reads of its prompts; "" if it is refused."""
    try:
        return run(**changes).reads
    except ConfigError:
        return ""


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("pairing", [*PAIRS, *SINGLES])
def test_no_side_of_a_row_is_left_unread(method, pairing):
    """A method of pairs takes pairs only, one of single answers takes single answers only; KTO takes pairs apart."""
    teacher = {"path": "teacher"}
    changes = {
        "method": {"name": method},
        "scoring": {"pairing": pairing, "scorer": {"name": "length"}},
        "models": {"teacher": teacher},
    }
    is_single = METHODS.get(method).sides(METHODS.config(method)) == ("chosen",)
    if pairing == "given_each":
        assert (method == "kto") == (reads_of(changes) == "answers")
    elif method == "kto" and pairing == "given":
        assert run(**changes).scoring_for_pairs().pairing == "given_each" and run(**changes).reads == "answers"
    elif is_single == (pairing in SINGLES):
        assert run(**changes).pairing == pairing
    else:
        assert "pairing" in refused(**changes)


def test_generations_without_scores_are_for_methods_that_read_none():
    def paired(method: str) -> dict:
        teacher = {"path": "teacher"}
        return {"method": {"name": method}, "scoring": {"pairing": "generations"}, "models": {"teacher": teacher}}

    assert run(**paired("opd")).pairing == run(**paired("kd")).pairing == "generations"
    assert run(method="opd", scoring={}, models={"teacher": {"path": "t"}}).pairing == "generations"
    assert "needs models.teacher" in refused(method="opd", scoring={})
    for method, number in (("grpo", "advantage"), ("kto", "win_rates")):
        assert f"reads the {number} of generations, and pairing generations scores none" in refused(**paired(method))
    assert "trains on pairs" in refused(**paired("dpo"))


def test_a_reference_or_a_history_that_nothing_reads_is_refused():
    assert run(method="inpo").reference_rule == "start" and run(method="dpo").reference_rule == "iterate"
    assert run(method="dpo", reference={"every": 3}).reference_rule.every == 3
    assert run(reference={"path": "models/start"}).reference_rule.path == "models/start"
    assert "simpo compares with no reference" in refused(method="simpo", reference="start")
    assert "every" in refused(reference={"every": 0}) and "reference" in refused(reference="previous")
    assert run(method="mnpo").opponents == (0.5, 0.5) and run(method="mnpo", history=1).opponents == (1.0,)
    weighted = {"name": "mnpo", "lambdas": [3, 1, 0]}
    assert run(method=weighted, history=3).weighting_for_pairs().history == (0.75, 0.25, 0.0)
    assert "has 3 weights and `history` is 2" in refused(method=weighted)
    assert "the first one > 0" in refused(method={"name": "mnpo", "lambdas": [0, 1]})
    assert "dpo compares with one policy, and `history` is 2" in refused(method="dpo", history=2)
    assert "history" in refused(method="mnpo", history=9)


def test_a_history_is_in_the_key_only_where_there_is_one():
    alone, mixed = run(method={"name": "mnpo"}, history=1), run(method={"name": "mnpo"}, history=2)
    assert "history" not in alone.weighting_for_pairs().identity()
    assert mixed.weighting_for_pairs().identity()["history"] == [0.5, 0.5]
    as_before = {"version", "hybrid", "alpha", "beta"}
    assert not as_before & METHODS.config("tidpo").identity().keys() - {"beta"}
    assert not as_before & METHODS.config("kd").identity().keys()
    assert METHODS.config({"name": "tidpo", "version": "v3"}).identity()["version"] == "v3"


def test_what_a_run_reads_of_its_prompts():
    def reads(method: str, pairing: str, **prompts) -> str:
        scoring = {"pairing": pairing, "scorer": {"name": "length"}}
        return run(method={"name": method}, scoring=scoring, prompts=prompts).reads

    assert reads("dpo", "best_vs_worst") == "prompts"
    assert reads("dpo", "given") == "pair"
    assert reads("spin", "truth_vs_generation") == reads("sft", "truth") == "response"
    assert run(method={"name": "spin"}, scoring={"pairing": "truth_vs_generation"}, models={"teacher": {"path": "t"}},
               prompts={"answers_from_teacher": True}).reads == "prompts"  # fmt: skip


@pytest.mark.parametrize(("method", "packing"), [("dpo", True), ("sppo", True), ("tdpo", False), ("tidpo", False)])
def test_the_reference_is_computed_in_the_layout_that_trains(method, packing):
    for is_on in (True, False):
        config = run(method={"name": method}, training={"runtime": {"packing": is_on}})
        weighting = config.weighting_for_pairs()
        assert weighting.runtime.packing == (packing and is_on)
        assert weighting.identity() == run(method={"name": method}).weighting_for_pairs().identity()


SWIFT = "deploy/runs/swift.yaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_start": {"method": "dpo"}}, "warm_start.method: dpo trains on pairs; a warm start trains on one given"),
        ({"warm_start": {"method": "kd"}}, "kd needs policy_logits, teacher_logits"),
        ({"warm_start": {"epoch": 2}}, "unknown key; did you mean epochs"),
        (
            {"warm_start": {}, "method": "dpo", "scoring.pairing": "given"},
            "pairing given reads `chosen` and `rejected`",
        ),
        ({"warm_start": {}, "weighting.positive_system": "Be good."}, "which warm_start trains: train it in a run"),
    ],
    ids=str,
)
def test_a_warm_start_that_could_not_be_trained_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_run(SWIFT, settings)


def test_a_warm_start_is_an_sft_run_on_the_hardware_of_the_run():
    run = load_run(SWIFT, {"warm_start": {"epochs": 3, "batch_size": 16}, "seed": 5})
    warm = run.warm_start_run()
    training = warm.training_for(0)
    assert (training.method.name, training.learning_rate, training.epochs, training.seed) == ("sft", 2e-5, 3, 5)
    assert (training.batch_size, training.optimizer, training.runtime) == (16, "adamw", run.training.runtime)
    assert warm.scoring_for_pairs().pairing == "truth" and warm.scoring_for_pairs().max_total_tokens == 2048
    assert warm.scoring_for_pairs().template == run.sampling.template
    assert warm.weighting_for_pairs().weights.name == "ones" and not warm.weighting_for_pairs().reference
    assert run.reads == "response" and load_run(SWIFT, {"warm_start": {}, "method": "opd"}).reads == "response"
    lora = {
        "warm_start": {},
        "training.adapter": {"name": "lora", "save_merged": False},
        "training.runtime.zero_stage": 0,
    }
    adapter = load_run(SWIFT, lora).warm_start_run().training_for(0).adapter
    assert adapter.save_merged and not adapter.goes_on, "self-play's own adapter starts on a whole model"
