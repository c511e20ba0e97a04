"""Tasks - answers of slow checks, remembered by the content of what was asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_contracts.files import write_atomic
from data_contracts.identity import canonical_json, digest_text


class Memory:
    """A directory of a store with one file per question. A store that is not there, or cannot be written, remembers
    nothing."""

    def __init__(self, store_root: Path | None):
        self.store_root = store_root

    def recall(self, question: Any, answer: Callable[[], Any]) -> Any:
        """The answer to a question that plain data describes, from the file or from `answer`; plain data too."""
        if self.store_root is None:
            return answer()
        path = self.store_root / "checked_prompts" / digest_text(canonical_json(question))
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        value = answer()
        if self.store_root.is_dir():  # a check alone makes no store
            with contextlib.suppress(OSError):
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, json.dumps(value))
        return value
