"""The recurrence of `gru_enn` as loops over steps, for some rows at a time.

The constant `one` comes in the arrays' dtype: a literal would widen float32 arithmetic to float64.
"""

import numpy as np

from .compiled_integrator_enn import hidden_before
from .numba_enn import compiled, compiled_inside
from .tiles_enn import copy_out, multiply_add, whole_tiles, zeros


@compiled_inside
def tanh(x, one):
    """tanh, to the rounding of 1: `np.tanh` takes several times as long as an exp."""
    return one - (one + one) / (one + np.exp(x + x))


@compiled
def forward_rows(part, first, last, drive, hidden, weight, bias, valid, restart, one, gates, outputs):
    """`gru_enn.forward_loop` for rows `first` to `last`; `weight` is packed."""
    steps, width = outputs.shape[1:]
    rows = last - first
    before, summed = zeros(rows, width, outputs), zeros(rows, whole_tiles(3 * width), outputs)
    for t in range(steps):
        hidden_before(before, hidden, outputs, restart, first, last, t)
        for b in range(first, last):
            for k in range(3 * width):
                summed[b - first, k] = bias[k]
        multiply_add(summed, before, weight)
        for b in range(first, last):
            row, last_hidden = summed[b - first], before[b - first]
            added, found, output = drive[b, t], gates[b, t], outputs[b, t]
            for k in range(2 * width):
                found[k] = one / (one + np.exp(-added[k] - row[k]))
            for n in range(width):
                remembered = row[2 * width + n]
                found[2 * width + n] = tanh(added[2 * width + n] + found[n] * remembered, one)
                found[3 * width + n] = remembered
            if valid[b, t]:
                for n in range(width):
                    proposal = found[2 * width + n]
                    output[n] = proposal + found[width + n] * (last_hidden[n] - proposal)
            else:
                for n in range(width):
                    output[n] = last_hidden[n]


@compiled
def backward_rows(part, first, last, grad_outputs, gates, before, weight, valid, restart, one, grad_drive, grad_hidden):
    """`gru_enn.backward_loop` for rows `first` to `last`; `weight` is packed."""
    steps, width = grad_outputs.shape[1:]
    zero = one - one
    rows = last - first
    grad, grad_joined = zeros(rows, whole_tiles(width), before), zeros(rows, 3 * width, before)
    for t in range(steps - 1, -1, -1):
        for b in range(first, last):
            d_hidden, joined, d_drive = grad[b - first], grad_joined[b - first], grad_drive[b, t]
            found, last_hidden = gates[b, t], before[b, t]
            for n in range(width):
                d_hidden[n] += grad_outputs[b, t, n]
            if not valid[b, t]:
                for k in range(3 * width):
                    joined[k] = d_drive[k] = zero
                continue
            for n in range(width):
                reset, update, proposal = found[n], found[width + n], found[2 * width + n]
                d_proposal = d_hidden[n] * (one - update) * (one - proposal * proposal)
                d_drive[n] = d_proposal * found[3 * width + n] * reset * (one - reset)
                d_drive[width + n] = d_hidden[n] * (last_hidden[n] - proposal) * update * (one - update)
                d_drive[2 * width + n] = d_proposal
                joined[n], joined[width + n], joined[2 * width + n] = d_drive[n], d_drive[width + n], d_proposal * reset
                d_hidden[n] *= update
        multiply_add(grad, grad_joined, weight)
        for b in range(first, last):
            for n in range(width if restart[b, t] else 0):
                grad[b - first, n] = zero
    copy_out(grad_hidden, first, last, grad)
