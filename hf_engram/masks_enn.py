"""What padding and document boundaries mean to a recurrent model: which steps count, and where the state restarts."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import Cache

from .configuration_enn import EnnConfig
from .ops_enn import StepMasks

# Other ways in which transformers' collators say where packed documents begin.
PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


def step_masks(
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    write_mask: Tensor | None,
    past_key_values: Cache | None,
) -> StepMasks:
    """The steps of `inputs` `[B, T]` or `[B, T, I]` that are not like the others; arguments as of the model.

    Raises:
        ValueError: a mask does not have the inputs' shape.
    """
    valid = padding_mask(attention_mask, inputs)
    return StepMasks(
        valid, document_starts(position_ids, inputs, valid, past_key_values), write_steps(write_mask, inputs)
    )


def padding_mask(attention_mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The columns of `attention_mask` for inputs `[B, T, ...]`, its last T, as bool; `None` without padding.

    Raises:
        ValueError: the mask is not two-dimensional, has other rows than the inputs, or is shorter.
    """
    if attention_mask is None:
        return None
    batch, steps = inputs.shape[:2]
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < steps:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {steps}), or more columns "
            "when past_key_values has seen tokens. It says which tokens are padding: 4-D masks mean nothing to an ENN."
        )
    return unless_all(attention_mask[:, -steps:].bool())


def document_starts(
    position_ids: Tensor | None, inputs: Tensor, valid: Tensor | None, past_key_values: Cache | None
) -> Tensor | None:
    """Where the state must be cleared, bool `[B, T]`: at position 0, except at padding.

    `None` when there is nothing to clear, as at the first token of an empty state.

    Raises:
        ValueError: `position_ids` does not have the inputs' shape.
    """
    if position_ids is None:
        return None
    batch, steps = inputs.shape[:2]
    if position_ids.shape not in ((batch, steps), (1, steps)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected ({batch}, {steps}) or (1, {steps})."
        )
    restart = (position_ids == 0).expand(batch, steps)
    if valid is not None:
        restart = restart & valid
    if past_key_values is None or past_key_values.layers[0].state is None:
        restart = F.pad(restart[:, 1:], (1, 0))  # a first document keeps the state that it begins with
    return restart if is_compiling() or restart.any() else None


def check_packing(position_ids: Tensor | None, others: Mapping[str, Any]) -> None:
    """Refuse packed documents that are told in other ways alone, since they would see each other.

    Raises:
        ValueError: one of `PACKING` is among the `others`, and there are no `position_ids`.
    """
    packed = [name for name in PACKING if others.get(name) is not None]
    if packed and position_ids is None:
        raise ValueError(
            f"{packed[0]} is given without position_ids, which tell an ENN where packed documents begin: "
            "`DataCollatorWithFlattening(return_position_ids=True)` makes them."
        )


def write_steps(write_mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """`write_mask` as bool `[B, T]`; `None` when every token writes.

    Raises:
        ValueError: `write_mask` does not have the inputs' shape.
    """
    if write_mask is None:
        return None
    batch, steps = inputs.shape[:2]
    if write_mask.shape not in ((batch, steps), (1, steps)):
        raise ValueError(
            f"write_mask has shape {tuple(write_mask.shape)}; expected ({batch}, {steps}) or (1, {steps})."
        )
    return unless_all(write_mask.bool().expand(batch, steps))


def slots_by_layer(slot_mask: Tensor | None, config: EnnConfig) -> list[Tensor | None]:
    """For every layer the slots that take part, bool `[N]`; `None` when all do.

    Raises:
        ValueError: `slot_mask` has another shape, or leaves a layer without slots.
    """
    layers, slots = config.num_hidden_layers, config.memory_size
    if slot_mask is None:
        return [None] * layers
    if slot_mask.shape not in ((slots,), (layers, slots)):
        raise ValueError(
            f"slot_mask has shape {tuple(slot_mask.shape)}; expected ({slots},) for all layers alike, or "
            f"({layers}, {slots}) (num_hidden_layers, memory_size)."
        )
    active = slot_mask.bool().expand(layers, slots)
    if not active.any(-1).all():
        raise ValueError("slot_mask switches off every slot of a layer; at least one must stay on.")
    return [unless_all(mask) for mask in active]


def unless_all(mask: Tensor) -> Tensor | None:
    """`None` in place of a mask that leaves nothing out; where a model is compiled, to look would break the graph."""
    return None if not is_compiling() and mask.all() else mask


def mean_entropy(recall: Tensor, valid: Tensor | None) -> Tensor:
    """Mean entropy, in nats, of the recall weights `[B, T, (heads,) N]` of each row over its valid steps, `[B]`."""
    entropy = torch.special.entr(recall).sum(-1)
    if entropy.ndim == 3:
        entropy = entropy.mean(-1)
    return entropy.mean(1) if valid is None else (entropy * valid).sum(1) / valid.sum(1).clamp_min(1)
