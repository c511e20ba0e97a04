"""python in_process.py REQUEST.json OUT.jsonl: play whole runs in this one process, without Prefect, and say what came out.

The same `play` and the same stages as everywhere; only the process per stage is left out, which costs seconds each. One run in a process of
its own per stage is in test_self_play.py. REQUEST: {"store", "cases": [{"id", "config": RUN.yaml, "set": {...}}]}, all on one store but for cases that name another.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}

import stages.sampling.check
import stages.training.engine
import tasks.data.lengths
import tasks.prompts
from data_contracts.store import Store
from flows import hands
from flows.config import load_run
from flows.preflight import models_of, preflight
from flows.self_play import SelfPlay
from flows.tournament import merged, standing
from stages.execute import execute
from stages.stage import STAGES
from tasks.build import Built
from tasks.place import Place


class HandsInProcess:
    """Hands that build in this process."""

    def run(self, stage, config, place, **inputs):
        store = Store(place.store)
        record = execute(STAGES[stage], config, inputs, store)
        return Built(record.ref(str(store.directory(record.kind, record.key))), record, False)

    def publish(self, prompts, place):
        return tasks.prompts.publish(prompts, Store(place.store))

    def merge(self, players, place):
        return merged(players, Store(place.store))

    read_answers = staticmethod(hands.read_answers)
    read_report = staticmethod(hands.read_report)


class History:
    """Keeps what the iterations made."""

    def __init__(self):
        self.iterations, self.tournament, self.warm_start = [], None, None

    def built(self, place, **stages):
        metrics = {name: built.record.metrics for name, built in stages.items()}
        if place.iteration == 0:
            self.warm_start = metrics
        else:
            self.iterations.append(metrics)

    def measured(self, place, answers, report):
        pass

    def decided(self, place, verdict):
        pass

    def compared(self, scorer, names, scored, prompts):
        self.tournament = standing(scorer, names, scored and scored.ref, prompts)._asdict()

    def selected(self, place, checkpoints, found, gains, chosen):
        self.iterations[-1]["checkpoints"] = {
            "paths": [ref.path for ref in checkpoints], "content": [ref.content for ref in checkpoints], "chosen": chosen,
            "scores": [sum(one.scores.values()) / len(one.scores) for one in found],
        }  # fmt: skip


def play(case, store):
    config = load_run(case["config"], case["set"])
    checked = preflight(config, store)
    start, models = models_of(config, store)
    history = History()
    loop = SelfPlay(config, checked, start, models, HandsInProcess(), history)
    final = loop.play(Place(str(store.root), config.name))
    return {
        "final": final.path,
        "iterations": history.iterations,
        "warm_start": history.warm_start,
        "tournament": history.tournament,
        "unanswered": str(loop.unanswered),
    }


def check_here(python, request):
    """The check of the prompts in this process; see test_bad_input.py for the process of its own."""
    return stages.sampling.check.main([str(request)]), ""


def main(request: str, out: str) -> None:
    tasks.data.lengths.run_check = check_here
    # DeepSpeed keeps the first process group for ever; several trainings in one process share it.
    stages.training.engine.Engine.close = lambda self: None
    work = json.loads(Path(request).read_text())
    with open(out, "a", encoding="utf-8") as file:
        for case in work["cases"]:
            try:
                result = play(case, Store(case.get("store", work["store"])))
            except Exception:
                result = {"error": traceback.format_exc()}
            file.write(json.dumps({"id": case["id"], **result}) + "\n")
            file.flush()
            gc.freeze()  # what a case imported stays; each stage would look through it again, half a second each


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
