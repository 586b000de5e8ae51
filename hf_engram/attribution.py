"""Where recalled memories came from: the parts of each, and their sizes.

What a step of a cell recalls is linear in what the bank holds and in what was written before (η rate, s scale of the
trace, λ = 1 - η, d decaying steps in between):

    m_t = a_t M + s λ^d a_t A_0 + Σ_{r<t} R[t,r] z_r,    R[t,r] = s η λ^d (a_t · a_r)

so that R says, exactly, how strongly the write of token r speaks in what token t recalls. An active clip breaks the
linearity; what it changed is kept apart, in a part of its own.

What a head of a mixer recalls is a mean of bank values, carried-in values and past values (`ops_mixer_enn`):

    m_t = Σ_n p_tn V_n + s Σ_n p_tn d_tn S⁰_n + Σ_{r<=t} R[t,r] v_r,
    R[t,r] = s Σ_n p_tn d_trn w_rn,    p_tn = r_tn / (1 + s S¹_tn)

with w write weights, r recall weights, S¹ the mass of the trace after the step, S⁰ the values of the trace that was
carried in, d what is left after the decays in between. All weights are positive, and they sum to one.

Letters in shapes: T tokens, H hidden width (of a head of a mixer: its width), N memory slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """One number for every part of every recalled memory."""

    bank: Tensor  # [T], the learned slots
    carried: Tensor  # [T], the memory that was there before the first recorded token
    tokens: Tensor  # [T, T], what the token of the column wrote; zero where the token of the row could not recall it
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
        return f"{type(self).__name__}(tokens={len(self.exact)}, exact={bool(self.exact.all())})"

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


@dataclass(frozen=True, eq=False, repr=False)
class HeadAttribution(Attribution):
    """Where the memories that one head of a mixer recalled came from: a distribution over bank, past and tokens.

    Always exact, and without a clip. `encodings` are the values that the tokens wrote, `coefficients` their weights in
    the recalled mean, the token itself included: a mixer writes before it recalls.

    Attributes:
        bank_weight: weight of the learned slots in each recalled mean `[T]`.
        carried_weight: weight of the memory that was there before the first recorded token `[T]`.
    """

    bank_weight: Tensor
    carried_weight: Tensor

    @cached_property
    def share(self) -> Parts:
        """Weight of each part in the recalled mean: none is negative, and the shares of a token sum to 1."""
        return Parts(self.bank_weight, self.carried_weight, self.coefficients, torch.zeros_like(self.bank_weight))


@dataclass(frozen=True, eq=False, repr=False)
class MixerAttribution:
    """Where the memories that a mixer recalled came from: the attribution of every head, and the mean over heads.

    Attributes:
        heads: one [`HeadAttribution`] per head.
    """

    heads: tuple[HeadAttribution, ...]
    first_inexact: ClassVar[None] = None

    def __repr__(self) -> str:
        return f"MixerAttribution(tokens={len(self.exact)}, heads={len(self.heads)})"

    @property
    def exact(self) -> Tensor:
        """Bool `[T]`: always `True`, nothing is clipped."""
        return self.heads[0].exact

    @cached_property
    def coefficients(self) -> Tensor:
        """The weight of what each token wrote in what each token recalled, `[T, T]`, mean over heads."""
        return self.share.tokens

    @cached_property
    def share(self) -> Parts:
        """Weight of each part, mean over heads: none is negative, and the shares of a token sum to 1."""
        return mean_over_heads([head.share for head in self.heads])

    @cached_property
    def contribution(self) -> Parts:
        """Each part projected on what was recalled ([`Attribution.contribution`]), mean over heads."""
        return mean_over_heads([head.contribution for head in self.heads])


def mean_over_heads(parts: Sequence[Parts]) -> Parts:
    """The mean of the parts of several heads."""
    return Parts(*(torch.stack(values).mean(0) for values in zip(*parts, strict=True)))
