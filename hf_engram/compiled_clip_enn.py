"""The memory recurrence of a chunk in which the clip may be active: step by step on the trace itself, compiled.

The formulas are those of `ops_enn.memory_step` and their derivatives. Arrays are those of one row of the batch; a chunk
is the steps from `begin` to `end`. `trace` and gradients of traces may be padded beyond N slots and H columns.
"""

import numpy as np

from .numba_enn import compiled_inside
from .tiles_enn import clear, multiply_add, pack_rows, zeros


@compiled_inside
def stays_far_below(trace, encoded, recall, write, begin, end, clip):
    """Whether a bound that is quick to find keeps a chunk's trace below the clip: the largest entry of every part."""
    zero = clip - clip
    bounds = np.zeros(recall.shape[1], trace.dtype)
    for n in range(recall.shape[1]):
        for h in range(trace.shape[1]):
            bounds[n] = max(bounds[n], abs(trace[n, h]))
    for t in range(end - begin):
        largest = zero
        for h in range(encoded.shape[1]):
            largest = max(largest, abs(encoded[t, h]))
        for n in range(recall.shape[1]):
            bounds[n] += write[begin + t] * recall[begin + t, n] * largest
    highest = zero
    for n in range(recall.shape[1]):
        highest = max(highest, bounds[n])
    return highest <= clip


@compiled_inside
def may_clip(trace, encoded, recall, write, begin, end, clip):
    """Whether an entry of the trace may reach the clip within a chunk: `|first trace| + Σ |writes|` bounds them all."""
    if stays_far_below(trace, encoded, recall, write, begin, end, clip):
        return False
    bound = zeros(trace.shape[0], trace.shape[1], trace)
    magnitudes = zeros(encoded.shape[0], encoded.shape[1], trace)
    weights = zeros(trace.shape[0], encoded.shape[0], trace)
    for n in range(trace.shape[0]):
        for h in range(trace.shape[1]):
            bound[n, h] = abs(trace[n, h])
    for t in range(end - begin):
        for h in range(encoded.shape[1]):
            magnitudes[t, h] = abs(encoded[t, h])
        for n in range(recall.shape[1]):
            weights[n, t] = write[begin + t] * recall[begin + t, n]
    multiply_add(bound, weights, pack_rows(magnitudes, encoded.shape[0]))
    largest = bound[0, 0]
    for n in range(bound.shape[0]):
        for h in range(bound.shape[1]):
            largest = max(largest, bound[n, h])
    return largest > clip


@compiled_inside
def write_step(trace, recall, z, keep, write, clip):
    """Let the trace decay, write, and clip, in place; at padding (nothing decays, nothing is written) it stays."""
    if write == 0 and keep == 1:
        return
    for n in range(len(recall)):
        written = write * recall[n]
        for h in range(len(z)):
            trace[n, h] = min(max(keep * trace[n, h] + written * z[h], -clip), clip)


@compiled_inside
def clipped_forward(
    begin, end, z, trace, bank, inverse_norm, keep, write, restart, one, scale, temperature, floor, clip,
    recalled, recall,
):  # fmt: skip
    """Fill recalled memory `[T, H]` and recall weights `[T, N]` of a chunk; `trace` becomes that after the chunk."""
    slots, width = bank.shape
    zero = one - one
    for t in range(begin, end):
        a, m, z_t = recall[t], recalled[t], z[t]
        if restart[t]:
            clear(trace, 0)
        largest = -np.inf * one
        for n in range(slots):
            dot, square = zero, zero
            for h in range(width):
                entry = bank[n, h] + scale * trace[n, h]
                dot += entry * z_t[h]
                square += entry * entry
            a[n] = dot * inverse_norm[t] / (np.sqrt(max(square, floor)) * temperature)
            largest = max(largest, a[n])
        total = zero
        for n in range(slots):
            a[n] = np.exp(a[n] - largest)
            total += a[n]
        for h in range(width):
            m[h] = zero
        for n in range(slots):
            a[n] /= total
            for h in range(width):
                m[h] += a[n] * (bank[n, h] + scale * trace[n, h])
        write_step(trace, a, z_t, keep[t], write[t], clip)


@compiled_inside
def clipped_backward(
    begin, end, grad_recalled, grad_recall, z, start, bank, inverse_norm, recall, keep, write, restart,
    one, scale, temperature, largest_norm, clip, d_trace, d_bank, grad_z,
):  # fmt: skip
    """Gradients of `clipped_forward`, whose traces are made once more from `start`, which is used up.

    `d_trace` is the gradient of the trace after the chunk and becomes that of `start`; `d_bank` is added to.
    """
    slots, width = bank.shape
    zero = one - one
    traces = np.empty((end - begin, slots, width), z.dtype)  # as each step reads them
    for t in range(begin, end):
        if restart[t]:
            clear(start, 0)
        for n in range(slots):
            for h in range(width):
                traces[t - begin, n, h] = start[n, h]
        write_step(start, recall[t], z[t], keep[t], write[t], clip)
    d_a, dots, inverse_slot_norm = np.empty(slots, z.dtype), np.empty(slots, z.dtype), np.empty(slots, z.dtype)
    for t in range(end - 1, begin - 1, -1):
        a, d_m, d_z, z_t, before = recall[t], grad_recalled[t], grad_z[t], z[t], traces[t - begin]
        left, eta = keep[t], write[t]
        moves = eta > zero or left < one
        for h in range(width):
            d_z[h] = zero
        along = zero
        for n in range(slots):
            dot, square, from_recalled, from_write = zero, zero, zero, zero
            written = eta * a[n]
            for h in range(width):
                entry = bank[n, h] + scale * before[n, h]
                dot += entry * z_t[h]
                square += entry * entry
                from_recalled += entry * d_m[h]
            if moves:
                for h in range(width):
                    after = left * before[n, h] + written * z_t[h]
                    inside = d_trace[n, h] if -clip <= after <= clip else zero
                    from_write += inside * z_t[h]
                    d_z[h] += written * inside
                    d_trace[n, h] = left * inside
            dots[n] = dot
            inverse_slot_norm[n] = min(one / np.sqrt(square), largest_norm)
            d_a[n] = grad_recall[t, n] + from_recalled + eta * from_write
            along += d_a[n] * a[n]
        by_norm = inverse_norm[t]
        d_by_norm = zero
        for n in range(slots):
            slot_norm = inverse_slot_norm[n]
            d_logit = a[n] * (d_a[n] - along) / temperature
            d_dot = d_logit * by_norm * slot_norm
            d_by_norm += d_logit * dots[n] * slot_norm
            pull = d_dot * dots[n] * slot_norm * slot_norm if slot_norm < largest_norm else zero
            weight = a[n]
            for h in range(width):
                entry = bank[n, h] + scale * before[n, h]
                d_entry = weight * d_m[h] + d_dot * z_t[h] - pull * entry
                d_z[h] += d_dot * entry
                d_bank[n, h] += d_entry
                d_trace[n, h] += scale * d_entry
        if by_norm < largest_norm:
            for h in range(width):
                d_z[h] -= d_by_norm * by_norm * by_norm * by_norm * z_t[h]
        if restart[t]:
            clear(d_trace, 0)
