"""How loops are compiled with numba, where it is installed, and run over the rows of a batch.

A compiled loop works on the rows from `first` up to `last`, which do not depend on the others, so that parts of a batch
run in as many threads as torch uses; what it sums over rows, it keeps under its `part`. The loops do not hold the
interpreter lock, so several Python threads may call them at once.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPENMP_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def compiled(function: Callable, **more: bool) -> Callable:
    """Decorator: `function` compiled at its first call, from numba's cache on disk if it is there.

    Without numba `function` is returned as it is (and not called: `dispatch_enn.use_compiled`). `more` are options of
    `numba.njit`.
    """
    try:
        import numba
    except ImportError:
        return function
    options = {
        "nogil": True,
        "error_model": "numpy",  # dividing by zero is no exception: a check would keep loops off the vector units
        # Sums may be reordered and fused for the same reason; NaN and inf keep their meaning.
        "fastmath": {"reassoc", "contract", "arcp", "nsz"},
        "no_cfunc_wrapper": True,
        **more,
    }
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to cache in
        return numba.njit(**options)(function)


# For functions that only compiled functions call: they become part of every caller. Otherwise a process that compiles a
# function runs its own copy, and one that finds the caller in the cache the caller's: with sums in different orders.
compiled_inside = functools.partial(compiled, no_cpython_wrapper=True, forceinline=True)
# The same for functions whose result no order of adding changes: the compiler may leave them out of line.
compiled_apart = functools.partial(compiled, no_cpython_wrapper=True)


def flags(mask: Tensor | None, like: Tensor, default: bool) -> Tensor:
    """A bool mask `[B, T]` for compiled loops over `like` `[B, T, ...]`; all `default` in place of `None`."""
    return torch.full(like.shape[:2], default, dtype=torch.bool) if mask is None else mask


def number_of_parts(rows: int) -> int:
    """How many parts the rows of a batch are split into: as many as torch uses threads."""
    return max(1, min(torch.get_num_threads(), rows))


def run_over_rows(loop: Callable, count: int, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Call the compiled `loop` on all `count` rows, in parts.

    Args:
        loop: called with the part's number, its first row, the row after its last, the inputs and the outputs.
        inputs: tensors, which the loop sees as contiguous arrays, and constants, which it sees in the dtype of the
            first one (a constant of another width would widen float32 arithmetic).
        outputs: contiguous tensors that the loop writes to.
    """
    arrays = [value.detach().contiguous().numpy() if isinstance(value, Tensor) else value for value in inputs]
    arrays = [arrays[0].dtype.type(value) if isinstance(value, float) else value for value in arrays]
    arrays += [tensor.numpy() for tensor in outputs]
    borders = np.linspace(0, count, number_of_parts(count) + 1).astype(int).tolist()
    run_at_once(
        [functools.partial(loop, part, *rows, *arrays) for part, rows in enumerate(itertools.pairwise(borders))]
    )


def run_at_once(tasks: list[Callable[[], None]]) -> None:
    """Run `tasks`, each in a thread of its own; the first error is raised when all have ended.

    Where it can be had this is torch's own team of OpenMP threads: after every parallel operator of torch they wait
    busily for the next one, and would keep the cores from any other threads for milliseconds.
    """
    waiting, errors = iter(tasks), []

    def work(_: Any = None) -> None:
        for task in waiting:
            try:
                task()
            except BaseException as error:  # nothing may be raised through OpenMP
                errors.append(error)

    team = openmp_team() if len(tasks) > 1 else None
    if team is not None:
        team(OPENMP_FUNCTION(work), None, len(tasks), 0)
    elif len(tasks) > 1:
        list(workers(os.getpid()).map(work, tasks[1:]))
    work()  # what is left: the only task, or those of threads that OpenMP did not grant
    if errors:
        raise errors[0]


@functools.cache
def openmp_team() -> Callable | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library that torch has loaded, or `None`."""
    try:
        files = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        (library,) = (file for file in files if file.name.startswith(("libgomp", "libomp", "libiomp")))
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, ValueError, AttributeError):  # another system, none or several such libraries, another OpenMP
        return None


@functools.lru_cache(maxsize=1)
def workers(process: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process; a forked process makes its own."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hf_engram")
