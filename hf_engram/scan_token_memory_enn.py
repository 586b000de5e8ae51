"""The token memory over whole sequences, parallel in time, chunk after chunk: time and memory grow with T."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .decay_enn import decay_between
from .dispatch_enn import selected_scan
from .ops_token_memory_enn import TokenReads, empty_trace, mix_definition, token_memory_loop

CHUNK_SIZE = 256


class Chunk(NamedTuple):
    """Some steps of a sequence, and what they find."""

    steps: slice
    reads: TokenReads  # of these steps
    trace: Tensor | None  # before them, [B, V, N]; None: empty
    decay: Tensor  # [B, C, C]; this and the next as of `decay_between`
    since_start: Tensor  # [B, C]


def over_chunks(
    recall: Callable[[Chunk], Any],
    reads: TokenReads,
    trace: Tensor | None,
    vocab_size: int,
    restart: Tensor | None,
    with_trace: bool,
) -> tuple[list[Any], Tensor | None]:
    """What `recall` returns for every chunk, and the trace after the last; arguments as of `token_memory_scan`."""
    steps, results = reads.tokens.shape[1], []
    for start in range(0, steps, CHUNK_SIZE):
        some = slice(start, min(start + CHUNK_SIZE, steps))
        chunk = reads.steps(some)
        documents = None if restart is None else restart[:, some].long().cumsum(-1)
        decay, since_start = decay_between(chunk.log_decays, documents)
        results.append(recall(Chunk(some, chunk, trace, decay, since_start)))
        if some.stop < steps or with_trace:
            written = chunk.writes * decay[:, -1, :, None]
            index = chunk.tokens[..., None].expand_as(written)
            old = empty_trace(reads, vocab_size) if trace is None else since_start[:, -1, None, None] * trace
            trace = old.scatter_add_(1, index, written)  # in place: the trace is large, and this copy of it our own
    return results, trace if with_trace else None


def token_memory_scan(
    reads: TokenReads,
    trace: Tensor | None,
    vocab_size: int,
    restart: Tensor | None = None,
    kept: Tensor | None = None,
    with_trace: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As `ops_token_memory_enn.token_memory_loop`, which it equals and which runs if the definition is asked for.

    Args, beside those:
        trace: `None`: empty.
        vocab_size: V.
        with_trace: `False` where nobody needs the trace after the last step, which is then `None`.
    """
    if selected_scan() == "definition":
        return token_memory_loop(reads, empty_trace(reads, vocab_size) if trace is None else trace, restart, kept)
    wanted, order = (None, slice(None)) if kept is None else kept.unique(return_inverse=True)

    def recall(chunk: Chunk) -> Tensor | None:
        if wanted is None:
            return _recall(chunk, vocab_size, None)
        start, stop = chunk.steps.start, chunk.steps.stop
        here = wanted[(wanted >= start) & (wanted < stop)] - start
        return _recall(chunk, vocab_size, here) if len(here) > 0 else None

    recalled, trace = over_chunks(recall, reads, trace, vocab_size, restart, with_trace)
    return torch.cat([part for part in recalled if part is not None], 1)[:, order], trace


def _recall(chunk: Chunk, vocab_size: int, kept: Tensor | None) -> Tensor:
    """Recalled mass at the kept steps of a chunk, `[B, kept, V]`."""
    (tokens, addresses, writes, scales, _), decay, since_start = chunk.reads, chunk.decay, chunk.since_start
    if kept is not None:
        addresses, scales = addresses[:, kept], scales[:, kept]
        decay, since_start = decay[:, kept], since_start[:, kept]
    addresses = addresses * scales[..., None]
    shares = (addresses @ writes.mT) * decay  # [B, kept, C]: what each step of the chunk wrote, recalled at each
    if chunk.trace is None:
        recalled = shares.new_zeros(*shares.shape[:2], vocab_size)
    else:
        recalled = (addresses * since_start[..., None]) @ chunk.trace.mT
    return recalled.scatter_add(2, tokens[:, None].expand_as(shares), shares)


def target_memory_scan(
    reads: TokenReads,
    targets: Tensor,
    trace: Tensor | None,
    vocab_size: int,
    restart: Tensor | None = None,
    with_trace: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recalled mass of one token at every step, without that of all others.

    Args, beside those of `token_memory_scan`:
        targets: token ids `[B, T]`; nothing is recalled of those that are negative.

    Returns:
        the targets' mass and that of all tokens, `[B, T]` each, and the trace after the last step.
    """
    if selected_scan() == "definition":
        recalled, trace = token_memory_scan(reads, trace, vocab_size, restart)
        mass = recalled.gather(2, targets.clamp_min(0)[..., None])[..., 0]
        return mass * (targets >= 0), recalled.sum(-1), trace

    def recall(chunk: Chunk) -> tuple[Tensor, Tensor]:
        return _recall_targets(chunk, targets[:, chunk.steps])

    results, trace = over_chunks(recall, reads, trace, vocab_size, restart, with_trace)
    mass, total = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    return mass, total, trace


def _recall_targets(chunk: Chunk, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Recalled mass of a chunk's targets, and of all tokens, `[B, C]` each."""
    addresses = chunk.reads.addresses * chunk.reads.scales[..., None]
    shares = (addresses @ chunk.reads.writes.mT) * chunk.decay
    mass = (shares * (chunk.reads.tokens[:, None] == targets[..., None])).sum(-1)
    total = shares.sum(-1)
    if chunk.trace is None:
        return mass, total
    addresses = addresses * chunk.since_start[..., None]
    rows = chunk.trace.gather(1, targets.clamp_min(0)[..., None].expand_as(addresses))
    old = (addresses * rows).sum(-1) * (targets >= 0)
    return mass + old, total + (addresses @ chunk.trace.sum(1)[..., None])[..., 0]


def mix(logits: Tensor, recalled: Tensor) -> Tensor:
    """As `ops_token_memory_enn.mix_definition`, which it equals and which runs if the definition is asked for."""
    return mix_definition(logits, recalled) if selected_scan() == "definition" else _Mix.apply(logits, recalled)


class _Mix(torch.autograd.Function):
    """The mixture in few passes over `[B, T, V]`, which are most of what a token memory costs in training."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, recalled: Tensor) -> Tensor:
        probabilities = torch.softmax(logits, -1)
        mass = (probabilities + recalled).clamp_min_(torch.finfo(logits.dtype).tiny)
        total = 1 + recalled.sum(-1, keepdim=True)
        ctx.save_for_backward(probabilities, mass, total)
        return mass.log().sub_(total.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, mass, total = ctx.saved_tensors
        of_mass = grad / mass
        of_recalled = of_mass - grad.sum(-1, keepdim=True) / total
        of_mass.mul_(probabilities)
        return of_mass - probabilities * of_mass.sum(-1, keepdim=True), of_recalled


def mix_targets(log_probabilities: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """The mixture at one token of every step, `[B, T]`.

    Args:
        log_probabilities: of the network alone.
        mass: recalled of that token.
        total: recalled of all tokens.
    """
    remembered = mass > 0  # the logarithm of 0 has no gradient
    both = torch.logaddexp(log_probabilities, torch.where(remembered, mass, 1).log())
    return torch.where(remembered, both, log_probabilities) - torch.log1p(total)
