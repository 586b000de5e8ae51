"""The recall recurrence of one chunk, forward and backward: compiled per row with numba on CPU, else in PyTorch.

Notation, per row and slot: w = z_t · A_t, mu = bank · trace, nu = |trace|². The squared norm of a slot of bank plus
trace is then `bank² + 2 s mu + s² nu`, and both running vectors follow from the recall weights alone:

    w_t   = trace_dot_t + Σ_{r<t} gram_tr a_r
    a_t   = softmax((bank_dot_t + s w_t) / (|z_t| |E_t| τ))
    mu    ← λ mu + η a_t bank_dot_t
    nu    ← λ² nu + 2 λ η a_t w_t + η² a_t² |z_t|²
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_enn import SQUARED_NORM_FLOOR, CellSettings


class ChunkTerms(NamedTuple):
    """What both passes over a chunk read."""

    bank_dot: Tensor  # z_t · bank, [B, C, N]
    gram: Tensor  # decayed z_t · z_r, zero unless r < t, [B, C, C]
    squared: Tensor  # |z_t|², [B, C]
    inverse_norm: Tensor  # 1 / |z_t|, [B, C]
    keep: Tensor  # what a step leaves of the trace, 1 - hebbian_lr, 1 at padding, [B, C]
    write: Tensor  # weight of a step's write, hebbian_lr, 0 where nothing is written, [B, C]
    restart: Tensor | None  # bool [B, C]; the trace is zero before these steps


class ChunkRecalls(NamedTuple):
    """What the forward pass finds, each `[B, C, N]`."""

    recall: Tensor  # recall weights a
    product: Tensor  # w
    inverse_slot_norm: Tensor  # 1 / |E|


class ChunkGradients(NamedTuple):
    """What the backward pass finds."""

    bank_dot: Tensor  # [B, C, N]
    product: Tensor  # of w, and so of trace_dot, [B, C, N]
    squared: Tensor  # [B, C]
    inverse_norm: Tensor  # [B, C]
    bank_squared: Tensor  # [N]
    mu: Tensor  # at the start of the chunk, [B, N]
    nu: Tensor  # at the start of the chunk, [B, N]


def recall_forward(
    terms: ChunkTerms, trace_dot: Tensor, bank_squared: Tensor, mu: Tensor, nu: Tensor, settings: CellSettings
) -> ChunkRecalls:
    """Run the recurrence.

    Args:
        trace_dot: decayed z_t · trace `[B, C, N]`.
        bank_squared: |bank|² `[N]`.
        mu, nu: at the start of the chunk `[B, N]`.
    """
    bank_dot, gram, squared, inverse_norm, keeps, writes, restart = terms
    scale = settings.trace_scale
    recall = torch.zeros_like(bank_dot)
    product, inverse_slot_norm = torch.empty_like(bank_dot), torch.empty_like(bank_dot)
    for t in range(bank_dot.shape[1]):
        if restart is not None:
            mu, nu = mu.masked_fill(restart[:, t, None], 0), nu.masked_fill(restart[:, t, None], 0)
        w = torch.baddbmm(trace_dot[:, t, None], gram[:, t, None, :t], recall[:, :t])[:, 0]
        slot_norm = (bank_squared + 2 * scale * mu + scale**2 * nu).clamp_min(SQUARED_NORM_FLOOR).rsqrt()
        logits = (bank_dot[:, t] + scale * w) * inverse_norm[:, t, None] * slot_norm
        a = torch.softmax(logits / settings.temperature, -1)
        recall[:, t], product[:, t], inverse_slot_norm[:, t] = a, w, slot_norm
        keep, eta = keeps[:, t, None], writes[:, t, None]
        mu = keep * mu + eta * a * bank_dot[:, t]
        nu = keep**2 * nu + 2 * keep * eta * a * w + eta**2 * a**2 * squared[:, t, None]
    return ChunkRecalls(recall, product, inverse_slot_norm)


def recall_backward(
    grad_recall: Tensor, terms: ChunkTerms, found: ChunkRecalls, settings: CellSettings
) -> ChunkGradients:
    """Gradients of `recall_forward`, given that of the recall weights, `[B, C, N]`."""
    bank_dot, gram, squared, inverse_norm, keeps, writes, restart = terms
    recall, product, inverse_slot_norm = found
    scale = settings.trace_scale
    grad_bank_dot, grad_product = torch.empty_like(bank_dot), torch.empty_like(bank_dot)
    grad_squared, grad_inverse_norm = torch.empty_like(squared), torch.empty_like(squared)
    grad_mu = torch.zeros_like(bank_dot[:, 0])
    grad_nu, grad_bank_squared = torch.zeros_like(grad_mu), torch.zeros_like(grad_mu)
    largest_norm = SQUARED_NORM_FLOOR**-0.5
    for t in range(bank_dot.shape[1] - 1, -1, -1):
        a, w, p, slot_norm = recall[:, t], product[:, t], bank_dot[:, t], inverse_slot_norm[:, t]
        keep, eta = keeps[:, t, None], writes[:, t, None]
        later = torch.bmm(gram[:, t + 1 :, t, None].mT, grad_product[:, t + 1 :])[:, 0]
        grad_a = (
            grad_recall[:, t]
            + eta * p * grad_mu
            + (2 * keep * eta * w + 2 * eta**2 * a * squared[:, t, None]) * grad_nu
            + later
        )
        grad_squared[:, t] = (eta**2 * a**2 * grad_nu).sum(-1)
        grad_logits = a * (grad_a - (grad_a * a).sum(-1, keepdim=True)) / settings.temperature
        x = p + scale * w
        grad_x = grad_logits * inverse_norm[:, t, None] * slot_norm
        grad_inverse_norm[:, t] = (grad_logits * x * slot_norm).sum(-1)
        grad_slot_squared = torch.where(slot_norm < largest_norm, -0.5 * grad_x * x * slot_norm**2, 0)
        grad_bank_dot[:, t] = grad_x + eta * a * grad_mu
        grad_product[:, t] = scale * grad_x + 2 * keep * eta * a * grad_nu
        grad_mu = keep * grad_mu + 2 * scale * grad_slot_squared
        grad_nu = keep**2 * grad_nu + scale**2 * grad_slot_squared
        grad_bank_squared += grad_slot_squared
        if restart is not None:
            grad_mu = grad_mu.masked_fill(restart[:, t, None], 0)
            grad_nu = grad_nu.masked_fill(restart[:, t, None], 0)
    return ChunkGradients(
        grad_bank_dot,
        grad_product,
        grad_squared,
        grad_inverse_norm,
        grad_bank_squared.sum(0),
        grad_mu,
        grad_nu,
    )
