"""The engram mixer as functions on tensors: the definition that the parallel form must reproduce.

A mixer is a memory of several heads whose writes are addressed by the bank alone, so that no step waits for the recall
of the one before (compare gated slot attention, Zhang et al., arXiv 2409.07146). At every step of a head, with unit
queries q and keys k, values v, bank (M, V) of unit keys M, and scale s:

    write weights   w_t = β_t softmax(k_t · M / τ_w)                             over the slots
    trace           S_t = λ_t S_{t-1} + w_t ⊗ [k_t, v_t, 1]                      keys, values, and the mass of writes
    recall weights  r_t = softmax(q_t · (M + s S^k_t) / (1 + s S^1_t) / τ_r)
    recalled        m_t = Σ_n r_tn (V_n + s S^v_tn) / (1 + s S^1_tn)

A slot is thus a weighted mean of its bank entry, with weight 1, and of what was written into it. The recalled memory is
a mean of bank values and past values, whose weights are positive and sum to one: an exact attribution.

Letters in shapes: B batch, T steps, H hidden width, A heads, D head width, N memory slots, K taps of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_enn import NO_MASKS, StepMasks


class MixerBank(NamedTuple):
    """Learned memory of one mixer."""

    keys: Tensor  # [A, N, D], of length 1
    values: Tensor  # [A, N, D]
    trace_scale: Tensor  # [A], s: what one write weighs beside the bank
    write_temperature: Tensor  # [A], τ_w
    read_temperature: Tensor  # [A], τ_r


class MixerReads(NamedTuple):
    """What the steps of a sequence ask the memory and write into it."""

    queries: Tensor  # [B, A, T, D], of length 1
    keys: Tensor  # [B, A, T, D], of length 1
    values: Tensor  # [B, A, T, D]
    strengths: Tensor  # [B, A, T], β, 0 at steps that write nothing
    log_decays: Tensor  # [B, A, T], log λ, 0 at steps where nothing decays

    def step(self, t: int) -> "MixerReads":
        """Step `t` alone, without the axis of time."""
        return MixerReads(*(value[:, :, t] for value in self))


class MixerState(NamedTuple):
    """What a mixer carries from step to step."""

    tail: Tensor  # [B, K - 1, H], the last inputs of the convolution
    trace: Tensor  # [B, A, N, 2 D + 1], float32 at least: keys, values and mass of the writes


def write_weights(keys: Tensor, strengths: Tensor, bank: MixerBank) -> Tensor:
    """w of keys `[B, A, T, D]` with strengths `[B, A, T]`: `[B, A, T, N]`."""
    cosine = keys @ bank.keys.mT
    return strengths[..., None] * torch.softmax(cosine / bank.write_temperature[:, None, None], -1)


def mixer_memory_step(reads: MixerReads, weights: Tensor, trace: Tensor, bank: MixerBank) -> tuple[Tensor, ...]:
    """Write, then recall.

    Args:
        reads: of one step, without the axis of time.
        weights: w of the step, `[B, A, N]`.
        trace: before the step, restarts already cleared, `[B, A, N, 2 D + 1]`.

    Returns:
        recalled memory `[B, A, D]`, recall weights `[B, A, N]` and the trace after the step.
    """
    width = reads.keys.shape[-1]
    written = torch.cat([reads.keys, reads.values, torch.ones_like(reads.strengths)[..., None]], -1)
    trace = reads.log_decays.exp()[..., None, None] * trace + weights[..., None] * written[:, :, None]
    scale = bank.trace_scale[:, None, None]
    keys, values, mass = trace.split([width, width, 1], -1)
    total = 1 + scale * mass
    scores = torch.einsum("bad,band->ban", reads.queries, (bank.keys + scale * keys) / total)
    recall = torch.softmax(scores / bank.read_temperature[:, None], -1)
    recalled = torch.einsum("ban,band->bad", recall, (bank.values + scale * values) / total)
    return recalled, recall, trace


def mixer_memory_loop(
    reads: MixerReads, trace: Tensor, bank: MixerBank, restart: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, step by step over a sequence.

    Args:
        reads: of all steps.
        trace: before the first step, `[B, A, N, 2 D + 1]`.
        restart: bool `[B, T]`; `True` where a new document begins: the trace is zero before that step.

    Returns:
        recalled memory `[B, A, T, D]`, recall weights `[B, A, T, N]` and the trace after the last step.
    """
    weights = write_weights(reads.keys, reads.strengths, bank)
    recalled, recall = [], []
    for t in range(reads.keys.shape[2]):
        if restart is not None:
            trace = trace.masked_fill(restart[:, t, None, None, None], 0)
        step_recalled, step_recall, trace = mixer_memory_step(reads.step(t), weights[:, :, t], trace, bank)
        recalled.append(step_recalled)
        recall.append(step_recall)
    return torch.stack(recalled, 2), torch.stack(recall, 2), trace


def convolve_loop(x: Tensor, tail: Tensor, taps: Tensor, masks: StepMasks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """Causal convolution of every channel by itself, step by step: padding is skipped, documents begin with zeros.

    Args:
        x: inputs `[B, T, H]`.
        tail: the last K - 1 inputs before the first step, `[B, K - 1, H]`.
        taps: `[K, H]`, the last of which meets the input of the step itself.

    Returns:
        outputs `[B, T, H]`, of no meaning at padding, and the tail after the last step.
    """
    outputs = []
    for t in range(x.shape[1]):
        step = masks.steps(t)
        if step.restart is not None:
            tail = tail.masked_fill(step.restart[:, None, None], 0)
        window = torch.cat([tail, x[:, t, None]], 1)
        outputs.append((window * taps).sum(1))
        tail = window[:, 1:] if step.valid is None else torch.where(step.valid[:, None, None], window[:, 1:], tail)
    return torch.stack(outputs, 1), tail


def convolve(x: Tensor, tail: Tensor, taps: Tensor, masks: StepMasks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """[`convolve_loop`] for all steps at once."""
    kept, steps = tail.shape[1], x.shape[1]
    if masks.valid is not None and kept > 0:
        return _convolve_padded(x, tail, taps, masks)
    window = torch.cat([tail, x], 1)
    documents = None
    if masks.restart is not None:
        documents = F.pad(masks.restart.cumsum(1), (kept, 0))
    outputs = window[:, kept:] * taps[kept]
    for distance in range(1, kept + 1):
        past = window[:, kept - distance : kept - distance + steps]
        if documents is not None:
            same = documents[:, kept - distance : kept - distance + steps] == documents[:, kept:]
            past = past * same[..., None]
        outputs = torch.addcmul(outputs, past, taps[kept - distance])
    tail = window[:, steps:]
    if documents is not None:
        tail = tail * (documents[:, steps:] == documents[:, -1:])[..., None]
    return outputs, tail


def _convolve_padded(x: Tensor, tail: Tensor, taps: Tensor, masks: StepMasks) -> tuple[Tensor, Tensor]:
    """With padding: the steps of every row are moved to its end, behind the padding, and the results moved back."""
    order = masks.valid.int().argsort(dim=1, stable=True)
    moved = x.gather(1, order[..., None].expand_as(x))
    steps, kept = x.shape[1], tail.shape[1]
    # The tail goes to where the first step of the row now is, in place of padding.
    padding = (~masks.valid).sum(1, keepdim=True)
    window = torch.cat([x.new_zeros(len(x), kept, x.shape[-1]), moved], 1)
    places = torch.arange(kept + steps, device=x.device)
    from_tail = (places - padding)[..., None].expand(-1, -1, x.shape[-1])
    inside = (from_tail >= 0) & (from_tail < kept)
    window = torch.where(inside, tail.gather(1, from_tail.clamp(0, kept - 1)), window)
    restart = None if masks.restart is None else masks.restart.gather(1, order)
    outputs, tail = convolve(window[:, kept:], window[:, :kept], taps, StepMasks(restart=restart))
    return outputs.gather(1, order.argsort(1)[..., None].expand_as(x)), tail
