"""Shared by `kills`: the kinds of runs and commands that are struck, each as small as it can be on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_contracts.artifact import RECORD, ArtifactRecord
from data_contracts.shards import shard_path, to_table, write_shard
from data_contracts.store import Store

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "deploy" / "runs" / "tiny"
FORGOTTEN = ("mlflow.db", "mlflow-artifacts", "prefect", "locks", "set_aside")
"""What a copy of a store leaves behind: it is no result, or tells of other sessions."""
TRAIN_ONCE = """\
import sys
from flows.cli.server import prefect_server
with prefect_server(__import__("pathlib").Path(sys.argv[2]) / "prefect"):
    from flows.train_once import train_once
    train_once(config=sys.argv[1], store=sys.argv[2])
"""
OLD_SECONDS = 3 * 3600


class Kind(NamedTuple):
    """A command on a store, and what it begins with."""

    name: str
    config: Mapping[str, Any] = {}
    """The run config; {}: that of `like` or `after`."""
    words: tuple[str, ...] = ("run", "{config}")
    """Of `selfplay`; {config}, {work} and {store} are replaced."""
    like: str = ""
    """The kind whose undisturbed store this one must end with too: it only takes another way there."""
    after: str = ""
    """The kind whose finished store this one begins with; "": an empty store."""
    prepare: Callable[[Path], None] = lambda store: None
    """Changes the store before the command."""
    environment: Mapping[str, str] = {}
    is_partial: bool = True
    """Whether a strike may begin with a part of the artifacts, as an earlier kill would have left them."""
    done: tuple[int, ...] = (0,)
    """Exit codes of a command that found everything done."""
    own_server: bool = False
    program: tuple[str, ...] = ()
    """The words after the interpreter's; (): the command is forked from the harness, which has imported it."""
    cost: float = 1.0
    """Roughly, how many plain strikes one of this kind takes."""


def kinds(work: Path) -> dict[str, Kind]:
    """Return the kinds by name; models and prompts are made in `work`."""
    from benchmarks._smoke import tiny_model

    policy, other = tiny_model(work / "model", 0), tiny_model(work / "other", 1)
    rows = (ROOT / "deploy" / "prompts" / "tiny.jsonl").read_text(encoding="utf-8").splitlines()
    heldout = (ROOT / "deploy" / "prompts" / "quickstart_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    few, some, more = _write(work / "few.jsonl", rows[:6]), _write(work / "heldout.jsonl", heldout[:4]), heldout[:24]
    many = _write(work / "heldout24.jsonl", more)

    def config(preset: str, **sections: Any) -> dict[str, Any]:
        """Return a run config over a tiny preset: one iteration, canned answers, four held-out prompts."""
        base: dict[str, Any] = {
            "extends": str(PRESETS / f"{preset}.yaml"),
            "policy": {"path": policy, "hub_id": None},
            "iterations": 1,
            "prompts": {"train": few, "heldout": some},
            "sampling": {"backend": {"name": "canned"}, "max_new_tokens": 8, "runtime": {"prompts_per_shard": 2}},
            "scoring": {"runtime": {"prompts_per_shard": 2}},
            "weighting": {"runtime": {"pairs_per_shard": 2}},
            "training": {"batch_size": 2, "runtime": {"save_every_steps": 1}},
        }
        return _merge(base, sections)

    teacher = {"models": {"teacher": {"path": other, "hub_id": None}}}
    kto = config("tdpo", name="kto", method={"name": "kto"})
    ranks = {"runtime": {"num_processes": 2, "zero_stage": 2}}
    comparison = {
        "name": "pairs",
        "base": "dpo.yaml",
        "vary": ["method"],
        "variants": {"dpo": {"method": {"name": "dpo"}}, "ipo": {"method": {"name": "ipo"}}},
    }
    _dump(work / "dpo.yaml", config("tdpo", name="dpo", method={"name": "dpo"}))
    gate = {"enabled": True, "patience": 1, "min_prompts": 4, "length_controlled": False}
    length = {"name": "length", "target_tokens": 4}
    all_kinds = (
        Kind("kto", kto),
        Kind(
            "leases",
            like="kto",
            environment={"SELFPLAY_LOCKS": "lease", "SELFPLAY_LEASE_SECONDS": "3"},
        ),
        Kind(
            "data",
            words=("data", few, "--out", "{store}/prompts.jsonl", "--policy", policy),
            prepare=lambda store: store.mkdir(),
            is_partial=False,
            done=(0, 2),
            cost=0.2,
        ),
        Kind("mirror", like="kto", environment={"SELFPLAY_MIRROR": "file://{store}-mirrored"}),
        Kind(
            "train_once",
            like="kto",
            words=("{config}", "{store}"),
            program=("-c", TRAIN_ONCE),
        ),
        Kind("warm", words=("run", "{config}", "--set", "training.learning_rate=2.0e-6"), after="kto"),
        Kind("damaged", after="kto", prepare=_damage, is_partial=False),
        Kind(
            "gc_yes", words=("gc", "--keep-runs", "1", "--yes"), after="warm", prepare=_age, is_partial=False, cost=0.2
        ),
        Kind("report", words=("report", "kto"), after="kto", is_partial=False, cost=0.3),
        Kind("gc", words=("gc", "--keep-runs", "1"), after="warm", prepare=_age, is_partial=False, cost=0.2),
        Kind("compare", comparison, words=("compare", "{config}"), cost=1.5),
        Kind("ranks", config("tdpo", name="ranks", method={"name": "dpo"}, training=ranks), cost=1.8),
        Kind("gate", config("sppo", name="gate", iterations=3, gate=gate, prompts={"heldout": many})),
        Kind(
            "workers",
            config("sppo", name="workers", execution={"workers": {"sample": 2, "score": 2, "weigh": 2}}),
            cost=1.5,
        ),
        Kind(
            "tournament",
            config(
                "spin",
                name="tournament",
                iterations=1,
                tournament={"scorer": length, "baselines": {"other": {"path": other}}},
                training={"checkpoints": [0.5]},
            ),
            cost=1.3,
        ),
        Kind("swift", config("swift", **teacher, iterations=2, prompts={"train": few, "reuse": True}), cost=2.0),
        Kind("tis_dpo", config("tis_dpo_d"), cost=1.5),
        Kind(
            "lm_eval",
            kto | {"name": "lm-eval", "evaluation": {"lm_eval": [{"path": "deploy/evals/quickstart_mc"}]}},
            cost=1.5,
        ),
        Kind("server", like="kto", own_server=True, program=("-m", "flows"), cost=3.0),
    )
    for kind in all_kinds:
        if kind.config:
            _dump(work / f"{kind.name}.yaml", kind.config)
    return {kind.name: kind for kind in all_kinds}


def smoke_kinds() -> dict[str, Kind]:
    """Return the one kind of a smoke run: a store of six artifacts, of which `gc` deletes three."""
    kind = Kind(
        "gc",
        words=("gc", "--keep-runs", "1", "--yes"),
        prepare=_six_artifacts,
        is_partial=False,
        program=("-m", "flows"),
    )
    return {kind.name: kind}


def _six_artifacts(root: Path) -> None:
    """Make a store of six aged artifacts; the newest run has links to three of them."""
    store = Store(root)
    for number in range(6):
        record = ArtifactRecord(
            kind="generations", key=f"{number:016x}", stage="sample", version="1", config={}, inputs={}, content="",
            files=[], rows=1,
        )  # fmt: skip
        directory = store.directory(record.kind, record.key)
        write_shard(shard_path(directory, 0), to_table([{"prompt_id": "p", "reason": "none"}], "dropped"))
        ref = store.sign(record).ref(str(directory))
        store.show_in_run("new" if number < 3 else "old", "iter_00", f"sample{number}", ref)
    for path in (store.root / "runs" / "new").rglob("*"):
        os.utime(path, follow_symlinks=False)
    _age(root)


def words_of(kind: Kind, work: Path, store: Path, resume: str = "") -> list[str]:
    """Return the words after the program of a kind, on a store; `resume`: by the name of the run, not its config."""
    config = work / f"{kind.name if kind.config else kind.like or kind.after}.yaml"
    words = [word.format(config=config, work=work, store=store) for word in kind.words]
    if resume:
        words[:2] = ["resume", resume]
    if kind.words[0] not in ("data", "{config}"):
        words += ["--store", str(store)]
    return words


def copy_store(source: Path, target: Path) -> None:
    """Copy a store as another machine would see it: with the times of its files, without what is no result."""
    shutil.copytree(
        source, target, symlinks=True, ignore=lambda _, names: [name for name in names if name in FORGOTTEN]
    )


def keep_first(store: Path, count: int) -> None:
    """Leave the first `count` artifacts that were built, as a kill between two artifacts would have."""
    records = sorted(store.glob(f"artifacts/*/*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns)
    last = records[count - 1].stat().st_mtime if count else 0.0
    for path in records[count:]:
        shutil.rmtree(path.parent)
    for path in store.glob("logps/*/*part-*"):
        if path.stat().st_mtime > last:
            path.unlink()
    for run in store.glob("runs/*"):
        if not (run / "ledger.jsonl").is_file():  # the page of a comparison
            shutil.rmtree(run)
            continue
        lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line for line in lines if _is_kept(json.loads(line), records[:count])]
        for path in sorted(run.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("run.json", "ledger.jsonl") or not lines:
                path.unlink()
        if lines:
            (run / "ledger.jsonl").write_text("".join(lines), encoding="utf-8")


def _is_kept(line: Mapping[str, Any], records: list[Path]) -> bool:
    return line["event"] == "stage" and any(path.parent.name == line["key"] for path in records)


def _damage(store: Path) -> None:
    """Cut a shard in two and edit a chat template, as a disk and a person would."""
    pairs = min(store.glob("artifacts/weighted_pairs/*"))
    path = shard_path(pairs, 1)
    path.write_bytes(path.read_bytes()[:-100])
    checkpoint = min(store.glob("artifacts/checkpoint/*"))
    with open(checkpoint / "chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{# edited #}")


def _age(store: Path) -> None:
    """Set the clock of every file back: `gc` keeps what is young. Artifacts keep their order."""
    for path in store.rglob("*"):
        seconds = path.lstat().st_mtime - OLD_SECONDS
        os.utime(path, (time.time(), seconds), follow_symlinks=False)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
