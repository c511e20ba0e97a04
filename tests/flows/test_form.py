"""The run form: the schema that Prefect shows and checks by, and what comes of its answers.

Strategy: Prefect's own validation of the schemas, as its server calls it; the flows are called as functions, with
the run itself replaced by a look at its settings. A real server is asked in test_deployment.py.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.schema_tools import validate
from prefect.utilities.schema_tools.validation import ValidationError

from flows import presets
from flows.config import RunConfig, load_run
from flows.form import changes, form_values
from stages.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = {item["name"]: item for item in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


@cache
def flow_of(name: str) -> Any:
    return getattr(presets, name)


def schema_of(flow: Any) -> dict[str, Any]:
    return flow.parameters.model_dump_for_openapi()


def refuse_as_the_server_does(flow: Any, parameters: dict[str, Any]) -> None:
    """Raises: ValidationError. Only the schema of what is given is read: the whole one takes half a second."""
    schema = schema_of(flow)
    properties = {name: schema["properties"][name] for name in parameters}
    validate(parameters, schema | {"properties": properties}, raise_on_error=True)


def defaults_of(flow: Any) -> dict[str, Any]:
    return {name: field["default"] for name, field in schema_of(flow)["properties"].items() if "default" in field}


@pytest.fixture
def settings_of(monkeypatch):
    """settings_of(flow, **parameters) -> the RunConfig that would be played."""

    def settings(flow: Any, **parameters: Any) -> RunConfig:
        played = []
        assert validate(parameters, schema_of(flow)) == []
        monkeypatch.setattr(presets, "run_self_play", lambda config, store: played.append(config))
        flow.fn(**parameters)
        return played[0]

    return settings


@pytest.fixture(scope="module")
def quickstart():
    return flow_of("quickstart")


@pytest.mark.parametrize("name", [name for name in DEPLOYMENTS if name != "own"])
def test_every_deployments_form_shows_its_own_values_and_sending_it_back_changes_nothing(name, settings_of):
    file, _, attribute = DEPLOYMENTS[name]["entrypoint"].partition(":")
    assert file == "flows/presets.py"
    flow = flow_of(attribute)
    path = next(path for path in presets.RUNS.glob("*.yaml") if re.sub(r"[-.]", "_", path.stem) == attribute)
    preset = load_run(path, {"iterations": 1} if flow.name == "train-once" else {})
    shown = defaults_of(flow)
    assert {field: shown[field] for field in form_values(preset)} == form_values(preset)
    assert settings_of(flow, **shown) == settings_of(flow) == preset


def test_one_changed_field_replaces_itself_alone(quickstart, settings_of):
    preset = load_run("deploy/runs/quickstart.yaml")
    shown = defaults_of(quickstart)
    whole = shown["sampling"] | {"temperature": 0.33}
    for section in (whole, {"temperature": 0.33}):
        run = settings_of(quickstart, sampling=section)
        assert run.sampling == preset.sampling.model_copy(update={"temperature": 0.33})
        assert run.sampling.max_new_tokens == 40  # the file's, not the class's 512
        assert run.model_copy(update={"sampling": preset.sampling}) == preset
    assert settings_of(quickstart, method={"eta": 5.0}).method == preset.method.model_copy(update={"eta": 5.0})
    assert settings_of(quickstart, seed=7, overrides={"seed": 8}).seed == 8


def test_another_method_takes_its_own_defaults(quickstart, settings_of):
    assert settings_of(quickstart, method={"name": "dpo", "beta": 0.2}).method == METHODS.config(
        {"name": "dpo", "beta": 0.2}
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": {"name": "dop"}}, "field 'method'.*not valid under any of"),
        ({"method": {"name": "dpo", "betta": 1}}, "not valid under any of"),
        ({"sampling": {"temprature": 1}}, "'temprature' was unexpected"),
        ({"sampling": {"temperature": -1}}, "-1 is less than the minimum of 0"),
        ({"training": {"method": {"name": "dpo"}}}, "'method' was unexpected"),
        ({"seed": "many"}, "'many' is not of type 'integer'"),
        ({"name": "Bad Name"}, "does not match"),
        ({"evaluation": {"scorer": {"name": "lenght"}}}, "field 'evaluation.scorer'.*not valid under any of"),
        ({"execution": {"profile": "slrum"}}, "'slrum' is not one of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["quickstart", "own"])
def test_a_wrong_value_does_not_pass_the_servers_check(name, parameters, message):
    config = {"config": "my.yaml"} if name == "own" else {}
    refuse_as_the_server_does(flow_of(name), config)
    with pytest.raises(ValidationError, match=message if name == "quickstart" else None):
        refuse_as_the_server_does(flow_of(name), config | parameters)


def test_a_method_is_a_choice_of_all_methods_and_the_presets_own_comes_first(quickstart):
    """The form opens the option that has most names in common with the value, and of several the first."""
    for name, flow in (("sppo", quickstart), ("swift", flow_of("swift"))):
        options = schema_of(flow)["properties"]["method"]["anyOf"]
        assert options[0]["title"] == name and sorted(option["title"] for option in options) == METHODS.names()
    dpo = next(option for option in options if option["title"] == "dpo")
    assert dpo["properties"]["name"] == {"const": "dpo", "default": "dpo", "title": "name", "type": "string"}
    assert dpo["properties"]["beta"]["default"] == 0.1 and dpo["additionalProperties"] is False


def test_a_file_of_ones_own_is_changed_field_by_field(tmp_path, settings_of):
    """Its form has no defaults: they would replace what the file says."""
    file = tmp_path / "mine.yaml"
    written = yaml.safe_load((ROOT / "deploy/runs/quickstart.yaml").read_text()) | {"method": "sppo", "name": "mine"}
    file.write_text(yaml.safe_dump(written))
    sampling = schema_of(flow_of("own"))["properties"]["sampling"]["anyOf"][1]["properties"]
    assert "default" not in sampling["max_new_tokens"]
    run = settings_of(
        flow_of("own"), config=str(file), sampling={"temperature": 0.33}, method={"name": "sppo", "eta": 5}
    )
    assert (run.sampling.temperature, run.sampling.max_new_tokens, run.method.eta) == (0.33, 40, 5)
    with pytest.raises(ValidationError, match="'config' is a required property"):
        refuse_as_the_server_does(flow_of("own"), {"seed": 1})


def test_what_was_set_to_nothing_is_a_change():
    assert changes({"tournament": None}, {"tournament": {"scorer": {"name": "length"}}}) == {"tournament": None}
    assert changes({"gate": {"enabled": True}}, {"gate": None}) == {"gate": {"enabled": True}}
    assert changes({"list": [1, 2]}, {"list": [1]}) == {"list": [1, 2]}


def test_a_name_without_a_run_config_is_not_a_preset():
    with pytest.raises(AttributeError, match="no run config in .*deploy/runs is called quickstrat"):
        _ = presets.quickstrat
