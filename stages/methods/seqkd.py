"""Method - SeqKD: likelihood of a teacher's own responses."""

from __future__ import annotations

from typing import Literal

from stages.methods.base import MethodConfig
from stages.methods.sft import SFT


class SeqKD(SFT):
    SOURCE = "Kim & Rush 2016, sequence-level distillation (arXiv:1606.07947)"

    class Config(MethodConfig):
        """No setting: SFT on rows whose responses a teacher generated."""

        name: Literal["seqkd"] = "seqkd"
