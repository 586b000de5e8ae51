"""What the memory of an engram mixer did while a sequence was read, head by head and as a mean over heads.

Letters in shapes: T tokens (padding left out), A heads, N memory slots, D head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .attribution import HeadAttribution, MixerAttribution
from .decay_enn import decay_between
from .ops_mixer_enn import MixerBank, write_weights
from .recordings import LayerRecording, MemoryRecording, Step


@dataclass(frozen=True, eq=False, repr=False)
class HeadRecording(MemoryRecording):
    """The memory of one head of a mixer while one sequence was read; beside [`LayerRecording`]'s, these attributes.

    The trace `[N, 2 D + 1]` after token t is `decay ∘ trace + writes[t] ⊗ [keys[t], values[t], 1]`, so that nothing
    larger than `[N + D]` is kept per token; everything else is computed when it is asked for, and kept then.

    Attributes:
        head: its number, from 0.
        keys: the key of each token, which addresses its write `[T, D]`.
        values: what each token writes `[T, D]`.
        strengths: how strongly it writes `[T]`, 0 where it wrote nothing.
        log_decays: logarithm of what the trace keeps at each token `[T]`, 0 where it did not decay.
        bank: the learned memory and constants of this head, without the axis of heads.
    """

    recalls_itself: ClassVar[bool] = True

    head: int
    keys: Tensor
    values: Tensor
    strengths: Tensor
    log_decays: Tensor
    bank: MixerBank

    def __repr__(self) -> str:
        slots, width = self.bank.values.shape
        return f"HeadRecording(layer={self.layer}, head={self.head}, tokens={len(self)}, slots={slots}, width={width})"

    @property
    def caption(self) -> str:
        """Which head of which layer it is."""
        return f"Layer {self.layer}, head {self.head}"

    @cached_property
    def writes(self) -> Tensor:
        """How much of its value each token added to each slot `[T, N]`, 0 if not written."""
        writes = torch.zeros_like(self.recall)
        # Write weights are shared out among the slots that are on.
        patterns, group_of_step = self.active_slots.unique(dim=0, return_inverse=True)
        for group, slots in enumerate(patterns):
            steps = group_of_step == group
            bank = self.bank._replace(keys=self.bank.keys[slots], values=self.bank.values[slots])
            bank = MixerBank(*(value[None] for value in bank))
            weights = write_weights(self.keys[None, None, steps], self.strengths[None, None, steps], bank)
            writes[steps[:, None] & slots] = weights.flatten()
        return writes

    @cached_property
    def attribution(self) -> HeadAttribution:
        """Where each recalled memory came from (`hf_engram.attribution`); takes O(T²) memory."""
        width, scale = self.values.shape[-1], self.bank.trace_scale
        carried_values, carried_mass = self.carried_trace[:, width : 2 * width], self.carried_trace[:, -1]
        bank_weights = torch.empty_like(self.recall)
        carried_weights = torch.empty_like(self.recall)  # of the carried sums of values, not of their means
        coefficients = self.recall.new_zeros(len(self), len(self))
        for slots, on in self._slot_groups():
            decay, kept = self._decay(on)
            writes = self.writes[:, slots]
            mass = decay @ writes + kept * carried_mass[slots]
            weights = self.recall[:, slots] / (1 + scale * mass)
            bank_weights[:, slots] = weights
            carried_weights[:, slots] = scale * kept * weights
            coefficients += scale * decay * (weights @ writes.T)
        return HeadAttribution(
            recalled=self.recalled,
            bank=bank_weights @ self.bank.values,
            carried=carried_weights @ carried_values,
            coefficients=coefficients,
            encodings=self.values,
            clip=torch.zeros_like(self.values),
            exact=torch.ones_like(self.written),
            bank_weight=bank_weights.sum(-1),
            carried_weight=carried_weights @ carried_mass,
        )

    def _steps(self) -> Iterator[Step]:
        width, scale = self.values.shape[-1], self.bank.trace_scale
        trace, clipped = self.carried_trace, torch.zeros_like(self.active_slots[0])
        written = torch.cat([self.keys, self.values, torch.ones_like(self.strengths)[:, None]], -1)
        keep = torch.where(self.active_slots, self.log_decays[:, None], 0).exp()  # [T, N]
        for t in range(len(self)):
            if self.restart[t]:
                trace = trace.masked_fill(self.active_slots[t, :, None], 0)
            trace = keep[t, :, None] * trace + self.writes[t, :, None] * written[t]
            slots = (self.bank.values + scale * trace[:, width : 2 * width]) / (1 + scale * trace[:, -1:])
            yield Step(self.recall[t] @ slots, trace, clipped)

    def _decay(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """What is left, at each step, of every write up to it and of the carried-over trace.

        Args:
            on: bool `[T]`, when the slots were on.

        Returns:
            `[T, T]`, zero unless the write came at or before the step and was not cleared since; and `[T, 1]`.
        """
        decay, carry = decay_between(torch.where(on, self.log_decays, 0), (self.restart & on).cumsum(0))
        return decay, carry[:, None]


@dataclass(frozen=True, eq=False, repr=False)
class MixerRecording(LayerRecording):
    """The memory of one mixer while one sequence was read: its heads, and the mean over them.

    Attributes:
        heads: one [`HeadRecording`] per head. What is asked of the mixer itself is the mean over heads, unless it says
            otherwise.
    """

    recalls_itself: ClassVar[bool] = True

    layer: int
    tokens: tuple[str, ...]
    plastic: Tensor
    written: Tensor
    restart: Tensor
    active_slots: Tensor
    heads: tuple[HeadRecording, ...]

    def __repr__(self) -> str:
        slots, width = self.heads[0].bank.values.shape
        return (
            f"MixerRecording(layer={self.layer}, tokens={len(self)}, heads={len(self.heads)}, slots={slots}, "
            f"width={width})"
        )

    @property
    def caption(self) -> str:
        """Which layer it is, and that it is a mean."""
        return f"Layer {self.layer}, mean over {len(self.heads)} heads"

    @cached_property
    def recall(self) -> Tensor:
        """Recall weights over slots `[T, N]`."""
        return torch.stack([head.recall for head in self.heads]).mean(0)

    @cached_property
    def writes(self) -> Tensor:
        """How much of its value each token added to each slot `[T, N]`."""
        return torch.stack([head.writes for head in self.heads]).mean(0)

    @cached_property
    def recalled(self) -> Tensor:
        """The memories that the heads recalled, side by side `[T, A D]`."""
        return torch.cat([head.recalled for head in self.heads], -1)

    @cached_property
    def trace_norms(self) -> Tensor:
        """Length of every slot of the trace after each token `[T, N]`."""
        return torch.stack([head.trace_norms for head in self.heads]).mean(0)

    def trace(self, step: int = -1) -> Tensor:
        """The traces of all heads after token `step`, `[A, N, 2 D + 1]`; negative steps count from the end.

        Raises:
            IndexError: there is no such token.
        """
        return torch.stack([head.trace(step) for head in self.heads])

    @cached_property
    def attribution(self) -> MixerAttribution:
        """Where each recalled memory came from (`hf_engram.attribution`); takes O(A T²) memory."""
        return MixerAttribution(tuple(head.attribution for head in self.heads))
