"""What the browser is sent, taken apart."""

from typing import NamedTuple

import numpy as np

from serve.live_memory.memories import traces, watched_memories


class Read(NamedTuple):
    """What one token recalled from one memory and wrote there."""

    recall: np.ndarray  # [N]
    shares: np.ndarray  # [N]
    kept: float
    content: np.ndarray  # [W]


def trace_values(memory):
    """The traces of memories of the same width, [M, N, W]."""
    return np.stack([trace for trace, _ in traces(memory)])


def take_apart(model, numbers):
    """The `Read` of every memory."""
    slots, reads, numbers = model.config.memory_size, [], np.asarray(numbers)
    for memory in watched_memories(model):
        ends = np.cumsum([slots, slots, 1, memory.bank.shape[1]])
        recall, shares, kept, content, numbers = np.split(numbers, ends)
        reads.append(Read(recall, shares, kept.item(), content))
    assert not numbers.size
    return reads


def replay(model, steps):
    """Trace and mass of every memory after these steps, from nothing."""
    memories = watched_memories(model)
    slots = model.config.memory_size
    found = [(np.zeros((slots, memory.bank.shape[1])), np.zeros(slots)) for memory in memories]
    for step in steps:
        reads = take_apart(model, step.memories)
        found = [
            (clipped(read.kept * trace + np.outer(read.shares, read.content), memory), read.kept * mass + read.shares)
            for memory, (trace, mass), read in zip(memories, found, reads, strict=True)
        ]
    return found


def clipped(trace, memory):
    """A trace within the memory's bound."""
    return trace if memory.clip is None else trace.clip(-memory.clip, memory.clip)
