"""How this process gets its memory: a training step asks for the same large tensors again and again."""

import ctypes

# Of malloc.h in glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
PAD = 1 << 28  # bytes by which the heap grows at once


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc gives large blocks back to the system as soon as they are freed, and the system fills new ones with zeros,
    page by page: up to a quarter of a step's time on a CPU (docs/log.md, 2026-11-24). The process stays as large as it
    ever was.

    Returns:
        whether it could be set: not without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_TOP_PAD, PAD)])
