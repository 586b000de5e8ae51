"""What the token memory of a language head did while a sequence was read.

Letters in shapes: T tokens (padding left out), V vocabulary, N slots.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay_enn import decay_between
from .ops_token_memory_enn import TokenReads
from .steps import resolve_step


class PredictionShares(NamedTuple):
    """Who makes the prediction after each token: shares of its probability, which sum to one."""

    network: Tensor  # [T], the network's own prediction
    tokens: Tensor  # [T (prediction), T (token)], what each token of the sequence wrote: all of it is for that token
    carried: Tensor  # [T], what the memory was handed over with


class TokenParts(NamedTuple):
    """What a token memory adds to the probability of one token."""

    tokens: Tensor  # [T], from what each token of the sequence wrote
    carried: Tensor  # a scalar, from what the memory was handed over with


@dataclass(frozen=True, eq=False, repr=False)
class TokenMemoryRecording:
    """The token memory while one sequence was read.

    Attributes:
        reads: what each token asked and wrote ([`TokenReads`], without the axis of rows).
        restart: the tokens before which the memory was cleared, bool `[T]`.
        carried_trace: the memory before the first token, `[V, N]`; `None` if it was empty.
    """

    reads: TokenReads
    restart: Tensor
    carried_trace: Tensor | None

    def __len__(self) -> int:
        return len(self.reads.tokens)

    def __repr__(self) -> str:
        return f"TokenMemoryRecording(tokens={len(self)}, slots={self.reads.addresses.shape[-1]})"

    @cached_property
    def shares(self) -> PredictionShares:
        """The parts of every prediction, exactly (docs/traces.md); takes O(T²) memory."""
        addresses, scales = self.reads.addresses, self.reads.scales
        decay, since_start = decay_between(self.reads.log_decays, self.restart.long().cumsum(-1))
        mass = scales[:, None] * (addresses @ self.reads.writes.T) * decay
        carried = torch.zeros_like(scales)
        if self.carried_trace is not None:
            carried = scales * since_start * (addresses @ self.carried_trace.sum(0))
        total = 1 + mass.sum(-1) + carried
        return PredictionShares(1 / total, mass / total[:, None], carried / total)

    def parts_of(self, token_id: int, step: int = -1) -> TokenParts:
        """What the memory adds to the probability of one token after token `step`; takes O(T) memory.

        Raises:
            IndexError: there is no such step; negative ones count from the end.
        """
        read = resolve_step(step, len(self)) + 1
        tokens, addresses, writes, scales, log_decays = (value[:read] for value in self.reads)
        documents = self.restart[:read].cumsum(0)
        left = F.pad(log_decays[1:].flip(0).cumsum(0).flip(0), (0, 1)).exp() * (documents == documents[-1])
        mass = scales[-1] * (writes @ addresses[-1]) * left
        total, of_carried = 1 + mass.sum(), mass.new_zeros(())
        if self.carried_trace is not None and documents[-1] == 0:
            carried = scales[-1] * log_decays.sum().exp() * (self.carried_trace @ addresses[-1])
            total, of_carried = total + carried.sum(), carried[token_id]
        own = F.pad(mass * (tokens == token_id), (0, len(self) - read))
        return TokenParts(own / total, of_carried / total)
