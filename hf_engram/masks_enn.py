"""What padding and document boundaries mean to a recurrent model: which steps count, and where the state restarts."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def padding_mask(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """The columns of `attention_mask` for `inputs_embeds` `[B, T, I]`, its last T, as bool; `None` without padding.

    Raises:
        ValueError: the mask is not two-dimensional, has other rows than the inputs, or is shorter.
    """
    if attention_mask is None:
        return None
    batch, steps = inputs_embeds.shape[:2]
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < steps:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {steps}), or more columns "
            "when past_key_values has seen tokens. An ENN has no attention over tokens: 4-D masks mean nothing to it."
        )
    valid = attention_mask[:, -steps:].bool()
    return None if valid.all() else valid


def document_starts(
    position_ids: Tensor | None, inputs_embeds: Tensor, valid: Tensor | None, past_key_values: Cache | None
) -> Tensor | None:
    """Where the state must be cleared, bool `[B, T]`: at position 0, except at padding.

    `None` when there is nothing to clear, as at the first token of an empty state.

    Raises:
        ValueError: `position_ids` does not have the inputs' shape.
    """
    if position_ids is None:
        return None
    batch, steps = inputs_embeds.shape[:2]
    if position_ids.shape not in ((batch, steps), (1, steps)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected ({batch}, {steps}) or (1, {steps})."
        )
    restart = (position_ids == 0).expand(batch, steps)
    if valid is not None:
        restart = restart & valid
    has_state = past_key_values is not None and past_key_values.layers[0].state is not None
    needed = restart if has_state else restart[:, 1:]
    return restart if needed.any() else None


def mean_entropy(recall: Tensor, valid: Tensor | None) -> Tensor:
    """Mean entropy, in nats, of the recall weights `[B, T, N]` of each row over its valid steps, `[B]`."""
    entropy = torch.special.entr(recall).sum(-1)
    return entropy.mean(1) if valid is None else (entropy * valid).sum(1) / valid.sum(1).clamp_min(1)
