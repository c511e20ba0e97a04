"""Method - SeqKD: likelihood of a teacher's own responses."""

from __future__ import annotations

from typing import Literal

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs
from stages.methods.sft import SFT


class SeqKD(Method):
    VERSION = SFT.VERSION
    SOURCE = "Kim & Rush 2016, sequence-level distillation (arXiv:1606.07947)"
    NEEDS = SFT.NEEDS
    SIDES = SFT.SIDES
    PAIRING = SFT.PAIRING

    class Config(MethodConfig):
        """No setting: SFT on rows whose responses a teacher generated."""

        name: Literal["seqkd"] = "seqkd"

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = -log pi(y) of the teacher's response y, a mean per token over the whole step: SFT's loss.

        Shapes: logps and weights [B, T] of one response a row -> token_loss [B].

        >>> from stages.methods.base import Responses
        >>> rows = Pairs(Responses.unpadded([[-1.0, -0.5]]))  # B = 1, T = 2
        >>> SeqKD.pair_loss(SeqKD.Config(), rows).token_loss
        tensor([1.5000])
        """
        return SFT.pair_loss(SFT.Config(), pairs)
