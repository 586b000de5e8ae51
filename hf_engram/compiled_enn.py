"""The recall recurrence of `kernels_enn` as loops over rows, compiled with numba where it is installed.

Each row is independent of the others, so rows are spread over as many threads as torch uses. The compiled loops do
not hold the interpreter lock and use no thread pool of numba's, so several Python threads may call them at once.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .kernels_enn import ChunkGradients, ChunkRecalls, ChunkTerms
from .ops_enn import SQUARED_NORM_FLOOR, CellSettings


def forward_rows(
    first, last, bank_dot, gram, trace_dot, squared, inverse_norm, bank_squared, mu, nu, keeps, writes, restart,
    one, scale, temperature, floor, recall, product, inverse_slot_norm,
):  # fmt: skip
    """`kernels_enn.recall_forward` for rows `first` to `last`, on arrays; overwrites mu, nu and the last three.

    `one` is 1 in the arrays' dtype: an integer literal would widen float32 arithmetic to float64.
    """
    steps, slots = bank_dot.shape[1:]
    zero, two = one - one, one + one
    for b in range(first, last):
        row_mu, row_nu = mu[b], nu[b]
        for t in range(steps):
            a, w, slot_norm, p = recall[b, t], product[b, t], inverse_slot_norm[b, t], bank_dot[b, t]
            if restart[b, t]:
                row_mu[:] = zero
                row_nu[:] = zero
            w[:] = trace_dot[b, t]
            for r in range(t):
                weight, earlier = gram[b, t, r], recall[b, r]
                for n in range(slots):
                    w[n] += weight * earlier[n]
            by_norm = inverse_norm[b, t] / temperature
            largest = zero
            for n in range(slots):
                slot_squared = bank_squared[n] + two * scale * row_mu[n] + scale * scale * row_nu[n]
                slot_norm[n] = one / np.sqrt(max(slot_squared, floor))
                a[n] = (p[n] + scale * w[n]) * by_norm * slot_norm[n]
                largest = max(largest, a[n]) if n else a[n]
            total = zero
            for n in range(slots):
                a[n] = np.exp(a[n] - largest)
                total += a[n]
            keep, eta = keeps[b, t], writes[b, t]
            z_squared = squared[b, t]
            for n in range(slots):
                a[n] /= total
                row_mu[n] = keep * row_mu[n] + eta * a[n] * p[n]
                write = eta * a[n]
                row_nu[n] = keep * keep * row_nu[n] + two * keep * write * w[n] + write * write * z_squared


def backward_rows(
    first, last, grad_recall, bank_dot, gram, squared, inverse_norm, recall, product, inverse_slot_norm,
    keeps, writes, restart, one, scale, temperature, largest_norm,
    grad_bank_dot, grad_product, grad_squared, grad_inverse_norm, grad_bank_squared, grad_mu, grad_nu,
):  # fmt: skip
    """`kernels_enn.recall_backward` for rows `first` to `last`, on arrays; the last seven hold the gradients.

    `grad_recall` is overwritten with the whole gradient of the recall weights; `grad_bank_squared` is per row.
    """
    steps, slots = bank_dot.shape[1:]
    zero, two = one - one, one + one
    for b in range(first, last):
        d_mu, d_nu, d_bank_squared = grad_mu[b], grad_nu[b], grad_bank_squared[b]
        for t in range(steps - 1, -1, -1):
            a, w, p, slot_norm = recall[b, t], product[b, t], bank_dot[b, t], inverse_slot_norm[b, t]
            d_a, d_p, d_w = grad_recall[b, t], grad_bank_dot[b, t], grad_product[b, t]
            for k in range(t + 1, steps):
                weight, later = gram[b, k, t], grad_product[b, k]
                for n in range(slots):
                    d_a[n] += weight * later[n]
            keep, eta = keeps[b, t], writes[b, t]
            z_squared = squared[b, t]
            dot = zero
            d_squared = zero
            for n in range(slots):
                d_a[n] += eta * p[n] * d_mu[n] + two * eta * (keep * w[n] + eta * a[n] * z_squared) * d_nu[n]
                dot += d_a[n] * a[n]
                d_squared += eta * eta * a[n] * a[n] * d_nu[n]
            grad_squared[b, t] = d_squared
            d_inverse_norm = zero
            for n in range(slots):
                d_logit = a[n] * (d_a[n] - dot) / temperature
                x = p[n] + scale * w[n]
                d_x = d_logit * inverse_norm[b, t] * slot_norm[n]
                d_inverse_norm += d_logit * x * slot_norm[n]
                d_slot_squared = -d_x * x * slot_norm[n] * slot_norm[n] / two
                if slot_norm[n] >= largest_norm:
                    d_slot_squared = zero
                d_p[n] = d_x + eta * a[n] * d_mu[n]
                d_w[n] = scale * d_x + two * keep * eta * a[n] * d_nu[n]
                d_mu[n] = keep * d_mu[n] + two * scale * d_slot_squared
                d_nu[n] = keep * keep * d_nu[n] + scale * scale * d_slot_squared
                d_bank_squared[n] += d_slot_squared
            grad_inverse_norm[b, t] = d_inverse_norm
            if restart[b, t]:
                d_mu[:] = zero
                d_nu[:] = zero


@functools.cache
def compiled(rows: Callable) -> Callable | None:
    """`rows` compiled, from numba's cache on disk if it is there; `None` without numba."""
    try:
        import numba
    except ImportError:
        return None
    # Sums may be reordered and fused, which is what lets the loops run on vector units; NaN and inf keep their meaning.
    compile_rows = functools.partial(numba.njit, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
    try:
        return compile_rows(cache=True)(rows)
    except RuntimeError:  # no folder to cache in
        return compile_rows()(rows)


def can_compile(tensor: Tensor) -> bool:
    """Whether the compiled loops take tensors like this one: on the CPU, with numba installed."""
    return tensor.device.type == "cpu" and compiled(forward_rows) is not None


def recall_forward(
    terms: ChunkTerms, trace_dot: Tensor, bank_squared: Tensor, mu: Tensor, nu: Tensor, settings: CellSettings
) -> ChunkRecalls:
    """`kernels_enn.recall_forward`, compiled."""
    bank_dot, gram, squared, inverse_norm, keep, write, restart = terms
    found = ChunkRecalls(*(empty(bank_dot) for _ in range(3)))
    inputs = (bank_dot, gram, trace_dot, squared, inverse_norm, bank_squared, mu.clone(), nu.clone(), keep, write)
    constants = (1.0, settings.trace_scale, settings.temperature, SQUARED_NORM_FLOOR)
    run_over_rows(forward_rows, len(bank_dot), (*inputs, restart_flags(restart, keep)), constants, found)
    return found


def recall_backward(
    grad_recall: Tensor, terms: ChunkTerms, found: ChunkRecalls, settings: CellSettings
) -> ChunkGradients:
    """`kernels_enn.recall_backward`, compiled."""
    bank_dot, gram, squared, inverse_norm, keep, write, restart = terms
    at_start = (torch.zeros_like(bank_dot[:, 0], memory_format=torch.contiguous_format) for _ in range(3))
    grads = ChunkGradients(empty(bank_dot), empty(bank_dot), empty(squared), empty(squared), *at_start)
    inputs = (
        grad_recall.clone(memory_format=torch.contiguous_format),
        *(bank_dot, gram, squared, inverse_norm, *found, keep, write),
        restart_flags(restart, keep),
    )
    constants = (1.0, settings.trace_scale, settings.temperature, SQUARED_NORM_FLOOR**-0.5)
    run_over_rows(backward_rows, len(bank_dot), inputs, constants, grads)
    return grads._replace(bank_squared=grads.bank_squared.sum(0))


def empty(like: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor of the same shape and dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def restart_flags(restart: Tensor | None, keep: Tensor) -> Tensor:
    """`restart`, or all `False` in its place."""
    return torch.zeros(keep.shape, dtype=torch.bool) if restart is None else restart


def run_over_rows(
    rows: Callable,
    count: int,
    inputs: tuple[Tensor, ...],
    constants: tuple[float, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    """Call the compiled `rows` on all `count` rows, in as many threads as torch uses."""
    arrays = [tensor.detach().contiguous().numpy() for tensor in inputs]
    arrays += [arrays[0].dtype.type(constant) for constant in constants]
    arrays += [tensor.numpy() for tensor in outputs]
    kernel = compiled(rows)
    assert kernel is not None, "can_compile() says whether there is a compiler"
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        kernel(0, count, *arrays)
        return
    borders = np.linspace(0, count, threads + 1).astype(int)
    parts = [
        workers(os.getpid()).submit(kernel, int(first), int(last), *arrays)
        for first, last in itertools.pairwise(borders[1:])
    ]
    kernel(0, int(borders[1]), *arrays)
    for part in parts:
        part.result()


@functools.lru_cache(maxsize=1)
def workers(process: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process; a forked process makes its own."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hf_engram")
