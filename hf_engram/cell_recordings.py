"""What the memory of a cell did while a sequence was read.

Letters in shapes: T tokens (padding left out), N memory slots, H hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .attribution import Attribution
from .ops_enn import CellSettings
from .recordings import MemoryRecording, Step


@dataclass(frozen=True, eq=False, repr=False)
class CellRecording(MemoryRecording):
    """The memory of one engram layer while one sequence was read; beside [`LayerRecording`]'s, these attributes.

    The trace `[N, H]` after token t is `decay ∘ trace + writes[t] ⊗ encodings[t]`, so that nothing larger than
    `[N + H]` is kept per token; everything else is computed when it is asked for, and kept then.

    Attributes:
        encodings: the encoding z of each token, what it writes `[T, H]`.
        bank: the learned slots `[N, H]`.
        settings: the cell's constants.
    """

    encodings: Tensor
    bank: Tensor
    settings: CellSettings

    def __repr__(self) -> str:
        slots, width = self.bank.shape
        return f"CellRecording(layer={self.layer}, tokens={len(self)}, slots={slots}, width={width})"

    @cached_property
    def writes(self) -> Tensor:
        """How much of its encoding each token added to each slot `[T, N]`: `hebbian_lr · recall`, 0 if not written."""
        return self.settings.hebbian_lr * self.recall * (self.written[:, None] & self.active_slots)

    @property
    def clipped(self) -> Tensor:
        """Bool `[T, N]`: the clip acted on this slot when the token wrote."""
        return self._replay.clipped

    @cached_property
    def attribution(self) -> Attribution:
        """Where each recalled memory came from (`hf_engram.attribution`); takes O(T²) memory."""
        settings, recall = self.settings, self.recall
        coefficients = recall.new_zeros(len(self), len(self))
        carry = torch.empty_like(recall)
        for slots, on in self._slot_groups():
            decay, carry[:, slots] = self._decay(self.plastic & on, self.restart & on)
            coefficients += decay * (recall[:, slots] @ self.writes[:, slots].T)
        coefficients *= settings.trace_scale
        bank = recall @ self.bank
        carried = settings.trace_scale * ((carry * recall) @ self.carried_trace)
        exact = self._exact()
        clip = self.recalled - (bank + carried + coefficients @ self.encodings)
        return Attribution(
            recalled=self.recalled,
            bank=bank,
            carried=carried,
            coefficients=coefficients,
            encodings=self.encodings,
            clip=torch.where(exact[:, None], 0, clip),
            exact=exact,
        )

    def _steps(self) -> Iterator[Step]:
        eta, scale, clip = self.settings.hebbian_lr, self.settings.trace_scale, self.settings.trace_clip
        trace, clipped = self.carried_trace, torch.zeros_like(self.active_slots[0])
        changing = self.plastic[:, None] & self.active_slots  # [T, N]
        keep = 1 - eta * changing.to(trace)
        for t in range(len(self)):
            if self.restart[t]:
                trace = trace.masked_fill(self.active_slots[t, :, None], 0)
            recalled = self.recall[t] @ (self.bank + scale * trace)
            trace = keep[t, :, None] * trace + self.writes[t, :, None] * self.encodings[t]
            if clip is not None:
                inside = torch.where(changing[t, :, None], trace.clamp(-clip, clip), trace)
                trace, clipped = inside, (inside != trace).any(-1)
            yield Step(recalled, trace, clipped)

    def _exact(self) -> Tensor:
        """Bool `[T]`: no slot that this token recalled has been clipped since it was last cleared."""
        clips_before = self.clipped.cumsum(0) - self.clipped.long()
        cleared = self.restart[:, None] & self.active_slots  # slots that are off keep their trace even then
        when_cleared = torch.where(cleared, clips_before, 0).cummax(0).values
        return ~(self.active_slots & (clips_before > when_cleared)).any(-1)

    def _decay(self, decaying: Tensor, cleared: Tensor) -> tuple[Tensor, Tensor]:
        """What is left, at each step, of every earlier write and of the carried-over trace.

        Args:
            decaying: bool `[T]`, the steps at which the trace decays.
            cleared: bool `[T]`, the steps before which it was cleared.

        Returns:
            `[T, T]`, zero unless the write came before the step and was not cleared since; and `[T, 1]`.
        """
        keep = 1 - self.settings.hebbian_lr
        after = decaying.cumsum(0)  # decaying steps up to and including t
        before = after - decaying.long()
        document = cleared.cumsum(0)
        seen = (document[:, None] == document).tril(-1)
        elapsed = (before[:, None] - after).clamp_min(0)
        decay = torch.where(seen, keep ** elapsed.to(self.recall), 0)
        carry = torch.where(document == 0, keep ** before.to(self.recall), 0)
        return decay, carry[:, None]
