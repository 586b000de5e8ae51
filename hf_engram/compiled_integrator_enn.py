"""The integrator recurrence of `integrator_enn` as loops over steps, for some rows at a time.

`inner` holds the inner layer and, with a gate, the gate behind it; `depth` says where. The norm's arrays have size 0 if
there is none. The constants `one`, `share` (1 over the width) and `eps` come in the arrays' dtype: a literal would
widen float32 arithmetic to float64.
"""

import numpy as np

from .numba_enn import compiled, compiled_inside
from .tiles_enn import clear, copy_out, multiply_add, whole_tiles, zeros


@compiled_inside
def hidden_before(before, hidden, outputs, restart, first, last, t):
    """Copy the hidden states that step t of rows `first` to `last` reads to `before`."""
    for b in range(first, last):
        last_hidden = hidden[b] if t == 0 else outputs[b, t - 1]
        for n in range(outputs.shape[2]):
            before[b - first, n] = 0 if restart[b, t] else last_hidden[n]


@compiled
def forward_rows(
    part, first, last, drive, hidden, from_hidden, to_output, output_bias, norm_weight, norm_bias, valid, restart,
    depth, one, share, eps, inner, proposal, mean, scale, outputs,
):  # fmt: skip
    """`integrator_enn.forward_loop` for rows `first` to `last`; `from_hidden` and `to_output` are packed."""
    steps, width = outputs.shape[1:]
    both = inner.shape[2]
    zero = one - one
    rows = last - first
    before, summed = zeros(rows, width, outputs), zeros(rows, whole_tiles(both), outputs)
    proposed = zeros(rows, whole_tiles(width), outputs)
    for t in range(steps):
        hidden_before(before, hidden, outputs, restart, first, last, t)
        for b in range(first, last):
            r = b - first
            for n in range(width):
                proposed[r, n] = output_bias[n]
            for k in range(both):
                summed[r, k] = drive[b, t, k]
        multiply_add(summed, before, from_hidden)
        for b in range(first, last):
            r = b - first
            for k in range(depth):
                summed[r, k] = max(summed[r, k], zero)
                inner[b, t, k] = summed[r, k]
            for n in range(both - depth):
                inner[b, t, depth + n] = one / (one + np.exp(-summed[r, depth + n]))
        multiply_add(proposed, summed, to_output)
        for b in range(first, last):
            row, last_hidden, output, plain = proposed[b - first], before[b - first], outputs[b, t], proposal[b, t]
            for n in range(width):
                plain[n] = row[n] if both > depth else max(row[n], zero)
            if not valid[b, t]:
                for n in range(width):
                    output[n] = last_hidden[n]
                continue
            mean[b, t], scale[b, t] = zero, one
            if norm_weight.size > 0:
                average, variance = zero, zero
                for n in range(width):
                    average += plain[n]
                average *= share
                for n in range(width):
                    variance += (plain[n] - average) * (plain[n] - average)
                factor = one / np.sqrt(variance * share + eps)
                mean[b, t], scale[b, t] = average, factor
                for n in range(width):
                    output[n] = (plain[n] - average) * factor * norm_weight[n] + norm_bias[n]
            else:
                for n in range(width):
                    output[n] = plain[n]
            if both > depth:
                gate = inner[b, t, depth:]
                for n in range(width):
                    output[n] = last_hidden[n] + gate[n] * (output[n] - last_hidden[n])


@compiled
def backward_rows(
    part, first, last, grad_outputs, inner, proposal, mean, scale, before, to_hidden, from_output,
    norm_weight, norm_bias, valid, restart, depth, one, share,
    grad_inner, grad_proposal, grad_norm_weight, grad_norm_bias, grad_hidden,
):  # fmt: skip
    """`integrator_enn.backward_loop` for rows `first` to `last`; `to_hidden` and `from_output` are packed.

    `grad_norm_weight` and `grad_norm_bias` are `[parts, H]`, and zero at the start.
    """
    steps, width = grad_outputs.shape[1:]
    both = inner.shape[2]
    zero = one - one
    rows = last - first
    grad, grad_proposed = zeros(rows, whole_tiles(width), before), zeros(rows, width, before)
    grad_summed, grad_joined = zeros(rows, whole_tiles(depth), before), zeros(rows, both, before)
    normed, d_normed = np.empty(width, before.dtype), np.empty(width, before.dtype)
    for t in range(steps - 1, -1, -1):
        for b in range(first, last):
            r = b - first
            d_hidden, d_proposed, plain = grad[r], grad_proposed[r], proposal[b, t]
            for n in range(width):
                d_hidden[n] += grad_outputs[b, t, n]
            if not valid[b, t]:
                for n in range(width):
                    d_proposed[n] = zero
                for n in range(both - depth):
                    grad_joined[r, depth + n] = zero
                continue
            average, factor = mean[b, t], scale[b, t]
            for n in range(width):
                normed[n] = (plain[n] - average) * factor
                d_normed[n] = d_hidden[n]
            if both > depth:
                gate, last_hidden, d_gate = inner[b, t, depth:], before[b, t], grad_joined[r, depth:]
                for n in range(width):
                    candidate = normed[n] * norm_weight[n] + norm_bias[n] if norm_weight.size > 0 else normed[n]
                    d_gate[n] = d_hidden[n] * (candidate - last_hidden[n]) * gate[n] * (one - gate[n])
                    d_normed[n] = d_hidden[n] * gate[n]
                    d_hidden[n] *= one - gate[n]
            else:
                for n in range(width):
                    d_hidden[n] = zero
            if norm_weight.size > 0:
                total, along = zero, zero
                for n in range(width):
                    grad_norm_weight[part, n] += d_normed[n] * normed[n]
                    grad_norm_bias[part, n] += d_normed[n]
                    d_normed[n] *= norm_weight[n]
                    total += d_normed[n]
                    along += d_normed[n] * normed[n]
                total *= share
                along *= share
                for n in range(width):
                    d_normed[n] = (d_normed[n] - total - normed[n] * along) * factor
            for n in range(width):
                d_proposed[n] = d_normed[n] if both > depth or plain[n] > zero else zero
        clear(grad_summed, 0)
        multiply_add(grad_summed, grad_proposed, from_output)
        for b in range(first, last):
            r = b - first
            for n in range(width):
                grad_proposal[b, t, n] = grad_proposed[r, n]
            for k in range(depth):
                grad_joined[r, k] = grad_summed[r, k] if inner[b, t, k] > zero else zero
            for k in range(both):
                grad_inner[b, t, k] = grad_joined[r, k]
        multiply_add(grad, grad_joined, to_hidden)
        for b in range(first, last):
            for n in range(width if restart[b, t] else 0):
                grad[b - first, n] = zero
    copy_out(grad_hidden, first, last, grad)
