"""The GRU integrator over a sequence, with the values and gradients of `ops_enn.gru_step` at every step.

As in `integrator_enn`: what the encodings and recalled memories add is one product for all steps, and so are the
gradients of the weights; only the recurrence over the hidden state goes step by step. `torch.nn.GRU` computes the same,
but knows neither padding nor documents, and trains at two thirds of this speed or less on a CPU
(`python -m benchmarks.speed --sections language_models`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch_enn import OPERATORS, use_compiled
from .integrator_enn import states_before, step_flags
from .numba_enn import run_over_rows
from .ops_enn import CellWeights, StepMasks


class GruTrajectory(NamedTuple):
    """What the recurrence finds at every step."""

    outputs: Tensor  # [B, T, H], the hidden state after the step
    gates: Tensor  # [B, T, 4H]: reset, update, proposal, and the hidden state's part of the proposal before its reset


def gru_scan(z: Tensor, recalled: Tensor, hidden: Tensor, weights: CellWeights, masks: StepMasks) -> Tensor:
    """All hidden states of a sequence; arguments and result as in `integrator_enn.integrator_scan`."""
    drive = F.linear(z + recalled, weights.integrator_weight, weights.integrator_bias)
    weight, bias = weights.recurrence
    with torch.autocast(drive.device.type, enabled=False):
        drive, hidden = drive.to(weight.dtype), hidden.to(weight.dtype)
        outputs, _ = gru_recurrence(drive, hidden, weight, bias, masks.valid, masks.restart)
    return outputs


@torch.library.custom_op(f"{OPERATORS}::gru_recurrence", mutates_args=())
def gru_recurrence(
    drive: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, restart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A [`GruTrajectory`], given what encodings and recalled memories add to gates and proposal, `[B, T, 3H]`."""
    run = compiled_forward if use_compiled(drive) else forward_loop
    return tuple(run(drive, hidden, weight, bias, StepMasks(valid, restart)))


@torch.library.custom_op(f"{OPERATORS}::gru_recurrence_backward", mutates_args=())
def gru_recurrence_backward(
    grad_outputs: Tensor,
    outputs: Tensor,
    gates: Tensor,
    hidden: Tensor,
    weight: Tensor,
    valid: Tensor | None,
    restart: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of drive, hidden, weight and bias."""
    before = states_before(hidden, outputs, restart)
    run = compiled_backward if use_compiled(gates) else backward_loop
    grad_drive, grad_hidden = run(grad_outputs, gates, before, weight, StepMasks(valid, restart))
    width = hidden.shape[1]
    from_hidden = grad_drive.flatten(0, 1).clone()
    from_hidden[:, 2 * width :] *= gates.flatten(0, 1)[:, :width]
    return grad_drive, grad_hidden, from_hidden.T @ before.flatten(0, 1), from_hidden.sum(0)


def empty_trajectory(drive: Tensor, hidden: Tensor) -> GruTrajectory:
    """Room for what the recurrence finds."""
    batch, steps, _ = drive.shape
    width = hidden.shape[1]
    return GruTrajectory(drive.new_empty(batch, steps, width), drive.new_empty(batch, steps, 4 * width))


@gru_recurrence.register_fake
def _(drive, hidden, *others):
    return tuple(empty_trajectory(drive, hidden))


@gru_recurrence_backward.register_fake
def _(grad_outputs, outputs, gates, hidden, weight, *others):
    width = hidden.shape[1]
    shapes = ((*outputs.shape[:2], 3 * width), hidden.shape, weight.shape, (3 * width,))
    return tuple(gates.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output):
    _, hidden, weight, _, valid, restart = inputs
    ctx.save_for_backward(*output, hidden, weight, valid, restart)


def _backward(ctx, grad_outputs, _):
    return *gru_recurrence_backward(grad_outputs, *ctx.saved_tensors), None, None


gru_recurrence.register_autograd(_backward, setup_context=_save)


def forward_loop(drive: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, masks: StepMasks) -> GruTrajectory:
    """The recurrence in PyTorch."""
    found = empty_trajectory(drive, hidden)
    width = hidden.shape[1]
    for t in range(drive.shape[1]):
        if masks.restart is not None:
            hidden = hidden.masked_fill(masks.restart[:, t, None], 0)
        summed = torch.addmm(bias, hidden, weight.T)
        both, remembered = summed[:, : 2 * width], summed[:, 2 * width :]
        reset, update = torch.sigmoid(drive[:, t, : 2 * width] + both).chunk(2, 1)
        proposal = torch.tanh(drive[:, t, 2 * width :] + reset * remembered)
        output = torch.lerp(proposal, hidden, update)
        if masks.valid is not None:
            output = torch.where(masks.valid[:, t, None], output, hidden)
        hidden = output
        found.outputs[:, t], found.gates[:, t] = hidden, torch.cat([reset, update, proposal, remembered], -1)
    return found


def backward_loop(
    grad_outputs: Tensor, gates: Tensor, before: Tensor, weight: Tensor, masks: StepMasks
) -> tuple[Tensor, Tensor]:
    """Gradients of drive and hidden in PyTorch; `before` `[B, T, H]` is the hidden state that each step read."""
    width = before.shape[2]
    grad_drive = gates.new_empty(*gates.shape[:2], 3 * width)
    grad = torch.zeros_like(before[:, 0])
    for t in range(before.shape[1] - 1, -1, -1):
        grad = grad + grad_outputs[:, t]
        kept = torch.zeros_like(grad)  # what passes by the integrator
        if masks.valid is not None:
            kept = grad.masked_fill(masks.valid[:, t, None], 0)
            grad = grad.masked_fill(~masks.valid[:, t, None], 0)
        reset, update, proposal, remembered = gates[:, t].chunk(4, 1)
        grad_proposal = grad * (1 - update) * (1 - proposal * proposal)
        grad_update = grad * (before[:, t] - proposal) * update * (1 - update)
        grad_reset = grad_proposal * remembered * reset * (1 - reset)
        grad_drive[:, t] = torch.cat([grad_reset, grad_update, grad_proposal], -1)
        joined = torch.cat([grad_reset, grad_update, grad_proposal * reset], -1)
        grad = torch.addmm(kept + grad * update, joined, weight)
        if masks.restart is not None:
            grad = grad.masked_fill(masks.restart[:, t, None], 0)
    return grad_drive, grad


def compiled_forward(drive: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, masks: StepMasks) -> GruTrajectory:
    """`forward_loop`, compiled."""
    from .compiled_gru_enn import forward_rows
    from .tiles_enn import pack

    found = empty_trajectory(drive, hidden)
    inputs = (drive, hidden, pack(weight.T), bias, *step_flags(masks, drive), 1.0)
    run_over_rows(forward_rows, len(drive), inputs, (found.gates, found.outputs))
    return found


def compiled_backward(
    grad_outputs: Tensor, gates: Tensor, before: Tensor, weight: Tensor, masks: StepMasks
) -> tuple[Tensor, Tensor]:
    """`backward_loop`, compiled."""
    from .compiled_gru_enn import backward_rows
    from .tiles_enn import pack

    grad_drive = gates.new_empty(*gates.shape[:2], 3 * before.shape[2])
    grad_hidden = torch.empty_like(before[:, 0])
    inputs = (grad_outputs, gates, before, pack(weight), *step_flags(masks, before), 1.0)
    run_over_rows(backward_rows, len(before), inputs, (grad_drive, grad_hidden))
    return grad_drive, grad_hidden
