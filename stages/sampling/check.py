"""Stages - python -m stages.sampling.check REQUEST.json: do these prompts fit this model? Loads a tokenizer, no model.

REQUEST.json: {"model": directory, "sets": [[sampling config, prompt rows], ...]}. Exit code 2 and one sentence on stdout if not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_contracts.errors import ConfigError
from stages.models.tokens import load_tokenizer
from stages.sampling.stage import SamplingConfig, encode_prompts


def main(path: str) -> int:
    request = json.loads(Path(path).read_text())
    try:
        tokenizer = load_tokenizer(request["model"])
        for config, rows in request["sets"]:
            encode_prompts(rows, SamplingConfig.model_validate(config), request["model"], tokenizer)
    except ConfigError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
