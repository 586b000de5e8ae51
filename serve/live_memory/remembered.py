"""What a model's token memory adds to the tokens that it chooses."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_engram.ops_token_memory_enn import TokenReads
from hf_engram.traces import TokenMemoryRecording

WRITERS = 3  # tokens that are named


class Remembered(NamedTuple):
    """What the memory adds to the probability of a token that was chosen."""

    probability: float  # the part of its probability that was recalled
    writers: tuple[tuple[int, float], ...] = ()  # the tokens of the run that wrote most of it, and their parts


class TokenMemoryLog:
    """The token memory of one run, as it is read.

    Args:
        model: with a token memory, or without: then nothing is remembered.
        memory: the state that the run begins with.
    """

    def __init__(self, model: PreTrainedModel, memory: Cache) -> None:
        has_memory = model.config.token_memory_size is not None and len(memory.layers) > model.config.num_hidden_layers
        state = memory.layers[-1].state if has_memory else None
        self._carried = None if state is None else state.trace[0].float().cpu()
        self._reads: list[TokenReads] = []
        self._cleared: list[bool] = []

    def add(self, reads: TokenReads | None, cleared: bool) -> None:
        """Note what a forward pass of one row asked and wrote, and whether the memory was cleared before it."""
        if reads is not None:
            self._reads.append(TokenReads(*(value[0].cpu() for value in reads)))
            self._cleared += [cleared] + [False] * (reads.tokens.shape[1] - 1)

    def part_of(self, token_id: int) -> Remembered | None:
        """What the memory adds to the probability that the next token is this one; `None` without a token memory."""
        if not self._reads:
            return None
        self._reads = [TokenReads(*(torch.cat(values) for values in zip(*self._reads, strict=True)))]
        recording = TokenMemoryRecording(self._reads[0], torch.tensor(self._cleared), self._carried)
        parts = recording.parts_of(token_id)
        most = parts.tokens.topk(min(WRITERS, len(parts.tokens)))
        writers = tuple((i, p) for i, p in zip(most.indices.tolist(), most.values.tolist(), strict=True) if p > 0)
        return Remembered(float(parts.tokens.sum() + parts.carried), writers)
