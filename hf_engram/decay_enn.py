"""What is left of one step's write at a later step, for memories that decay by a factor at every step."""

import torch
from torch import Tensor


def decay_between(log_decays: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decay within a chunk.

    Args:
        log_decays: logarithm of what step t keeps of what was there before it, `[..., C]`.
        documents: how many documents have begun in the chunk by step t, `[..., C]`; nothing outlives its document.

    Returns:
        what is left at step t of a write at step r, `[..., C (t), C (r)]`, 0 where r is later than t; and what is left
        at step t of what the chunk began with, `[..., C]`.
    """
    steps = log_decays.shape[-1]
    reach = torch.ones(steps, steps, dtype=torch.bool, device=log_decays.device).tril()
    since_start = log_decays.cumsum(-1).exp()
    # The exp of the log decays after r and up to t, summed for every r anew, and not as a difference of two sums from
    # the start, which would be less exact and feel what earlier documents decay.
    between = torch.where(reach.tril(-1), log_decays[..., None], 0).cumsum(-2)
    if documents is not None:
        since_start = since_start * (documents == 0)
        reach = reach & (documents[..., :, None] == documents[..., None, :])
    return torch.where(reach, between, -torch.inf).exp(), since_start
