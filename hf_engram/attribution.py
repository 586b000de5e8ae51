"""Where recalled memories came from: the parts of each, and their sizes.

The recall of a step is linear in what the bank holds and in what was written before (η rate, s scale of the trace,
λ = 1 - η, d decaying steps in between):

    m_t = a_t M + s λ^d a_t A_0 + Σ_{r<t} R[t,r] z_r,    R[t,r] = s η λ^d (a_t · a_r)

so that R says, exactly, how strongly the write of token r speaks in what token t recalls. An active clip breaks the
linearity; what it changed is kept apart, in a part of its own.

Letters in shapes: T tokens, H hidden width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """One number for every part of every recalled memory."""

    bank: Tensor  # [T], the learned slots
    carried: Tensor  # [T], the memory that was there before the first recorded token
    tokens: Tensor  # [T, T], what the token of the column wrote; zero unless it came before the token of the row
    clip: Tensor  # [T], what clipping the trace changed; zero where the attribution is exact


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Where each recalled memory came from: `recalled = bank + carried + coefficients @ encodings + clip`.

    Attributes:
        recalled: the memory that each token recalled `[T, H]`.
        bank: its part from the learned slots `[T, H]`.
        carried: its part from the memory that was there before the first recorded token `[T, H]`.
        coefficients: R, the weight of what token r wrote in what token t recalled `[T, T]`.
        encodings: what each token wrote, `[T, H]`.
        clip: what clipping changed `[T, H]`; zero where `exact`.
        exact: bool `[T]`; `False` from the first recall that reads an entry which the clip has changed, until the
            memory is cleared. There, the coefficients are those of a memory without a clip.
    """

    recalled: Tensor
    bank: Tensor
    carried: Tensor
    coefficients: Tensor
    encodings: Tensor
    clip: Tensor
    exact: Tensor

    def __repr__(self) -> str:
        return f"Attribution(tokens={len(self.exact)}, exact={bool(self.exact.all())})"

    @cached_property
    def first_inexact(self) -> int | None:
        """The first token whose recall is not fully attributed; `None` when all are exact."""
        inexact = (~self.exact).nonzero()
        return int(inexact[0]) if len(inexact) else None

    @cached_property
    def share(self) -> Parts:
        """Length of each part, divided by the length of the recalled memory. Zero where nothing was recalled.

        Parts may point in different directions, so shares do not sum to 1; contributions do.
        """
        length = self.recalled.norm(dim=-1)
        scale = torch.where(length > 0, 1 / length, 0)
        return Parts(
            bank=self.bank.norm(dim=-1) * scale,
            carried=self.carried.norm(dim=-1) * scale,
            tokens=self.coefficients.abs() * self.encodings.norm(dim=-1) * scale[:, None],
            clip=self.clip.norm(dim=-1) * scale,
        )

    @cached_property
    def contribution(self) -> Parts:
        """Each part projected on the recalled memory: `part · recalled / |recalled|²`.

        Negative where a part speaks against what was recalled. The contributions to a token sum to 1 (to 0 where
        nothing was recalled).
        """
        squared = self.recalled.square().sum(-1, keepdim=True)
        direction = torch.where(squared > 0, self.recalled / squared, 0)
        return Parts(
            bank=(self.bank * direction).sum(-1),
            carried=(self.carried * direction).sum(-1),
            tokens=self.coefficients * (direction @ self.encodings.T),
            clip=(self.clip * direction).sum(-1),
        )
