"""The token memory over whole sequences, parallel in time, chunk after chunk: time and memory grow with T."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .decay_enn import decay_between
from .dispatch_enn import selected_scan
from .ops_token_memory_enn import TokenReads, mix_definition, token_memory_loop

CHUNK_SIZE = 256


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
    batch, steps, slots = reads.addresses.shape
    if selected_scan() == "definition":
        trace = reads.addresses.new_zeros(batch, vocab_size, slots) if trace is None else trace
        return token_memory_loop(reads, trace, restart, kept)
    recalled = []
    wanted, order = (None, slice(None)) if kept is None else kept.unique(return_inverse=True)
    for start in range(0, steps, CHUNK_SIZE):
        chunk = reads.steps(slice(start, start + CHUNK_SIZE))
        stop = start + chunk.tokens.shape[1]
        here = None if wanted is None else wanted[(wanted >= start) & (wanted < stop)] - start
        documents = None if restart is None else restart[:, start:stop].long().cumsum(-1)
        decay, since_start = decay_between(chunk.log_decays, documents)
        if here is None or len(here) > 0:
            recalled.append(_recall(chunk, trace, decay, since_start, vocab_size, here))
        if stop < steps or with_trace:
            written = chunk.writes * decay[:, -1, :, None]
            index = chunk.tokens[..., None].expand_as(written)
            old = (
                written.new_zeros(batch, vocab_size, slots) if trace is None else since_start[:, -1, None, None] * trace
            )
            trace = old.scatter_add_(1, index, written)  # in place: the trace is large, and this copy of it our own
    return torch.cat(recalled, 1)[:, order], trace if with_trace else None


def _recall(
    chunk: TokenReads, trace: Tensor | None, decay: Tensor, since_start: Tensor, vocab_size: int, kept: Tensor | None
) -> Tensor:
    """Recalled mass at the kept steps of a chunk, `[B, kept, V]`; `decay` and `since_start` as of `decay_between`."""
    addresses, scales = chunk.addresses, chunk.scales
    if kept is not None:
        addresses, scales = addresses[:, kept], scales[:, kept]
        decay, since_start = decay[:, kept], since_start[:, kept]
    addresses = addresses * scales[..., None]
    shares = (addresses @ chunk.writes.mT) * decay  # [B, kept, C]: what each step of the chunk wrote, recalled at each
    if trace is None:
        recalled = shares.new_zeros(*shares.shape[:2], vocab_size)
    else:
        recalled = (addresses * since_start[..., None]) @ trace.mT
    return recalled.scatter_add(2, chunk.tokens[:, None].expand_as(shares), shares)


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
