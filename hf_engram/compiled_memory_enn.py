"""The memory recurrence of `memory_enn` as compiled loops over the chunks of some rows.

Everything a chunk needs stays in the cache of one core; matrices that live here only are padded with zeros to whole
tiles. Constants come in the arrays' dtype: a literal would widen float32 arithmetic to float64.
"""

import numpy as np

from .compiled_clip_enn import clipped_backward, clipped_forward, may_clip
from .compiled_recall_enn import decay_factors, recall_backward, recall_forward
from .numba_enn import compiled, compiled_apart, compiled_inside
from .tiles_enn import (
    clear,
    copy_into,
    copy_out,
    multiply_add,
    pack_columns,
    pack_rows,
    whole_tiles,
    zeros,
)


@compiled_inside
def add_scaled(total, matrix, factors, scale, panels):
    """`total += scaled @ weight`, where `scaled` is `matrix` with row t multiplied by `scale * factors[t]`."""
    scaled = np.empty_like(matrix)
    for t in range(matrix.shape[0]):
        factor = scale * factors[t]
        for n in range(matrix.shape[1]):
            scaled[t, n] = factor * matrix[t, n]
    multiply_add(total, scaled, panels)


@compiled_inside
def add_transposed(total, matrix, factors, scale, panels):
    """`total += scaled.T @ weight`, where `scaled` is `matrix` with row t multiplied by `scale * factors[t]`."""
    scaled = np.empty((matrix.shape[1], matrix.shape[0]), matrix.dtype)
    for t in range(matrix.shape[0]):
        factor = scale * factors[t]
        for n in range(matrix.shape[1]):
            scaled[n, t] = factor * matrix[t, n]
    multiply_add(total, scaled, panels)


@compiled_inside
def between_steps(rows, panels, decay, scale):
    """`scale * decay * (rows @ weight)`, entry by entry, `[C, C]`."""
    total = zeros(decay.shape[0], decay.shape[1], decay)
    multiply_add(total, rows, panels)
    for t in range(decay.shape[0]):
        for r in range(decay.shape[1]):
            total[t, r] *= scale * decay[t, r]
    return total


@compiled_apart
def plus_transpose(matrix):
    """`matrix` plus its transpose."""
    result = np.empty_like(matrix)
    for t in range(matrix.shape[0]):
        for r in range(matrix.shape[1]):
            result[t, r] = matrix[t, r] + matrix[r, t]
    return result


@compiled_apart
def is_zero(matrix):
    """Whether there is nothing in `matrix`, as in a trace at the start: products with it can be left out."""
    total = matrix[0, 0] - matrix[0, 0]
    for r in range(matrix.shape[0]):
        for n in range(matrix.shape[1]):
            total += abs(matrix[r, n])
    return total == 0


@compiled_inside
def trace_terms(trace, bank, mu, nu):
    """Fill mu = bank · trace and nu = |trace|²."""
    for n in range(bank.shape[0]):
        along, square = mu[n] - mu[n], mu[n] - mu[n]
        for h in range(bank.shape[1]):
            along += bank[n, h] * trace[n, h]
            square += trace[n, h] * trace[n, h]
        mu[n], nu[n] = along, square


@compiled_apart
def decay_trace(trace, factor):
    """Multiply `trace` by `factor`, in place."""
    for n in range(trace.shape[0]):
        for h in range(trace.shape[1]):
            trace[n, h] *= factor


@compiled
def forward_rows(
    part, first, last, z, trace, bank_squared, bank, bank_columns, bank_rows, squared, inverse_norm,
    keep, write, restart, chunk, one, scale, temperature, floor, clip,
    recalled, recall, final, bank_dot, trace_dot, inverse_slot_norm, starts, clipped,
):  # fmt: skip
    """Rows `first` to `last` of `memory_enn.memory_recurrence`.

    `bank_columns` and `bank_rows` are the packed `bank.T` and `bank`.
    """
    steps, width = z.shape[1:]
    slots = bank.shape[0]
    chunk_rows, slot_rows = whole_tiles(min(chunk, steps)), whole_tiles(slots)
    columns = whole_tiles(width)
    current, decay = zeros(slot_rows, columns, z), zeros(chunk_rows, chunk_rows, z)
    encoded, result = zeros(chunk_rows, columns, z), zeros(chunk_rows, columns, z)
    weights, from_bank = zeros(chunk_rows, slot_rows, z), zeros(chunk_rows, slot_rows, z)
    from_trace = zeros(chunk_rows, slot_rows, z)
    carry, to_end = np.zeros(chunk_rows + 1, z.dtype), np.zeros(chunk_rows, z.dtype)
    mu, nu = np.zeros(slots, z.dtype), np.zeros(slots, z.dtype)
    for b in range(first, last):
        copy_into(current, trace[b], 0, slots)
        for c in range(clipped.shape[1]):
            begin, end = c * chunk, min((c + 1) * chunk, steps)
            if c > 0:
                copy_out(starts[b, c - 1], 0, slots, current)
            trace_terms(current, bank, mu, nu)
            blank = is_zero(current)
            copy_into(encoded, z[b], begin, end)
            decay_factors(keep[b], write[b], restart[b], begin, end, decay, carry, to_end)
            clear(from_bank, 0)
            multiply_add(from_bank, encoded, bank_columns)
            copy_out(bank_dot[b], begin, end, from_bank)
            clear(from_trace, 0)
            if not blank:
                add_scaled(from_trace, encoded, carry, one, pack_columns(current, width))
            gram = between_steps(encoded, pack_columns(encoded, width), decay, one)
            recall_forward(
                begin, end, bank_dot[b], gram, from_trace, squared[b], inverse_norm[b], bank_squared, mu, nu,
                keep[b], write[b], restart[b], one, scale, temperature, floor,
                recall[b], trace_dot[b], inverse_slot_norm[b],
            )  # fmt: skip
            if clip is not None:  # noqa: SIM102 (numba leaves this out if clip is None, but only as a condition alone)
                if may_clip(current, encoded, recall[b], write[b], begin, end, clip):
                    clipped[b, c] = True
                    clipped_forward(
                        begin, end, z[b], current, bank, inverse_norm[b], keep[b], write[b], restart[b],
                        one, scale, temperature, floor, clip, recalled[b], recall[b],
                    )  # fmt: skip
                    continue
            copy_into(weights, recall[b], begin, end)
            writes = pack_rows(encoded, chunk_rows)
            own = between_steps(weights, pack_columns(weights, slots), decay, scale)
            clear(result, 0)
            multiply_add(result, weights, bank_rows)
            multiply_add(result, own, writes)
            if not blank:
                add_scaled(result, weights, carry, scale, pack_rows(current, slots))
            copy_out(recalled[b], begin, end, result)
            decay_trace(current, carry[end - begin])
            add_transposed(current, weights, to_end, one, writes)
        copy_out(final[b], 0, slots, current)


@compiled
def backward_rows(
    part, first, last, grad_recalled, grad_recall, grad_final, z, trace, bank, bank_columns, bank_rows,
    squared, inverse_norm, keep, write, restart, recall, bank_dot, trace_dot, inverse_slot_norm,
    starts, clipped, chunk, one, scale, temperature, largest_norm, clip, grad_z, grad_trace, grad_bank,
):  # fmt: skip
    """Gradients of `forward_rows`; `grad_bank` is `[parts, N, H]`; `grad_trace` has size 0 if it is not asked for."""
    steps, width = z.shape[1:]
    slots = bank.shape[0]
    two = one + one
    chunk_rows, slot_rows = whole_tiles(min(chunk, steps)), whole_tiles(slots)
    columns = whole_tiles(width)
    start, d_current, d_bank = zeros(slot_rows, columns, z), zeros(slot_rows, columns, z), zeros(slot_rows, columns, z)
    encoded, d_encoded = zeros(chunk_rows, columns, z), zeros(chunk_rows, columns, z)
    d_recalled = zeros(chunk_rows, columns, z)
    weights, d_weights = zeros(chunk_rows, slot_rows, z), zeros(chunk_rows, slot_rows, z)
    d_trace_dot, d_bank_dot = zeros(chunk_rows, slot_rows, z), zeros(chunk_rows, slot_rows, z)
    decay = zeros(chunk_rows, chunk_rows, z)
    carry, to_end = np.zeros(chunk_rows + 1, z.dtype), np.zeros(chunk_rows, z.dtype)
    every = np.ones(chunk_rows, z.dtype)
    d_squared, d_inverse_norm = np.zeros(chunk_rows, z.dtype), np.zeros(chunk_rows, z.dtype)
    by_slot = zeros(3, slots, z)  # gradients of |bank|², mu, nu
    for b in range(first, last):
        copy_into(d_current, grad_final[b], 0, slots)
        for c in range(clipped.shape[1] - 1, -1, -1):
            begin, end = c * chunk, min((c + 1) * chunk, steps)
            copy_into(start, starts[b, c - 1] if c > 0 else trace[b], 0, slots)
            blank, unread = is_zero(start), is_zero(d_current)
            if clip is not None:  # noqa: SIM102
                if clipped[b, c]:
                    clipped_backward(
                        begin, end, grad_recalled[b], grad_recall[b], z[b], start, bank, inverse_norm[b], recall[b],
                        keep[b], write[b], restart[b], one, scale, temperature, largest_norm, clip,
                        d_current, d_bank, grad_z[b],
                    )  # fmt: skip
                    continue
            copy_into(encoded, z[b], begin, end)
            copy_into(d_recalled, grad_recalled[b], begin, end)
            copy_into(weights, recall[b], begin, end)
            copy_into(d_weights, grad_recall[b], begin, end)
            decay_factors(keep[b], write[b], restart[b], begin, end, decay, carry, to_end)
            by_step, writes = pack_columns(encoded, width), pack_rows(encoded, chunk_rows)
            weights_by_step, d_recalled_rows = pack_columns(weights, slots), pack_rows(d_recalled, chunk_rows)

            # To the recall weights: from the memory they recalled, from the traces they wrote, and from each other.
            multiply_add(d_weights, d_recalled, bank_columns)
            if not blank:
                add_scaled(d_weights, d_recalled, carry, scale, pack_columns(start, width))
            if not unread:
                add_scaled(d_weights, encoded, to_end, one, pack_columns(d_current, width))
            crossed = between_steps(d_recalled, by_step, decay, scale)
            multiply_add(d_weights, plus_transpose(crossed), pack_rows(weights, chunk_rows))
            gram = between_steps(encoded, by_step, decay, one)
            clear(by_slot, 0)
            clear(d_trace_dot, end - begin)
            clear(d_bank_dot, end - begin)
            recall_backward(
                begin, end, d_weights, bank_dot[b], gram, squared[b], inverse_norm[b],
                recall[b], trace_dot[b], inverse_slot_norm[b], keep[b], write[b], restart[b],
                one, scale, temperature, largest_norm,
                d_bank_dot, d_trace_dot, d_squared, d_inverse_norm, by_slot[0], by_slot[1], by_slot[2],
            )  # fmt: skip

            # To the encodings, as they were compared and as they were written.
            for t in range(end - begin):
                by_norm = inverse_norm[b, begin + t]
                pull = d_inverse_norm[t] * by_norm * by_norm * by_norm if by_norm < largest_norm else one - one
                for h in range(width):
                    d_encoded[t, h] = (two * d_squared[t] - pull) * encoded[t, h]
            clear(d_encoded, end - begin)
            crossed = between_steps(d_trace_dot, weights_by_step, decay, one)
            own = between_steps(weights, weights_by_step, decay, scale)
            multiply_add(d_encoded, plus_transpose(crossed), writes)
            add_transposed(d_encoded, own, every, one, d_recalled_rows)
            multiply_add(d_encoded, d_bank_dot, bank_rows)
            if not unread:
                add_scaled(d_encoded, weights, to_end, one, pack_rows(d_current, slots))
            if not blank:
                add_scaled(d_encoded, d_trace_dot, carry, one, pack_rows(start, slots))
            copy_out(grad_z[b], begin, end, d_encoded)

            # To the bank, and to the trace at the start of the chunk.
            add_transposed(d_bank, weights, every, one, d_recalled_rows)
            add_transposed(d_bank, d_bank_dot, every, one, writes)
            for n in range(slots):
                for h in range(width):
                    d_bank[n, h] += two * by_slot[0, n] * bank[n, h] + by_slot[1, n] * start[n, h]
            if c == 0 and grad_trace.size == 0:
                continue
            left = carry[end - begin]
            for n in range(slots):
                for h in range(width):
                    from_norms = by_slot[1, n] * bank[n, h] + two * by_slot[2, n] * start[n, h]
                    d_current[n, h] = left * d_current[n, h] + from_norms
            add_transposed(d_current, weights, carry, scale, d_recalled_rows)
            add_transposed(d_current, d_trace_dot, carry, one, writes)
        if grad_trace.size > 0:
            copy_out(grad_trace[b], 0, slots, d_current)
    copy_out(grad_bank[part], 0, slots, d_bank)
