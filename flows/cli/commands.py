"""selfplay: the command line. Every command imports what it needs when it runs, so that --help answers at once.

The file is long (over 350 lines) because it is one function per command, which says its options and hands over.
Exit codes: 0 done, 2 the request is wrong and nothing was written, 130 interrupted, else see data_contracts/errors.py.
"""

from __future__ import annotations

import sys
from gc import freeze, set_threshold
from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = "interrupted; run the same command again to resume"
ENGINE_PACKAGES = frozenset(
    {"torch", "transformers", "vllm", "deepspeed", "accelerate", "peft", "datasets", "lm_eval", "gguf"}
)
"""What an install without an extra (`cpu`, `gpu`) leaves out."""

app = typer.Typer(
    name="selfplay",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Let a language model improve by playing against itself: sample, score, weigh, train, evaluate, again.",
)

STORE = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store")
]
SET = Annotated[
    list[str] | None, typer.Option("--set", metavar="section.field=value", help="override one setting; repeatable")
]
RUN_FILE = Annotated[str, typer.Argument(metavar="RUN.yaml", help="run config, e.g. deploy/runs/quickstart.yaml")]
RUN_NAME = Annotated[str, typer.Argument(metavar="RUN", help="name of a run in the store, or a run config")]
KEY = Annotated[str, typer.Argument(help="a key, the start of one, or kind/key")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from flows.cli.version import version

        print(version())
        raise typer.Exit


@app.callback()
def selfplay(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="version and commit")
    ] = False,
) -> None:
    pass


@app.command()
def run(config: RUN_FILE, set: SET = None, store: STORE = None) -> None:
    """One self-play run, here and now.

    Run it again after anything - a finish, a kill, a power cut - and it goes on.
    """
    from flows.cli.play import play

    play(config, _overrides(set), store)


@app.command()
def resume(name: RUN_NAME, set: SET = None, store: STORE = None) -> None:
    """Go on with a run by its name.

    With the settings it was started with last, as runs/NAME/run.json keeps them.
    """
    from flows.cli.play import play

    play(str(_settings_of(name, store)), _overrides(set), store)


@app.command()
def compare(
    config: Annotated[str, typer.Argument(metavar="COMPARISON.yaml", help="e.g. deploy/runs/compare/table3.yaml")],
    set: SET = None,
    store: STORE = None,
    size: Annotated[str | None, typer.Option(help="one of the comparison's `sizes`, e.g. gpu")] = None,
) -> None:
    """Several methods or seeds on shared artifacts.

    One table, with intervals; what does not depend on the method is built once.
    """
    from flows.cli.play import play_comparison

    play_comparison(config, _overrides(set), store, size)


@app.command()
def estimate(
    config: RUN_FILE,
    set: SET = None,
    store: STORE = None,
    price: Annotated[float | None, typer.Option(help="money per hour of this machine")] = None,
    calibrate: Annotated[
        bool, typer.Option(help="measure on this machine what the store's records do not tell")
    ] = True,
) -> None:
    """What a run will cost, before it is started.

    Seconds, tokens, FLOPs, memory, disk and money per stage. What is built already costs nothing.
    """
    from data_contracts.store import Store
    from flows.config import load_run
    from flows.forecast.estimate import estimate as predict
    from flows.forecast.estimate import show

    print(
        show(predict(load_run(config, _overrides(set)), Store(store), price_per_hour=price, use_calibration=calibrate))
    )


@app.command()
def plan(config: RUN_FILE, set: SET = None) -> None:
    """What will run where, and whether it fits.

    Memory per stage and rank, on paper; what cannot fit is refused with the settings that help.
    """
    _hand_over("flows.forecast.plan", [config, *(word for text in set or [] for word in ("--set", text))], None)


@app.command()
def status(name: RUN_NAME, set: SET = None, store: STORE = None) -> None:
    """What of a run is built, and what is to come."""
    from data_contracts.store import Store
    from flows.cli.status import status as look
    from flows.config import load_run

    print(look(load_run(_settings_of(name, store), _overrides(set)), Store(store)))


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="names of runs in the store, or run configs")],
    compare: Annotated[bool, typer.Option("--compare", help="lay these runs over each other in one more page")] = False,
    store: STORE = None,
) -> None:
    """Write the report of a run, or of several, again, from their artifacts."""
    from data_contracts.store import Store
    from flows.cli.status import report_again, report_over_each_other
    from flows.config import load_run

    configs = [load_run(_settings_of(name, store)) for name in names]
    if compare:
        print(report_over_each_other(configs, Store(store)))
        return
    for config in configs:
        print(report_again(config, Store(store)))


@app.command()
def chat(
    name: RUN_NAME,
    iteration: Annotated[int | None, typer.Option(min=1, help="whose model; default: the last one's")] = None,
    store: STORE = None,
) -> None:
    """Talk to a trained model, the start model's answers beside its own.

    Asked as the run asks for held-out answers. Prompts are typed, or come from a pipe, one per line.
    """
    import stages.__main__  # noqa: F401 - sets the environment of a stage, before torch is imported
    from data_contracts.store import Store
    from flows.cli.chat import chat as talk
    from flows.config import load_run

    talk(load_run(_settings_of(name, store)), Store(store), iteration, sys.stdin)


@app.command()
def export(
    name: RUN_NAME,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="a new directory")] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="a new repository of the Hugging Face hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="nobody else sees the repository")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="the run's pairs and generations, in place of the model")
    ] = False,
    iteration: Annotated[int | None, typer.Option(min=1, help="whose model; default: what the run hands out")] = None,
    policy_license: Annotated[
        str | None, typer.Option(metavar="ID", help="licence of the start model, e.g. apache-2.0")
    ] = None,
    data_license: Annotated[str | None, typer.Option(metavar="ID", help="licence of the prompts")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="where others get the start model; default: its hub_id")
    ] = None,
    store: STORE = None,
) -> None:
    """Take the trained model out of the store, or the rows it was trained on.

    Weights, tokenizer, generation settings and a card with method, data, gains, cost and how to repeat it. Nothing is
    ever overwritten.
    """
    from data_contracts.store import Store
    from flows.cli.export import Licences, Options
    from flows.cli.export import export as export_run
    from flows.config import load_run

    options = Options(to, hub, private, data, iteration, Licences(policy_license, data_license), base)
    for line in export_run(load_run(_settings_of(name, store)), Store(store), options):
        print(line)


@app.command()
def init(
    method: Annotated[str, typer.Argument(help="a name of `selfplay methods`")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file to write; default: METHOD.yaml; - prints it")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="your prompts, in any shape that is known")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="MODEL", help="your start model: a directory, or a hub id")
    ] = None,
) -> None:
    """Write a commented run config for a method, on your own data and model if you name them."""
    from data_contracts.errors import ConfigError
    from flows.cli.scaffold import commented_config

    path = out or Path(f"{method}.yaml")
    text = commented_config(method, data, policy, path.parent)
    if str(path) == "-":
        print(text)
        return
    if path.exists():
        raise ConfigError(f"{path} is there already: name another file with --out")
    path.write_text(text, encoding="utf-8")
    print(f"{path}: a run config for {method}. Try: selfplay run {path}")


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="a path or glob, {hub_id: ..., split: ...}, or a run config (.yaml)")],
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="what a column holds: prompt=question; repeatable")
    ] = None,
    split: Annotated[str | None, typer.Option(help="which split, where there are several")] = None,
    name: Annotated[str | None, typer.Option(help="which configuration of a hub data set")] = None,
    revision: Annotated[str | None, typer.Option(help="commit, tag or branch of a hub data set")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many rows, drawn by the seed")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    policy: Annotated[str | None, typer.Option(metavar="MODEL", help="directory or hub id: shows its tokens")] = None,
    sampling: Annotated[str, typer.Option(help="e.g. '{template: plain, max_prompt_tokens: 1024}'")] = "{}",
    heldout: Annotated[str | None, typer.Option(metavar="SOURCE", help="whose near-duplicates are named")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.jsonl", help="write what can be used")
    ] = None,
) -> None:
    """What would be read of a file, a directory, a hub data set or a run's sources.

    Its shape, the columns used and ignored, what is dropped and why, three rows as the policy will see them, lengths.
    """
    from flows.cli.data import Options, describe

    options = Options(split, name, revision, column or (), limit, seed, policy, sampling, heldout, out)
    for line in describe(source, options):
        print(line, flush=True)


@app.command()
def presets() -> None:
    """The run configs that come with the pipeline.

    Their paths work in every directory: selfplay run deploy/runs/quickstart.yaml. To change one, write a file of your
    own that begins with `extends: deploy/runs/sppo.yaml`, or name the changes with --set.
    """
    from flows.cli.presets import list_presets

    for line in list_presets():
        print(line)


@app.command()
def methods() -> None:
    """What can be trained: name, equation, source, needs."""
    from stages.__main__ import print_methods

    print_methods()


@app.command()
def checks() -> None:
    """What the scorer `checks` can verify: names, values, examples."""
    from flows.cli.checks import list_checks

    for line in list_checks():
        print(line)


@app.command()
def ls(
    kind: Annotated[str | None, typer.Option(help="only generations, checkpoint, ...")] = None, store: STORE = None
) -> None:
    """Every finished artifact, oldest first."""
    _contracts("ls", store, kind)


@app.command()
def show(key: KEY, store: STORE = None) -> None:
    """Everything a record says."""
    _contracts("show", store, key)


@app.command()
def explain(key: KEY, store: STORE = None) -> None:
    """Why an artifact is not one of the others."""
    _contracts("explain", store, key)


@app.command()
def verify(
    keys: Annotated[list[str] | None, typer.Argument(help="keys; default: all")] = None, store: STORE = None
) -> None:
    """Read every byte again, compare with what was signed."""
    _contracts("verify", store, keys or [])


@app.command()
def ledger(
    run: Annotated[str, typer.Argument(metavar="RUN", help="name of a run in the store")],
    csv: Annotated[bool, typer.Option(help="one row per artifact, for a spreadsheet")] = False,
    store: STORE = None,
) -> None:
    """What a run cost, stage by stage."""
    _contracts("ledger", store, run, csv)


@app.command()
def doctor(store: STORE = None) -> None:
    """What is wrong with this machine, store or server.

    Zombie runs, stuck locks, versions that do not fit, too little memory or disk; each with the command that mends it.
    """
    _hand_over("flows.cli.doctor", [], store)


@app.command()
def gc(
    keep_runs: Annotated[int, typer.Option(metavar="N", help="the last N runs stay as they are")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be set aside, change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="delete it, and what earlier calls have set aside")] = False,
    store: STORE = None,
) -> None:
    """Set aside what the last N runs do not need.

    It lies in STORE/set_aside and can be moved back; --yes deletes it.
    """
    flags = (["--dry-run"] if dry_run else []) + (["--yes"] if yes else [])
    _hand_over("data_contracts.gc", ["--keep-runs", str(keep_runs), *flags], store)


@app.command("replay-batch")
def replay_batch(path: Annotated[str, typer.Argument(help="the directory that the stopped training named")]) -> None:
    """Repeat the training step at which numbers went wrong."""
    _hand_over("stages.training.replay", [path], None)


def _hand_over(module: str, arguments: list[str], store: str | None) -> None:
    """Run the command `python -m MODULE ARGUMENTS` in this process. Raises: SystemExit with its exit code if not 0."""
    import importlib

    code = importlib.import_module(module).main([*arguments, *(["--store", store] if store else [])])
    if code:
        raise SystemExit(code)


def _contracts(command: str, store: str | None, *arguments: Any) -> None:
    """Run a command of `python -m data_contracts` on the store."""
    import data_contracts.__main__ as contracts
    from data_contracts.store import Store

    getattr(contracts, command)(Store(store), *arguments)


def _overrides(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings that `--set section.field=value` names, by dotted name."""
    from flows.config import parse_assignment

    return dict(parse_assignment(text) for text in assignments or [])


def _settings_of(name: str, store: str | None) -> Path:
    """Return the run config, or the settings that the store keeps of a run by that name."""
    from data_contracts.errors import ConfigError
    from data_contracts.installation import provided
    from data_contracts.store import RUN_SETTINGS, Store

    if Path(provided(name)).is_file():
        return Path(provided(name))
    artifacts = Store(store)
    runs = artifacts.runs_with(RUN_SETTINGS)
    if name not in runs:
        raise ConfigError(
            f"{name!r} is neither a run config nor a run in {artifacts.root}; "
            f"runs there: {', '.join(runs) or 'none'} (--store names another store)"
        )
    return artifacts.run_directory(name) / RUN_SETTINGS


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code."""
    from data_contracts.errors import ConfigError, PipelineError, print_error
    from data_contracts.redaction import redact_output
    from stages.running.loopback import bypass_proxies_on_loopback

    redact_output()
    bypass_proxies_on_loopback()
    try:
        code = app(arguments, prog_name="selfplay", standalone_mode=False)
    except PipelineError as error:
        return print_error(error)
    except ModuleNotFoundError as error:
        if error.name not in ENGINE_PACKAGES:
            raise
        message = f'the package {error.name} is not installed, and models do not load without it: pip install "selfplay-pipeline[cpu]" '
        return print_error(ConfigError(message + 'or "[gpu]" (in a checkout `make venv`)'))
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except SystemExit as error:
        return int(error.code or 0)
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        if (show := getattr(error, "show", None)) is not None:  # a usage error shows the command's usage too
            show()
        else:
            print(error, file=sys.stderr)
        return error.exit_code
    if code == 130:  # typer turns Ctrl-C into a return value
        print(INTERRUPTED, file=sys.stderr)
    if isinstance(code, int):
        return code
    return 0


def run_command() -> None:
    """The command, as a process of its own."""
    # Imports make objects that stay. Python would look for garbage among them after every 700, and once more at the end.
    set_threshold(200_000)
    from data_contracts.streams import open_standard_streams

    open_standard_streams()
    code = main()
    freeze()
    sys.exit(code)
