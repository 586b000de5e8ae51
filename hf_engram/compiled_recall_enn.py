"""What is sequential in a chunk of the memory: the recall weights, forward and backward, as compiled loops.

The recurrence and its names are those of `recall_enn`. Arrays are those of one row of the batch; a chunk is the steps
from `begin` to `end`. Constants (`one`, `scale`, `temperature`, ...) come in the arrays' dtype: a literal would widen
float32 arithmetic to float64.
"""

import numpy as np

from .numba_enn import compiled_inside
from .tiles_enn import clear


@compiled_inside
def decay_factors(keep, write, restart, begin, end, decay, carry, to_end):
    """How much of each write, and of the chunk's first trace, is left at each of C steps.

    Args:
        keep, write: what a step leaves of the trace, and the weight of its write, `[T]`.
        decay: filled with the weight of the write of step r in the trace that step t reads, `[C, C]`.
        carry: filled with the weight of the first trace in the trace that step t reads, `[C + 1]`; the last is that
            after the chunk.
        to_end: filled with the weight of the write of step r in the trace after the chunk, `[C]`.
    """
    clear(decay, 0)
    for t in range(len(to_end)):
        to_end[t] = 0
    carry[0] = 1
    for t in range(end - begin):
        if restart[begin + t]:
            carry[t] = 0
            for r in range(t):
                to_end[r] = 0
        left = keep[begin + t]
        for r in range(t):
            decay[t, r] = to_end[r]
            to_end[r] *= left
        to_end[t] = write[begin + t]
        carry[t + 1] = carry[t] * left


@compiled_inside
def recall_forward(
    begin, end, bank_dot, gram, trace_dot, squared, inverse_norm, bank_squared, mu, nu, keep, write, restart,
    one, scale, temperature, floor, recall, product, inverse_slot_norm,
):  # fmt: skip
    """Fill the recall weights, w, and 1 / |E| of a chunk, each `[T, N]`; `mu` and `nu` `[N]` are used up."""
    slots = len(mu)
    zero, two = one - one, one + one
    for t in range(end - begin):
        p, a, w = bank_dot[begin + t], recall[begin + t], product[begin + t]
        slot_norm = inverse_slot_norm[begin + t]
        if restart[begin + t]:
            for n in range(slots):
                mu[n] = nu[n] = zero
        for n in range(slots):
            w[n] = trace_dot[t, n]
        for r in range(t):
            weight, earlier = gram[t, r], recall[begin + r]
            for n in range(slots):
                w[n] += weight * earlier[n]
        by_norm = inverse_norm[begin + t] / temperature
        largest = -np.inf * one
        for n in range(slots):
            slot_squared = bank_squared[n] + two * scale * mu[n] + scale * scale * nu[n]
            slot_norm[n] = one / np.sqrt(max(slot_squared, floor))
            a[n] = (p[n] + scale * w[n]) * by_norm * slot_norm[n]
            largest = max(largest, a[n])
        total = zero
        for n in range(slots):
            a[n] = np.exp(a[n] - largest)
            total += a[n]
        total = one / total
        left, eta, z_squared = keep[begin + t], write[begin + t], squared[begin + t]
        for n in range(slots):
            a[n] *= total
            written = eta * a[n]
            mu[n] = left * mu[n] + written * p[n]
            nu[n] = left * left * nu[n] + two * left * written * w[n] + written * written * z_squared


@compiled_inside
def recall_backward(
    begin, end, grad_recall, bank_dot, gram, squared, inverse_norm, recall, product, inverse_slot_norm, keep, write,
    restart, one, scale, temperature, largest_norm,
    grad_bank_dot, grad_product, grad_squared, grad_inverse_norm, grad_bank_squared, grad_mu, grad_nu,
):  # fmt: skip
    """Fill the gradients of `recall_forward`, each `[C, N]` or `[C]`; the last three, `[N]`, are added to.

    `grad_recall` `[C, N]` is that of the recall weights as far as the rest of the chunk uses them, and ends whole.
    """
    slots, steps = len(grad_mu), end - begin
    zero, two = one - one, one + one
    half = one / two
    for t in range(steps - 1, -1, -1):
        a, w, p, slot_norm = recall[begin + t], product[begin + t], bank_dot[begin + t], inverse_slot_norm[begin + t]
        d_a, d_p, d_w = grad_recall[t], grad_bank_dot[t], grad_product[t]
        for k in range(t + 1, steps):
            weight, later = gram[k, t], grad_product[k]
            for n in range(slots):
                d_a[n] += weight * later[n]
        left, eta, z_squared = keep[begin + t], write[begin + t], squared[begin + t]
        dot, d_squared = zero, zero
        for n in range(slots):
            d_a[n] += eta * p[n] * grad_mu[n] + two * eta * (left * w[n] + eta * a[n] * z_squared) * grad_nu[n]
            dot += d_a[n] * a[n]
            d_squared += eta * eta * a[n] * a[n] * grad_nu[n]
        grad_squared[t] = d_squared
        d_inverse_norm = zero
        by_norm = inverse_norm[begin + t]
        for n in range(slots):
            d_logit = a[n] * (d_a[n] - dot) / temperature * slot_norm[n]
            x = p[n] + scale * w[n]
            d_x = d_logit * by_norm
            d_inverse_norm += d_logit * x
            d_slot_squared = -d_x * x * slot_norm[n] * slot_norm[n] * half if slot_norm[n] < largest_norm else zero
            d_p[n] = d_x + eta * a[n] * grad_mu[n]
            d_w[n] = scale * d_x + two * left * eta * a[n] * grad_nu[n]
            grad_mu[n] = left * grad_mu[n] + two * scale * d_slot_squared
            grad_nu[n] = left * left * grad_nu[n] + scale * scale * d_slot_squared
            grad_bank_squared[n] += d_slot_squared
        grad_inverse_norm[t] = d_inverse_norm
        if restart[begin + t]:
            for n in range(slots):
                grad_mu[n] = grad_nu[n] = zero
