"""What an expert costs in trainable parameters, from the weights' shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Model

# Classes whose linears are stored transposed, (d_in, d_out): transformers' Conv1D.
CONV1D = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")


@dataclass(frozen=True)
class Cost:
    """Trainable parameters of N experts: N lora, and N router where there is a choice (N > 1).

    ``lora`` is r (d_in + d_out) and ``router`` d_in of a linear; of several linears with N
    experts each, the sums.
    """

    lora: int
    router: int

    def of(self, experts: int) -> int:
        """Parameters of a whole number of experts."""
        return experts * (self.lora + (self.router if experts > 1 else 0))

    def at(self, experts: float) -> float:
        """The same, and straight lines between whole numbers."""
        below = math.floor(experts)
        step = self.of(below + 1) - self.of(below)
        return self.of(below) + (experts - below) * step


def cost_of(matrices: Iterable[Matrix], r: int, model: Model) -> Cost:
    """The cost of one expert of rank ``r`` on each of these linears.

    Raises:
        HtsrError: a slice of a 3-d tensor, which no adapter of linears can reach.
    """
    lora = router = 0
    transposed = (model.architecture or "").startswith(CONV1D)
    for matrix in matrices:
        refuse_slices(matrix)
        d_in = matrix.shape[0] if transposed else matrix.shape[1]
        lora += r * sum(matrix.shape)
        router += d_in
    return Cost(lora, router)


def refuse_slices(matrix: Matrix) -> None:
    """Raise HtsrError on a slice of a 3-d tensor: it is no linear of its own."""
    if matrix.tensor.endswith("]"):
        raise HtsrError(
            f"{matrix.tensor} is one of several experts in one tensor, not a linear that can be "
            "adapted by itself.",
            "Name the linears to adapt: --target q_proj --target v_proj ...",
        )


def parse_params(text: str) -> int:
    """``100M``, ``1.5B``, ``660k`` or plain ``105635840``.

    Raises:
        HtsrError: anything else, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMB]?)", text.strip())
    count = float(match[1]) * 1000 ** " kmb".index(match[2].lower() or " ") if match else 0
    if count < 1:
        raise HtsrError(f"{text!r} is no number of parameters such as 100M or 1.5B.")
    return round(count)


def parse_share(text: str) -> float:
    """``1%`` or ``0.01``.

    Raises:
        HtsrError: anything else, or outside 0 to 100 %.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0
    if match and not match[2] and share >= 1:
        raise HtsrError(f"{text} is {share:.0%} of the base.", f"Write {text}% or {share / 100}.")
    if not 0 < share <= 1:
        raise HtsrError(f"{text!r} is no share such as 1% or 0.01.")
    return share
