"""What padding and document boundaries mean to a recurrent model: which steps count, and where the state restarts."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def padding_mask(attention_mask: Tensor | None, steps: int) -> Tensor | None:
    """The last `steps` columns of `attention_mask` as bool `[B, steps]`, or `None` where nothing is padding.

    Raises:
        ValueError: the mask is not two-dimensional, or shorter than the inputs.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < steps:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, steps] with at least "
            f"{steps} steps. An ENN has no attention over tokens, so 4-D masks have no meaning here."
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
    """Mean entropy, in nats, of recall weights `[B, T, N]` over the valid steps."""
    entropy = torch.special.entr(recall).sum(-1)
    return entropy.mean() if valid is None else entropy[valid].mean()
