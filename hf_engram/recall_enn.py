"""The recall weights of one chunk, forward and backward, in PyTorch: what is sequential in `chunkwise_enn`.

Notation, per row and slot: w = z_t · A_t, mu = bank · trace, nu = |trace|². The squared norm of a slot of bank
plus trace is then `bank² + 2 s mu + s² nu`, and both running vectors follow from the recall weights alone. With λ what
a step keeps of the trace and η the weight of its write:

    w_t   = trace_dot_t + Σ_{r<t} gram_tr a_r
    a_t   = softmax((bank_dot_t + s w_t) / (|z_t| |E_t| τ))
    mu    ← λ mu + η a_t bank_dot_t
    nu    ← λ² nu + 2 λ η a_t w_t + η² a_t² |z_t|²
"""

import torch
from torch import Tensor

from .dispatch_enn import OPERATORS
from .ops_enn import SQUARED_NORM_FLOOR


@torch.library.custom_op(f"{OPERATORS}::chunk_recall", mutates_args=())
def chunk_recall(
    bank_dot: Tensor,
    gram: Tensor,
    trace_dot: Tensor,
    squared: Tensor,
    inverse_norm: Tensor,
    bank_squared: Tensor,
    mu: Tensor,
    nu: Tensor,
    keep: Tensor,
    write: Tensor,
    restart: Tensor | None,
    scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recall weights, w and 1 / |E| of C steps, each `[B, C, N]`.

    Args:
        bank_dot: z_t · bank `[B, C, N]`.
        gram: decayed z_t · z_r, zero unless r < t, `[B, C, C]`.
        trace_dot: decayed z_t · trace `[B, C, N]`.
        squared, inverse_norm: |z_t|² and 1 / |z_t|, `[B, C]`.
        bank_squared: |bank|² `[N]`.
        mu, nu: at the start of the chunk `[B, N]`.
        keep, write: λ and η of every step `[B, C]`.
        restart: bool `[B, C]`; the trace is zero before these steps.
    """
    recall = torch.zeros_like(bank_dot)
    product, inverse_slot_norm = torch.empty_like(bank_dot), torch.empty_like(bank_dot)
    for t in range(bank_dot.shape[1]):
        if restart is not None:
            mu, nu = mu.masked_fill(restart[:, t, None], 0), nu.masked_fill(restart[:, t, None], 0)
        w = torch.baddbmm(trace_dot[:, t, None], gram[:, t, None, :t], recall[:, :t])[:, 0]
        slot_norm = (bank_squared + 2 * scale * mu + scale**2 * nu).clamp_min(SQUARED_NORM_FLOOR).rsqrt()
        logits = (bank_dot[:, t] + scale * w) * inverse_norm[:, t, None] * slot_norm
        a = torch.softmax(logits / temperature, -1)
        recall[:, t], product[:, t], inverse_slot_norm[:, t] = a, w, slot_norm
        left, eta = keep[:, t, None], write[:, t, None]
        mu = left * mu + eta * a * bank_dot[:, t]
        nu = left**2 * nu + 2 * left * eta * a * w + eta**2 * a**2 * squared[:, t, None]
    return recall, product, inverse_slot_norm


@torch.library.custom_op(f"{OPERATORS}::chunk_recall_backward", mutates_args=())
def chunk_recall_backward(
    grad_recall: Tensor,
    recall: Tensor,
    product: Tensor,
    inverse_slot_norm: Tensor,
    bank_dot: Tensor,
    gram: Tensor,
    squared: Tensor,
    inverse_norm: Tensor,
    keep: Tensor,
    write: Tensor,
    restart: Tensor | None,
    scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of bank_dot, trace_dot, squared, inverse_norm, bank_squared, mu and nu."""
    grad_bank_dot, grad_product = torch.empty_like(bank_dot), torch.empty_like(bank_dot)
    grad_squared, grad_inverse_norm = torch.empty_like(squared), torch.empty_like(squared)
    grad_mu = torch.zeros_like(bank_dot[:, 0])
    grad_nu, grad_bank_squared = torch.zeros_like(grad_mu), torch.zeros_like(grad_mu)
    largest_norm = SQUARED_NORM_FLOOR**-0.5
    for t in range(bank_dot.shape[1] - 1, -1, -1):
        a, w, p, slot_norm = recall[:, t], product[:, t], bank_dot[:, t], inverse_slot_norm[:, t]
        left, eta = keep[:, t, None], write[:, t, None]
        later = torch.bmm(gram[:, t + 1 :, t, None].mT, grad_product[:, t + 1 :])[:, 0]
        grad_a = (
            grad_recall[:, t]
            + eta * p * grad_mu
            + (2 * left * eta * w + 2 * eta**2 * a * squared[:, t, None]) * grad_nu
            + later
        )
        grad_squared[:, t] = (eta**2 * a**2 * grad_nu).sum(-1)
        grad_logits = a * (grad_a - (grad_a * a).sum(-1, keepdim=True)) / temperature
        x = p + scale * w
        grad_x = grad_logits * inverse_norm[:, t, None] * slot_norm
        grad_inverse_norm[:, t] = (grad_logits * x * slot_norm).sum(-1)
        grad_slot_squared = torch.where(slot_norm < largest_norm, -0.5 * grad_x * x * slot_norm**2, 0)
        grad_bank_dot[:, t] = grad_x + eta * a * grad_mu
        grad_product[:, t] = scale * grad_x + 2 * left * eta * a * grad_nu
        grad_mu = left * grad_mu + 2 * scale * grad_slot_squared
        grad_nu = left**2 * grad_nu + scale**2 * grad_slot_squared
        grad_bank_squared += grad_slot_squared
        if restart is not None:
            grad_mu = grad_mu.masked_fill(restart[:, t, None], 0)
            grad_nu = grad_nu.masked_fill(restart[:, t, None], 0)
    grads = (grad_bank_dot, grad_product, grad_squared, grad_inverse_norm)
    return *grads, grad_bank_squared.sum(0), grad_mu, grad_nu


@chunk_recall.register_fake
def _(bank_dot, *others):
    return tuple(torch.empty_like(bank_dot) for _ in range(3))


@chunk_recall_backward.register_fake
def _(grad_recall, recall, product, inverse_slot_norm, bank_dot, gram, squared, inverse_norm, *others):
    row = bank_dot[:, 0]
    like = (bank_dot, bank_dot, squared, inverse_norm, row[0], row, row)
    return tuple(torch.empty_like(tensor) for tensor in like)


def _save(ctx, inputs, output):
    bank_dot, gram, _, squared, inverse_norm, _, _, _, keep, write, restart, *ctx.constants = inputs
    ctx.save_for_backward(*output, bank_dot, gram, squared, inverse_norm, keep, write, restart)


def _backward(ctx, grad_recall, *_):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
    grads = chunk_recall_backward(grad_recall, *saved, *ctx.constants)
    grad_bank_dot, grad_product, *others = grads
    return grad_bank_dot, grad_product @ saved[0].mT, grad_product, *others, *5 * (None,)


chunk_recall.register_autograd(_backward, setup_context=_save)
