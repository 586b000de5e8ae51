"""The token memory of a language head as functions on tensors: the definition that the parallel form must reproduce.

It remembers which token followed what, as sums of writes over slots: a cache language model (Grave et al., arXiv
1612.04426) whose state does not grow with the text. At every step, with hidden state h, the token x that the step has
read, logits l, unit keys M of the slots, and unit addresses u = W h / |W h|:

    address     a_t = softmax(u_t · M / τ)                            over the slots
    trace       C_t = λ_t C_{t-1} + β_t onehot(x_t) ⊗ a_{t-1}         what has followed, slot by slot
    recalled    q_t = s_t C_t a_t,   s_t = exp(w · h_t + b)           mass of every token of the vocabulary
    logits      log((softmax(l_t) + q_t) / (1 + Σ q_t))

so the prediction is a mean of the network's own, with weight 1, and of the tokens it has seen, whose weights are
positive: a share of every probability belongs to the token that wrote it, exactly. β is 1, or 0 where nothing is
written; the first token of a document follows nothing and writes nothing.

Letters in shapes: B batch, T steps, V vocabulary, N slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenReads(NamedTuple):
    """What the steps of a sequence ask the token memory and write into it."""

    tokens: Tensor  # [B, T], the token that each step has read
    addresses: Tensor  # [B, T, N], a_t: where it looks
    writes: Tensor  # [B, T, N], β_t a_{t-1}: where it writes
    scales: Tensor  # [B, T], s_t
    log_decays: Tensor  # [B, T], log λ, 0 where nothing decays

    def steps(self, steps: slice) -> "TokenReads":
        """Some of the steps."""
        return TokenReads(*(value[:, steps] for value in self))


class TokenMemoryState(NamedTuple):
    """What a token memory carries from step to step."""

    address: Tensor  # [B, N], of the last token: where the next one will write
    trace: Tensor  # [B, V, N], float32 at least


def empty_trace(reads: TokenReads, vocab_size: int) -> Tensor:
    """A trace in which nothing is written, `[B, V, N]`."""
    batch, _, slots = reads.addresses.shape
    return reads.addresses.new_zeros(batch, vocab_size, slots)


def write_addresses(
    addresses: Tensor, last: Tensor, valid: Tensor | None = None, restart: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The address of the token before each one, padding skipped; 0 before the first of a document.

    Args:
        addresses: of all steps, `[B, T, N]`.
        last: before the first step, `[B, N]`.
        valid: bool `[B, T]`, `False` at padding.
        restart: bool `[B, T]`, `True` at the first token of a document.

    Returns:
        the addresses `[B, T, N]`, of no meaning at padding, and that of the last token, `[B, N]`.
    """
    known = torch.cat([last[:, None], addresses], 1)
    if valid is not None:
        steps = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        newest = torch.cat([steps.new_zeros(len(valid), 1), (steps * valid).cummax(1).values], 1)  # 0: `last`
        known = known.gather(1, newest[..., None].expand_as(known))
    before, last = known[:, :-1], known[:, -1]
    return (before if restart is None else before.masked_fill(restart[..., None], 0)), last


def token_memory_loop(
    reads: TokenReads, trace: Tensor, restart: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, step by step over a sequence.

    Args:
        reads: of all steps.
        trace: before the first step, `[B, V, N]`.
        restart: bool `[B, T]`; `True` where a new document begins: the trace is zero before that step.
        kept: indices of the steps to recall at; `None` for all.

    Returns:
        recalled mass `[B, T or len(kept), V]` and the trace after the last step.
    """
    recalled = []
    for t in range(reads.tokens.shape[1]):
        if restart is not None:
            trace = trace.masked_fill(restart[:, t, None, None], 0)
        rows = torch.arange(len(trace), device=trace.device)
        trace = reads.log_decays[:, t, None, None].exp() * trace
        trace = trace.index_put((rows, reads.tokens[:, t]), reads.writes[:, t], accumulate=True)
        recalled.append(torch.einsum("b,bvn,bn->bv", reads.scales[:, t], trace, reads.addresses[:, t]))
    recalled = torch.stack(recalled, 1)
    return recalled if kept is None else recalled[:, kept], trace


def mix_definition(logits: Tensor, recalled: Tensor) -> Tensor:
    """The definition of the mixture: logarithms of probabilities, from logits and recalled mass `[B, T, V]`."""
    return torch.log((torch.softmax(logits, -1) + recalled) / (1 + recalled.sum(-1, keepdim=True)))
