"""python -m tests.faults.play REQUEST.json: stages one after the other, as a flow builds them, by a process that can be killed.

REQUEST: {"store", "steps": [[name, stage, config, {input: "model:PATH" | "step:NAME" | "KIND/KEY"}]]}. Prints each artifact's content digest.
"""

import json
import sys
from pathlib import Path

from data_contracts.checkpoint import external_model
from data_contracts.errors import ArtifactError, PipelineError
from data_contracts.store import Store
from stages.stage import STAGES
from tasks.build import build


def main(path: str) -> int:
    request = json.loads(Path(path).read_text())
    store, made = Store(request["store"]), {}

    def resolve(text):
        if text.startswith("model:"):
            return external_model(Path(text[6:]), store.root / "digests")
        if text.startswith("step:"):
            return made[text[5:]].ref
        if (found := store.find(*text.split("/"))) is None:
            raise ArtifactError(f"{text} is not there")
        return found

    try:
        for name, stage, config, inputs in request["steps"]:
            refs = {role: resolve(text) for role, text in inputs.items()}
            made[name] = build(stage, STAGES[stage].parse(config), refs, store, lambda line: print(line, flush=True))
            print(f"content {name} {made[name].ref.content}", flush=True)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
