"""The fault harness: do something terrible to a build, type the same command again, and see that nothing is lost, doubled or left behind.

Strategy: real stages in real processes (`tasks.build` -> supervisor -> `python -m stages ...`) on a model that fits in a thimble, one stage
per fault, the ones before it already built. Points in time are changes of the disk: an undisturbed build is recorded once (hooks/sitecustomize.py),
so a fault can strike before any single open, write-back, rename or removal - inside a shard, inside the signing of a record. Others strike
at a random moment, or at rest: a file is cut, flipped, emptied or deleted between two tries.

What is asked afterwards is always the same, in `judge`: the same command ends well, every artifact has the content digest of the undisturbed
run, no shard was made twice without need, no process is left, no lock is held, no temporary file lies about.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.artifact import RECORD, RECORD_FORMAT
from data_contracts.checkpoint import external_model
from data_contracts.errors import NewerRecordError
from data_contracts.set_aside import set_aside
from data_contracts.store import Store
from stages.running.history import events
from stages.running.supervise import processes_with
from stages.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).resolve().parent / "hooks"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # In a shell's background job: whatever is started here would ignore it too, and no SIGINT would strike.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LIMIT_SECONDS = 180
"""A build of a few seconds that takes longer hangs."""
REMAINS_SECONDS = 25
"""A stage gets 10 s of grace to end by itself; its tree must be gone soon after."""
DAY = 86400.0
NOT_OURS = ("prefect", "mlflow-artifacts", "mlflow.db")

RUNTIME = {"device": "cpu"}
PER_SHARD = {"prompts_per_shard": 2, **RUNTIME}
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "sample": (
        "sample",
        {"backend": {"name": "canned"}, "num_candidates": 3, "max_new_tokens": 8, "max_prompt_tokens": 64, "runtime": PER_SHARD},
        {"prompts": "PROMPTS", "policy": "MODEL"},
    ),
    "score": (
        "score",
        {"scorer": {"name": "length", "target_tokens": 4}, "runtime": PER_SHARD},
        {"prompts": "PROMPTS", "generations": "step:sample"},
    ),
    "weigh": (
        "weigh",
        {"dtype": "float32", "runtime": {"pairs_per_shard": 2, **RUNTIME}},
        {"pairs": "step:score", "reference": "MODEL", "policy": "MODEL"},
    ),
    "train": (
        "train",
        {
            "method": {"name": "sppo", "eta": 20}, "learning_rate": 1e-3, "batch_size": 2, "dtype": "float32",
            "runtime": {"batch_tokens": 512, "save_every_steps": 1, **RUNTIME},
        },
        {"pairs": "step:weigh", "policy": "MODEL"},
    ),
    "evaluate": (
        "evaluate",
        {"scorer": {"name": "length", "target_tokens": 4}, "runtime": RUNTIME},
        {"prompts": "PROMPTS", "generations": "step:sample", "policy": "step:train", "start": "MODEL"},
    ),
}  # fmt: skip
TWO_RANKS = "train-2-ranks"


class Scene(NamedTuple):
    """One stage about to be built: the store before it, the store after it, and how often it touches the disk."""

    name: str
    steps: list[list[Any]]
    """What the command builds, this stage last."""
    before: Path
    after: Path
    directory: str
    """kind/key of its artifact."""
    wanted: dict[str, str]
    """Step -> content digest of the undisturbed run."""
    changes: list[tuple[str, str]]
    """(what, path below the store), in order."""
    seconds: float


class Ended(NamedTuple):
    code: int | None
    """None: it had to be stopped."""
    out: str


class Fault(NamedTuple):
    scene: str
    kind: str
    seed: int


class Verdict(NamedTuple):
    fault: Fault
    how: str
    """The fault in words: where it struck."""
    outcome: str
    """`unaffected`: the disturbed command ended well; `resumed`: the same command again did; `not reached`: the fault never struck; else what is wrong."""
    problems: list[str]
    seconds: float


class Command:
    """`python -m tests.faults.play`, and every process that came from it: all inherit a mark, wherever they hang."""

    def __init__(self, steps: Sequence[Any], store: Path, work: Path, prefix: Sequence[str] = (), **environment: str):
        self.mark = uuid.uuid4().hex
        request = work / f"{self.mark}.json"
        request.write_text(json.dumps({"store": str(store), "steps": list(steps)}))
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "MLFLOW_", "SELFPLAY_", "FAULT"))
        }
        path = os.pathsep.join([str(HOOKS), str(ROOT)])
        self.log = work / f"{self.mark}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.faults.play", str(request)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FAULT_MARK": self.mark} | environment, start_new_session=True,
            )  # fmt: skip

    def tree(self) -> list[int]:
        return processes_with(f"FAULT_MARK={self.mark}")

    def end(self, limit: float = LIMIT_SECONDS) -> Ended:
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            for pid in self.tree():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        return Ended(code, self.log.read_text(errors="replace"))

    def remains(self) -> list[str]:
        """Processes that outlived the command by more than the grace; they are ended here."""
        end = time.monotonic() + REMAINS_SECONDS
        while (left := self.tree()) and time.monotonic() < end:
            time.sleep(0.05)
        said = []
        for pid in left:
            with suppress(OSError):
                said.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120])
                os.kill(pid, signal.SIGKILL)
        return said


def contents(out: str) -> dict[str, str]:
    lines = (line.split() for line in out.splitlines() if line.startswith("content "))
    return {name: digest for _, name, digest in lines}


def prepare(
    root: Path,
    build_model: Callable[[Path], Path],
    publish: Callable[[Store], Any],
    two_ranks: bool = False,
    stages: Sequence[str] = tuple(STEPS),
) -> dict[str, Scene]:
    """Build each of the stages once, undisturbed, and keep the store before and after it."""
    root.mkdir(parents=True, exist_ok=True)
    model = build_model(root / "model")
    store = Store(root / "store")
    prompts = publish(store)
    external_model(model, store.root / "digests")
    steps: list[list[Any]] = []
    scenes = {}
    table = {name: STEPS[name] for name in stages}
    if two_ranks:
        stage, config, inputs = table["train"]
        table[TWO_RANKS] = (
            stage,
            config | {"learning_rate": 2e-3, "runtime": config["runtime"] | {"num_processes": 2}},
            inputs,
        )
    for name, (stage, config, inputs) in table.items():
        words = {"PROMPTS": f"prompts/{prompts.key}", "MODEL": f"model:{model}"}
        mine = [name, stage, config, {role: words.get(text, text) for role, text in inputs.items()}]
        earlier = [step for step in steps if step[0] != "evaluate" or name == "evaluate"]
        before, after = root / f"{name}-before", root / f"{name}-after"
        shutil.copytree(store.root, before, symlinks=True)
        trace = root / f"{name}.trace"
        trace.touch()
        fault = {"under": str(store.root), "module": "stages", "record": str(trace)}
        began = time.monotonic()
        ended = Command([*earlier, mine], store.root, root, FAULT=json.dumps(fault)).end()
        assert ended.code == 0, ended.out
        seconds = time.monotonic() - began
        shutil.copytree(store.root, after, symlinks=True)
        key = next(
            path
            for path in sorted(
                store.root.glob(f"artifacts/{STAGES[stage].produces}/*"), key=lambda p: -p.stat().st_mtime
            )
        )
        changes = [tuple(json.loads(line)) for line in trace.read_text().splitlines()]
        scenes[name] = Scene(
            name,
            [*earlier, mine],
            before,
            after,
            f"{STAGES[stage].produces}/{key.name}",
            contents(ended.out),
            changes,
            seconds,
        )
        steps.append(mine)
    return scenes


# --- the faults

INSIDE = (
    "kill", "term", "int", "stop", "segv", "kill supervisor", "term supervisor", "stop supervisor", "kill flow", "term flow", "int flow",
    "short write", "no memory", "ENOSPC", "EIO", "EROFS", "EMFILE", "EDQUOT", "clock +1 day", "clock -1 day",
)  # fmt: skip
"""At a change of the disk, from inside the stage's process."""
ANYTIME = ("kill anything", "kill the stage", "stop everything")
"""At a random moment, from outside."""
AT_REST = (
    "cut shard", "flipped shard", "empty shard", "lost shard", "lost companion", "flipped companion", "half record", "empty record", "foreign record", "garbage in .plan",
    "garbage in .events.jsonl", "cut .events.jsonl", "garbage in digests", "cut log-probs", "flipped log-probs", "cut checkpoint to resume from",
    "empty `latest`", "cut input", "flipped input", "lost input", "half record of input", "stale temporary files",
    "odd record", "set aside input",
)  # fmt: skip
"""Between two tries: of work half done, of a finished artifact, of its input."""


ELSEWHERE = ("moved store", "newer record", "dead proxy")
"""Around the store: it is killed and then lies at another path, another program wrote its record, a company's proxy is set."""
PROXY = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


def kinds_for(scene: Scene) -> list[str]:
    if scene.name == TWO_RANKS:
        return ["kill", "term", "ENOSPC", "short write", "kill supervisor", "kill flow", "kill anything"]
    kinds = [*INSIDE, *ANYTIME, *ELSEWHERE]
    sharded = scene.name in ("sample", "score", "weigh")
    left_out = set()
    if not sharded:
        left_out |= {"garbage in .plan"}
    if scene.name not in ("score", "weigh"):
        left_out |= {"lost companion", "flipped companion"}
    if scene.name != "weigh":
        left_out |= {"cut log-probs", "flipped log-probs"}
    if not scene.name.startswith("train"):
        left_out |= {"cut checkpoint to resume from", "empty `latest`"}
    if scene.name == "sample":
        left_out |= {kind for kind in AT_REST if "input" in kind}
    return kinds + [kind for kind in AT_REST if kind not in left_out]


def plan(scenes: dict[str, Scene], count: int, seed: int = 1) -> list[Fault]:
    """`count` faults: every kind at every stage once before any comes a second time, at another point."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < count:
        every = [(name, kind) for name, scene in scenes.items() for kind in kinds_for(scene)]
        chance.shuffle(every)
        faults += [Fault(name, kind, chance.randrange(2**31)) for name, kind in every]
    return faults[:count]


def strike(scene: Scene, fault: Fault, work: Path) -> Verdict:
    """One fault, one more try, and what is to be said of it."""
    began = time.monotonic()
    chance = random.Random(fault.seed)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    store = work / "store"
    problems: list[str] = []
    redone = 1
    if fault.kind in AT_REST:
        how, disturbed, first, redone = _at_rest(scene, fault.kind, chance, store, work)
    elif fault.kind in ELSEWHERE:
        how, disturbed, first, store, problems = _elsewhere(scene, fault.kind, chance, store, work)
    else:
        shutil.copytree(scene.before, store, symlinks=True)
        how, disturbed, first = (_inside if fault.kind in INSIDE else _anytime)(scene, fault.kind, chance, store, work)
    if first is None:
        return Verdict(fault, "", "not reached", [], time.monotonic() - began)
    problems += [f"left running: {command}" for command in first.remains()]
    if disturbed.code is None:
        problems.append("the disturbed command hangs")
    again = disturbed
    if disturbed.code != 0 or fault.kind not in AT_REST:
        command = Command(scene.steps, store, work)
        again = command.end()
        problems += [f"left running after the second try: {one}" for one in command.remains()]
    if (
        fault.kind.endswith("input") and again.code != 0
    ):  # an input found damaged on use is set back: the next try makes it again
        command = Command(scene.steps, store, work)
        again = command.end()
    problems += judge(scene, store, again, redone)
    outcome = problems[0].split(":")[0] if problems else "unaffected" if disturbed.code == 0 else "resumed"
    if not problems and how == "":
        outcome = "not reached"
    if problems:
        how += f"\n--- disturbed ({disturbed.code})\n{disturbed.out[-3000:]}\n--- again ({again.code})\n{again.out[-3000:]}"
    return Verdict(fault, how, outcome, problems, time.monotonic() - began)


def _inside(scene: Scene, kind: str, chance: random.Random, store: Path, work: Path) -> tuple[str, Ended, Command]:
    settings: dict[str, Any] = {"under": str(store), "module": "stages", "once": str(work / "struck"), "do": kind}
    settings["at"] = chance.randint(1, len(scene.changes))
    if kind.startswith("clock"):
        settings |= {"do": "clock", "offset": DAY if "+" in kind else -DAY}
    if scene.name == TWO_RANKS and chance.random() < 0.7:
        settings |= {"module": "stages.training.rank", "at": chance.randint(1, 25)}
    command = Command(scene.steps, store, work, FAULT=json.dumps(settings))
    if kind.startswith("stop"):
        while command.process.poll() is None and not (work / "struck").is_file():
            time.sleep(0.05)
        time.sleep(chance.uniform(0.2, 2.0))
        for pid in command.tree():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    ended = command.end()
    struck = work / "struck"
    how = f"change {settings['at']}: {struck.read_text()}" if struck.is_file() else ""
    return how, ended, command


def _anytime(scene: Scene, kind: str, chance: random.Random, store: Path, work: Path) -> tuple[str, Ended, Command]:
    command = Command(scene.steps, store, work)
    time.sleep(chance.uniform(0.1, scene.seconds * 1.1))
    tree = command.tree()
    if not tree or command.process.poll() is not None:
        return "", command.end(), command
    if kind == "stop everything":
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in tree:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(1.0)
        return f"{len(tree)} processes stopped for a second", command.end(), command
    pid = chance.choice(tree)
    if kind == "kill the stage":
        stages = [one for one in tree if _module(one) == "stages"]
        pid = chance.choice(stages) if stages else pid
    how = f"{_module(pid)} killed"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return how, command.end(), command


def _elsewhere(
    scene: Scene, kind: str, chance: random.Random, store: Path, work: Path
) -> tuple[str, Ended, Command, Path, list[str]]:
    """What happens around the store; returns also where it lies now, and what is wrong already."""
    if kind == "newer record":
        shutil.copytree(scene.after, store, symlinks=True)
        record = store / "artifacts" / scene.directory / RECORD
        ours = record.read_text()
        record.write_text(json.dumps(json.loads(ours) | {"format": RECORD_FORMAT + 1, "surprise": {}}))
        files = _files_of(record.parent)
        command = Command(scene.steps, store, work)
        ended = command.end()
        problems = []
        if ended.code != NewerRecordError.exit_code or "newer version of this program" not in ended.out:
            problems.append(f"other content: a newer record ended the command with {ended.code}")
        if _files_of(record.parent) != files:
            problems.append("lost: a newer program's artifact was touched")
        record.write_text(ours)
        return "format of the next version", ended, command, store, problems
    shutil.copytree(scene.before, store, symlinks=True)
    if kind == "dead proxy":
        command = Command(scene.steps, store, work, **PROXY)
        return "HTTP_PROXY and its kin at a port where nobody answers", command.end(), command, store, []
    at = chance.randint(1, len(scene.changes))
    settings = {"under": str(store), "module": "stages", "once": str(work / "struck"), "do": "kill", "at": at}
    command = Command(scene.steps, store, work, FAULT=json.dumps(settings))
    ended = command.end()
    moved = work / "another place" / "störe"
    moved.parent.mkdir()
    store.rename(moved)
    return f"killed at change {at}, then moved", ended, command, moved, []


def _files_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _module(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "gone"
    return words[words.index("-m") + 1] if "-m" in words else words[0]


def _at_rest(
    scene: Scene, kind: str, chance: random.Random, store: Path, work: Path
) -> tuple[str, Ended, Command | None, int]:
    """Damage to what lies there: the finished artifact, or (half of the time, where it makes a difference) one whose build was interrupted."""
    sharded = scene.name in ("sample", "score", "weigh")
    unfinished = kind in (
        "garbage in .plan",
        "cut checkpoint to resume from",
        "empty `latest`",
        "stale temporary files",
    ) or (
        sharded and chance.random() < 0.5 and "record" not in kind and "input" not in kind and "companion" not in kind
    )
    shutil.copytree(scene.after, store, symlinks=True)
    directory = store / "artifacts" / scene.directory
    if unfinished:
        shutil.rmtree(store)
        shutil.copytree(scene.before, store, symlinks=True)
        # Stopped right before the signature, or for training right after the second checkpoint.
        at = next(i for i, (what, path) in enumerate(scene.changes, 1) if what == "open" and f".{RECORD}.tmp-" in path)
        if scene.name.startswith("train"):
            latest = [i for i, (_, path) in enumerate(scene.changes, 1) if path.endswith("/latest")]
            at = latest[-1] + 1 if latest else at
        settings = {"under": str(store), "module": "stages", "once": str(work / "struck"), "do": "kill", "at": at}
        stopped = Command(scene.steps, store, work, FAULT=json.dumps(settings)).end()
        assert stopped.code != 0, stopped.out
    how, redone = _damage(scene, kind, chance, store, directory)
    if how == "":
        return "", Ended(0, ""), None, 1
    command = Command(scene.steps, store, work)
    return f"{'unfinished' if unfinished else 'finished'}: {how}", command.end(), command, redone if sharded else 99


def _damage(scene: Scene, kind: str, chance: random.Random, store: Path, directory: Path) -> tuple[str, int]:
    """Do it; says what was done, and how many shards may be made again because of it."""
    data = sorted(path for path in directory.glob("*") if path.suffix in (".parquet", ".safetensors"))
    shards = [path for path in data if path.name.startswith(("part-", "model"))]
    companions = [path for path in data if path.name.startswith(("scores-", "dropped-"))]
    plans: dict[str, tuple[list[Path], Callable[[Path], None]]] = {
        "cut shard": (shards, lambda path: _cut(path, chance)),
        "flipped shard": (shards, lambda path: _flip(path, chance)),
        "empty shard": (shards, lambda path: path.write_bytes(b"")),
        "lost shard": (shards, Path.unlink),
        "lost companion": (companions, Path.unlink),
        "flipped companion": (companions, lambda path: _flip(path, chance)),
        "half record": ([directory / RECORD], lambda path: _cut(path, chance)),
        "empty record": ([directory / RECORD], lambda path: path.write_bytes(b"")),
        "foreign record": (
            [directory / RECORD],
            lambda path: path.write_text('{"kind": "../../etc", "key": "passwd"}'),
        ),
        "garbage in .plan": ([directory / ".plan"], lambda path: path.write_bytes(chance.randbytes(40))),
        "garbage in .events.jsonl": (
            [directory / ".events.jsonl"],
            lambda path: path.write_bytes(chance.randbytes(300) + b'\n[1]\n{"a": 2}\n'),
        ),
        "cut .events.jsonl": ([directory / ".events.jsonl"], lambda path: _cut(path, chance)),
        "garbage in digests": (sorted((store / "digests").glob("*")) or [store / "digests" / "x"], _write_garbage),
        "cut log-probs": (sorted(store.glob("logps/*/part-*")), lambda path: _cut(path, chance)),
        "flipped log-probs": (sorted(store.glob("logps/*/part-*")), lambda path: _flip(path, chance)),
        "cut checkpoint to resume from": (
            [path for path in directory.glob("resume/**/*") if path.is_file() and path.name != "latest"],
            lambda path: _cut(path, chance),
        ),
        "empty `latest`": ([directory / "resume" / "latest"], lambda path: path.write_bytes(b"")),
        "stale temporary files": ([directory], _litter),
        "odd record": (
            [directory / RECORD],
            lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1})),
        ),
    }
    if "input" in kind:
        record = json.loads((directory / RECORD).read_text())
        inputs = [ref for ref in record["inputs"].values() if ref["key"] != "external" and ref["kind"] != "prompts"]
        chosen = chance.choice(inputs)
        shutil.rmtree(directory)  # else nobody would look at its inputs
        theirs = store / "artifacts" / chosen["kind"] / chosen["key"]
        if kind == "set aside input":
            set_aside(store, theirs, "a fault", "tests")
            return chosen["kind"], 1
        if kind == "half record of input":
            _cut(theirs / RECORD, chance)
            return f"{chosen['kind']} {RECORD}", 1
        path = chance.choice(sorted(path for path in theirs.glob("*") if path.suffix in (".parquet", ".safetensors")))
        {"cut": lambda: _cut(path, chance), "flipped": lambda: _flip(path, chance), "lost": path.unlink}[
            kind.split()[0]
        ]()
        return f"{chosen['kind']} {path.name}", 1
    files, do = plans[kind]
    if not files:
        return "", 0
    path = chance.choice(files)
    if kind != "garbage in digests" and not path.exists():
        return "", 0
    before = path.read_bytes() if path.is_file() else b""
    do(path)
    # A new plan, or an unreadable record, says nothing of the shards; all else costs the shard that was hit.
    redone = 3 if kind in ("garbage in .plan",) else 1
    return f"{path.relative_to(store)} ({len(before)} bytes)", redone


def _cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _write_garbage(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("0" * 63)


def _litter(directory: Path) -> None:
    """What a process of this machine that is no more could have left, wherever temporary files are made."""
    store = directory.parents[2]
    dead = subprocess.run(["true"], check=True) and 2**22 - 1
    for place in (directory, store / "logps" / "x", store / "digests", store / "locks", store / "judgements" / "ab"):
        place.mkdir(parents=True, exist_ok=True)
        (place / f".part-00000.parquet.tmp-{os.uname().nodename}-{dead}").write_bytes(b"PAR1")


# --- the verdict


def judge(scene: Scene, store: Path, ended: Ended, redone: int = 1) -> list[str]:
    """What is wrong after everything; empty: nothing."""
    if ended.code is None:
        return ["hang: the same command again does not end"]
    if ended.code != 0:
        return [f"lost: the same command again ended with {ended.code}"]
    problems = []
    for name, digest in contents(ended.out).items():
        if digest != scene.wanted[name]:
            problems.append(
                f"other content: {name} has {digest[:12]}, the undisturbed run made {scene.wanted[name][:12]}"
            )
    problems += [f"other content: {problem}" for problem in damage_in(Store(store))]
    return problems + repeated(Store(store), redone) + untidy(store)


def damage_in(store: Store) -> list[str]:
    return [f"{record.kind} {problem}" for record in store.records() for problem in store.problems(record, deep=True)]


def repeated(store: Store, redone: int = 1) -> list[str]:
    """Shards made more often than the damage explains, over all tries."""
    found = []
    for record in store.records():
        made = collections.Counter(
            event["index"]
            for event in events(store.directory(record.kind, record.key))
            if event["event"] in ("shard", "step")
        )
        again = sum(count - 1 for count in made.values())
        if again > redone:
            found.append(f"doubled: {record.kind}: {again} shards or steps were made again: {dict(made)}")
        if (wall := record.seconds.get("wall", 0.0)) < 0:
            found.append(f"clock: {record.kind} says it took {wall} s")
    return found


def untidy(store: Path) -> list[str]:
    found = []
    for path in store.rglob("*"):
        if path.relative_to(store).parts[0] in NOT_OURS:
            continue
        if ".tmp-" in path.name or path.name in ("resume", ".export"):
            found.append(f"litter: {path.relative_to(store)}")
    found += [
        f"litter: {path.relative_to(store)} is unfinished"
        for path in store.glob("artifacts/*/*")
        if not (path / RECORD).is_file()
    ]
    for path in sorted((store / "locks").glob("*")):
        if path.is_file() and not path.name.startswith("."):
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(f"stale lock: {path.name}")
    return found
