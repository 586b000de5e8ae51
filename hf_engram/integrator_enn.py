"""The integrator over a sequence, with the values and gradients of `ops_enn.integrator_step` at every step.

Encodings and recalled memories enter through one large product for all steps. What remains is a recurrence over the
hidden state alone; in its backward pass only the gradient of the hidden state is sequential, so that the gradients of
the weights are one product each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch_enn import OPERATORS, use_compiled
from .numba_enn import flags, number_of_parts, run_over_rows
from .ops_enn import CellSettings, CellWeights, StepMasks, state_dtype


class Recurrence(NamedTuple):
    """What the recurrence over the hidden state reads beside its inputs. J is K, or K + H with a gate."""

    from_hidden: Tensor  # [J, H], the hidden state's part of the inner layer and of the gate
    to_output: Tensor  # [H, K]
    output_bias: Tensor  # [H]
    norm: tuple[Tensor, Tensor] | None  # weight and bias, [H]

    @property
    def depth(self) -> int:
        """K, the width of the inner layer; what follows it is the gate."""
        return self.to_output.shape[1]

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return len(self.from_hidden) > self.depth


class Trajectory(NamedTuple):
    """What the recurrence finds at every step."""

    outputs: Tensor  # [B, T, H], the hidden state after the step
    inner: Tensor  # [B, T, J], the inner layer and the gate, after their activations
    proposal: Tensor  # [B, T, H], what the norm reads
    mean: Tensor  # of the proposal, 0 without a norm, [B, T]
    scale: Tensor  # 1 / standard deviation of the proposal, 1 without a norm, [B, T]


def integrator_scan(
    z: Tensor, recalled: Tensor, hidden: Tensor, weights: CellWeights, settings: CellSettings, masks: StepMasks
) -> Tensor:
    """All hidden states of a sequence, given its encodings and recalled memories.

    Args:
        z, recalled: `[B, T, H]`.
        hidden: hidden state before the first step `[B, H]`.
        masks: each `[B, T]`, as in `ops_enn.enn_loop`.

    Returns:
        the hidden state after every step `[B, T, H]`.
    """
    width = hidden.shape[-1]
    weight, bias = weights.integrator_weight, weights.integrator_bias
    if weights.gate is not None:
        weight, bias = torch.cat([weight, weights.gate[0]]), torch.cat([bias, weights.gate[1]])
    from_inputs, from_hidden = weight.split([2 * width, width], dim=1)
    drive = F.linear(torch.cat([z, recalled], -1), from_inputs, bias)
    norm_weight, norm_bias = weights.output_norm or (None, None)
    dtype = weight.dtype
    with torch.autocast(drive.device.type, enabled=False):
        outputs, *_ = integrator_recurrence(
            drive.to(dtype),
            hidden.to(dtype),
            from_hidden,
            weights.output_weight,
            weights.output_bias,
            norm_weight,
            norm_bias,
            settings.layer_norm_eps,
            masks.valid,
            masks.restart,
        )
    return outputs


@torch.library.custom_op(f"{OPERATORS}::integrator_recurrence", mutates_args=())
def integrator_recurrence(
    drive: Tensor,
    hidden: Tensor,
    from_hidden: Tensor,
    to_output: Tensor,
    output_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    valid: Tensor | None,
    restart: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A [`Trajectory`], given what encodings and recalled memories add to the inner layer and the gate, `[B, T, J]`."""
    norm = None if norm_weight is None else (norm_weight, norm_bias)
    weights = Recurrence(from_hidden, to_output, output_bias, norm)
    run = compiled_forward if use_compiled(drive) else forward_loop
    return tuple(run(drive, hidden, weights, eps, StepMasks(valid, restart)))


@torch.library.custom_op(f"{OPERATORS}::integrator_recurrence_backward", mutates_args=())
def integrator_recurrence_backward(
    grad_outputs: Tensor,
    outputs: Tensor,
    inner: Tensor,
    proposal: Tensor,
    mean: Tensor,
    scale: Tensor,
    hidden: Tensor,
    from_hidden: Tensor,
    to_output: Tensor,
    output_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    valid: Tensor | None,
    restart: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of drive, hidden, from_hidden, to_output, output_bias, norm_weight and norm_bias."""
    norm = None if norm_weight is None else (norm_weight, norm_bias)
    weights = Recurrence(from_hidden, to_output, output_bias, norm)
    found = Trajectory(outputs, inner, proposal, mean, scale)
    before = states_before(hidden, outputs, restart)
    run = compiled_backward if use_compiled(inner) else backward_loop
    grads = run(grad_outputs, found, before, weights, StepMasks(valid, restart))
    rows_inner, rows_proposal = grads.inner.flatten(0, 1), grads.proposal.flatten(0, 1)
    return (
        grads.inner,
        grads.hidden,
        rows_inner.T @ before.flatten(0, 1),
        rows_proposal.T @ inner.flatten(0, 1)[:, : weights.depth],
        rows_proposal.sum(0),
        grads.norm_weight,
        grads.norm_bias,
    )


def states_before(hidden: Tensor, outputs: Tensor, restart: Tensor | None) -> Tensor:
    """The hidden state that each step read `[B, T, H]`, given the first one and those after the steps."""
    before = torch.cat([hidden[:, None], outputs[:, :-1]], 1)
    return before if restart is None else before.masked_fill(restart[..., None], 0)


class Gradients(NamedTuple):
    """What the backward recurrence finds."""

    inner: Tensor  # before the activations, and so of the drive, [B, T, J]
    proposal: Tensor  # before the activation, [B, T, H]
    hidden: Tensor  # [B, H]
    norm_weight: Tensor  # [H]
    norm_bias: Tensor  # [H]


def empty_trajectory(drive: Tensor, hidden: Tensor) -> Trajectory:
    """Room for what the recurrence finds."""
    batch, steps, both = drive.shape
    width = hidden.shape[1]
    precise = state_dtype(drive.dtype)
    return Trajectory(
        drive.new_empty(batch, steps, width),
        drive.new_empty(batch, steps, both),
        drive.new_empty(batch, steps, width),
        drive.new_empty(batch, steps, dtype=precise),
        drive.new_empty(batch, steps, dtype=precise),
    )


@integrator_recurrence.register_fake
def _(drive, hidden, *others):
    return tuple(empty_trajectory(drive, hidden))


@integrator_recurrence_backward.register_fake
def _(grad_outputs, outputs, inner, proposal, mean, scale, hidden, from_hidden, to_output, output_bias, *others):
    like = (inner, hidden, from_hidden, to_output, output_bias, output_bias, output_bias)
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


def _save(ctx, inputs, output):
    _, *weights, _, valid, restart = inputs
    ctx.save_for_backward(*output, *weights, valid, restart)


def _backward(ctx, grad_outputs, *_):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
    *grads, grad_norm_weight, grad_norm_bias = integrator_recurrence_backward(grad_outputs, *saved)
    has_norm = saved[9] is not None
    return *grads, *((grad_norm_weight, grad_norm_bias) if has_norm else (None, None)), None, None, None


integrator_recurrence.register_autograd(_backward, setup_context=_save)


def forward_loop(drive: Tensor, hidden: Tensor, weights: Recurrence, eps: float, masks: StepMasks) -> Trajectory:
    """The recurrence in PyTorch."""
    found = empty_trajectory(drive, hidden)
    precise, depth = found.mean.dtype, weights.depth
    found.mean.zero_()
    found.scale.fill_(1)
    for t in range(drive.shape[1]):
        if masks.restart is not None:
            hidden = hidden.masked_fill(masks.restart[:, t, None], 0)
        summed = torch.addmm(drive[:, t], hidden, weights.from_hidden.T)
        summed[:, :depth].relu_()
        summed[:, depth:].sigmoid_()
        proposal = torch.addmm(weights.output_bias, summed[:, :depth], weights.to_output.T)
        output = proposal if weights.gated else proposal.relu_()
        if weights.norm is not None:
            plain = proposal.to(precise)
            variance, mean = torch.var_mean(plain, -1, correction=0)
            scale = (variance + eps).rsqrt()
            output = ((plain - mean[:, None]) * scale[:, None]).to(drive.dtype) * weights.norm[0] + weights.norm[1]
            found.mean[:, t], found.scale[:, t] = mean, scale
        if weights.gated:
            output = torch.lerp(hidden, output, summed[:, depth:])
        if masks.valid is not None:
            output = torch.where(masks.valid[:, t, None], output, hidden)
        hidden = output
        found.outputs[:, t], found.inner[:, t], found.proposal[:, t] = hidden, summed, proposal
    return found


def backward_loop(
    grad_outputs: Tensor, found: Trajectory, before: Tensor, weights: Recurrence, masks: StepMasks
) -> Gradients:
    """Gradients of the recurrence in PyTorch; `before` `[B, T, H]` is the hidden state that each step read."""
    depth, precise = weights.depth, found.mean.dtype
    all_inner, all_proposals = torch.empty_like(found.inner), torch.empty_like(found.proposal)
    norm_weight, norm_bias = weights.norm or (None, None)
    grad_norm_weight, grad_norm_bias = (before.new_zeros(before.shape[-1], dtype=precise) for _ in range(2))
    grad = torch.zeros_like(before[:, 0])
    for t in range(before.shape[1] - 1, -1, -1):
        grad = grad + grad_outputs[:, t]
        kept = torch.zeros_like(grad)  # what passes by the integrator
        if masks.valid is not None:
            kept = grad.masked_fill(masks.valid[:, t, None], 0)
            grad = grad.masked_fill(~masks.valid[:, t, None], 0)
        inner, proposal = found.inner[:, t], found.proposal[:, t]
        normalized = (proposal.to(precise) - found.mean[:, t, None]) * found.scale[:, t, None]
        grad_gate = inner[:, depth:]
        if weights.gated:
            gate, candidate = inner[:, depth:], normalized.to(grad.dtype)
            candidate = candidate if weights.norm is None else candidate * norm_weight + norm_bias
            grad_gate = grad * (candidate - before[:, t]) * gate * (1 - gate)
            kept = kept + grad * (1 - gate)
            grad = grad * gate
        grad_proposal = grad
        if weights.norm is not None:
            precise_grad = grad.to(precise)
            grad_norm_weight += (precise_grad * normalized).sum(0)
            grad_norm_bias += precise_grad.sum(0)
            scaled = precise_grad * norm_weight
            along = normalized * (scaled * normalized).mean(-1, keepdim=True)
            centred = scaled - scaled.mean(-1, keepdim=True) - along
            grad_proposal = (centred * found.scale[:, t, None]).to(grad.dtype)
        if not weights.gated:
            grad_proposal = torch.where(proposal > 0, grad_proposal, 0)
        grad_inner = torch.where(inner[:, :depth] > 0, grad_proposal @ weights.to_output, 0)
        all_inner[:, t] = torch.cat([grad_inner, grad_gate], -1)
        all_proposals[:, t] = grad_proposal
        grad = torch.addmm(kept, all_inner[:, t], weights.from_hidden)
        if masks.restart is not None:
            grad = grad.masked_fill(masks.restart[:, t, None], 0)
    norm_grads = (grad_norm_weight.to(grad.dtype), grad_norm_bias.to(grad.dtype))
    return Gradients(all_inner, all_proposals, grad, *norm_grads)


def step_flags(masks: StepMasks, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which steps are valid and which begin a document, for compiled loops over `like` `[B, T, ...]`."""
    return flags(masks.valid, like, True), flags(masks.restart, like, False)


def compiled_forward(drive: Tensor, hidden: Tensor, weights: Recurrence, eps: float, masks: StepMasks) -> Trajectory:
    """`forward_loop`, compiled."""
    from .compiled_integrator_enn import forward_rows
    from .tiles_enn import pack

    found = empty_trajectory(drive, hidden)
    packed = (pack(weights.from_hidden.T), pack(weights.to_output.T), weights.output_bias)
    norm = weights.norm or 2 * (drive.new_empty(0),)
    constants = (weights.depth, 1.0, 1 / hidden.shape[1], eps)
    inputs = (drive, hidden, *packed, *norm, *step_flags(masks, drive), *constants)
    outputs = (found.inner, found.proposal, found.mean, found.scale, found.outputs)
    run_over_rows(forward_rows, len(drive), inputs, outputs)
    return found


def compiled_backward(
    grad_outputs: Tensor, found: Trajectory, before: Tensor, weights: Recurrence, masks: StepMasks
) -> Gradients:
    """`backward_loop`, compiled."""
    from .compiled_integrator_enn import backward_rows
    from .tiles_enn import pack

    grad_inner, grad_proposal = torch.empty_like(found.inner), torch.empty_like(found.proposal)
    grad_hidden = torch.empty_like(before[:, 0])
    by_part = tuple(before.new_zeros(number_of_parts(len(before)), before.shape[-1]) for _ in range(2))  # of the norm
    norm = weights.norm or 2 * (before.new_empty(0),)
    inputs = (
        *(grad_outputs, found.inner, found.proposal, found.mean, found.scale, before),
        *(pack(weights.from_hidden), pack(weights.to_output), *norm, *step_flags(masks, before)),
        *(weights.depth, 1.0, 1 / before.shape[-1]),
    )
    run_over_rows(backward_rows, len(before), inputs, (grad_inner, grad_proposal, *by_part, grad_hidden))
    return Gradients(grad_inner, grad_proposal, grad_hidden, *(grad.sum(0) for grad in by_part))
