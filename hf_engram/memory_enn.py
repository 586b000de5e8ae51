"""The memory over a sequence: recalls and writes of all steps, with the values and gradients of `ops_enn.memory_step`.

Where numba is at hand this is one operator of torch over compiled loops (`compiled_memory_enn`) that keep the trace
between chunks only; elsewhere chunks in PyTorch (`chunkwise_enn`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunkwise_enn import CHUNK_SIZE, chunkwise_scan, keep_rates, write_rates
from .dispatch_enn import OPERATORS, use_compiled
from .numba_enn import flags, number_of_parts, run_over_rows
from .ops_enn import SQUARED_NORM_FLOOR, CellSettings, StepMasks


def memory_scan(
    z: Tensor, trace: Tensor, memory_bank: Tensor, settings: CellSettings, masks: StepMasks
) -> tuple[Tensor, Tensor, Tensor]:
    """All recalls and writes of a sequence.

    Args:
        z: encodings `[B, T, H]`.
        trace: trace before the first step `[B, N, H]`.
        memory_bank: learned slots `[N, H]`.
        masks: each `[B, T]`, as in `ops_enn.enn_loop`.

    Returns:
        recalled memory `[B, T, H]`, recall weights `[B, T, N]`, trace after the last step `[B, N, H]`.
    """
    if not use_compiled(z):
        return chunkwise_scan(z, trace, memory_bank, settings, masks)
    constants = (settings.hebbian_lr, settings.trace_scale, settings.temperature, settings.trace_clip)
    recalled, recall, trace, *_ = memory_recurrence(z, trace, memory_bank, *masks, *constants)
    return recalled, recall, trace


class MemoryTape(NamedTuple):
    """What the backward pass reads again."""

    bank_dot: Tensor  # z_t · bank, [B, T, N]
    product: Tensor  # z_t · trace, [B, T, N]
    inverse_slot_norm: Tensor  # 1 / |bank + trace|, [B, T, N]
    starts: Tensor  # trace at the start of every chunk but the first, [B, chunks - 1, N, H]
    clipped: Tensor  # where the clip may have been active, bool [B, chunks]


@torch.library.custom_op(f"{OPERATORS}::memory_recurrence", mutates_args=())
def memory_recurrence(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    valid: Tensor | None,
    restart: Tensor | None,
    writes: Tensor | None,
    hebbian_lr: float,
    trace_scale: float,
    temperature: float,
    trace_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `memory_scan` and a [`MemoryTape`], by compiled loops."""
    from .compiled_memory_enn import forward_rows

    settings = memory_settings(hebbian_lr, trace_scale, temperature, trace_clip)
    found = empty_results(z, trace)
    shared = shared_inputs(z, memory_bank, settings, StepMasks(valid, restart, writes))
    inputs = (z, trace, memory_bank.square().sum(-1), *shared, *constants(settings, SQUARED_NORM_FLOOR))
    run_over_rows(forward_rows, len(z), inputs, found)
    return found


@torch.library.custom_op(f"{OPERATORS}::memory_recurrence_backward", mutates_args=())
def memory_recurrence_backward(
    grad_recalled: Tensor,
    grad_recall: Tensor,
    grad_trace: Tensor,
    recall: Tensor,
    tape: list[Tensor],
    with_trace: bool,
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    valid: Tensor | None,
    restart: Tensor | None,
    writes: Tensor | None,
    hebbian_lr: float,
    trace_scale: float,
    temperature: float,
    trace_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, trace (empty unless `with_trace`) and memory_bank, given those of the three results."""
    from .compiled_memory_enn import backward_rows

    settings = memory_settings(hebbian_lr, trace_scale, temperature, trace_clip)
    shared = shared_inputs(z, memory_bank, settings, StepMasks(valid, restart, writes))
    grads = (grad_recalled, grad_recall, grad_trace)
    inputs = (*grads, z, trace, *shared, recall, *tape, *constants(settings, SQUARED_NORM_FLOOR**-0.5))
    grad_z = torch.empty_like(z)
    grad_first = torch.empty_like(trace if with_trace else trace[:0])
    grad_bank = z.new_empty(number_of_parts(len(z)), *memory_bank.shape)
    run_over_rows(backward_rows, len(z), inputs, (grad_z, grad_first, grad_bank))
    return grad_z, grad_first, grad_bank.sum(0)


@memory_recurrence.register_fake
def _(z, trace, *others):
    return empty_results(z, trace)


@memory_recurrence_backward.register_fake
def _(grad_recalled, grad_recall, grad_trace, recall, tape, with_trace, z, trace, memory_bank, *others):
    grad_first = torch.empty_like(trace if with_trace else trace[:0])
    return torch.empty_like(z), grad_first, torch.empty_like(memory_bank)


def _save(ctx, inputs, output):
    *tensors, hebbian_lr, trace_scale, temperature, trace_clip = inputs
    ctx.constants = (hebbian_lr, trace_scale, temperature, trace_clip)
    _, recall, _, *tape = output
    ctx.save_for_backward(recall, *tape, *tensors)


def _backward(ctx, grad_recalled, grad_recall, grad_trace, *_):
    recall, *saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
    tape, tensors = saved[: len(MemoryTape._fields)], saved[len(MemoryTape._fields) :]
    with_trace = ctx.needs_input_grad[1]
    grads = (grad_recalled, grad_recall, grad_trace)
    grad_z, grad_first, grad_bank = memory_recurrence_backward(
        *grads, recall, tape, with_trace, *tensors, *ctx.constants
    )
    return grad_z, grad_first if with_trace else None, grad_bank, *7 * (None,)


memory_recurrence.register_autograd(_backward, setup_context=_save)


def empty_results(z: Tensor, trace: Tensor) -> tuple[Tensor, ...]:
    """Room for the results of `memory_scan` and a [`MemoryTape`]."""
    batch, steps, width = z.shape
    slots, chunks = trace.shape[1], -(-steps // CHUNK_SIZE)
    shapes = (
        z.shape,
        (batch, steps, slots),
        trace.shape,
        *3 * ((batch, steps, slots),),
        (batch, chunks - 1, slots, width),
    )
    return *(z.new_empty(shape) for shape in shapes), z.new_zeros(batch, chunks, dtype=torch.bool)


def memory_settings(
    hebbian_lr: float, trace_scale: float, temperature: float, trace_clip: float | None
) -> CellSettings:
    """The constants that the memory reads; operators of torch take numbers only."""
    return CellSettings(hebbian_lr, trace_scale, temperature, trace_clip, trace_scope="sequence", layer_norm_eps=0.0)


def shared_inputs(z: Tensor, memory_bank: Tensor, settings: CellSettings, masks: StepMasks) -> tuple[Tensor, ...]:
    """What both compiled passes read beside z: the bank, plain and packed, the norms of z, rates and restarts."""
    from .tiles_enn import pack

    squared = z.square().sum(-1)
    inverse_norm = squared.clamp_min(SQUARED_NORM_FLOOR).rsqrt()
    bank = (memory_bank, pack(memory_bank.T), pack(memory_bank))
    rates = (keep_rates(z, settings, masks), write_rates(z, settings, masks))
    return *bank, squared, inverse_norm, *rates, flags(masks.restart, z, False)


def constants(settings: CellSettings, bound: float) -> tuple[float | None, ...]:
    """Chunk size, one, scale, temperature, `bound` and clip, as both compiled passes take them."""
    clip = None if settings.trace_clip is None else float(settings.trace_clip)
    return CHUNK_SIZE, 1.0, float(settings.trace_scale), float(settings.temperature), bound, clip
