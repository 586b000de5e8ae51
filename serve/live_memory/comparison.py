"""What one write did: the next-token probabilities with it and without it, on the same text."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_engram import EnnForCausalLM

from .controls import Controls, Recorded, Settings

HORIZON = 256  # tokens after the write within which changes are looked for
CHUNK = 64


class Change(NamedTuple):
    """One probability that changed.

    Attributes:
        index: of the token after which the probability stands.
        token: whose probability it is.
        before: with the write.
        after: without it.
    """

    index: int
    token: str
    before: float
    after: float


@torch.inference_mode()
def largest_changes(
    model: EnnForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    settings: Sequence[Settings],
    erased: int,
    memory: Cache | None,
    count: int,
) -> list[Change]:
    """The `count` largest differences, one per place at most, largest first.

    The text is read twice from `memory` on (which stays as it is), as it was read then, but that the second time the
    token `erased` does not write. Its write can change what comes after the *next* token at the earliest.
    """
    end = min(len(ids), erased + HORIZON)
    without = Recorded(settings[:end], erased, Controls()).settings
    before, after = (_read(model, ids[:end], s, copy.deepcopy(memory), erased) for s in (settings[:end], without))
    largest = (after - before).abs().max(-1)
    changes = [
        Change(erased + row, tokenizer.decode([token_id]), before[row, token_id].item(), after[row, token_id].item())
        for row, token_id in enumerate(largest.indices.tolist())
    ]
    return sorted(changes, key=lambda change: -abs(change.after - change.before))[:count]


def _read(
    model: EnnForCausalLM, ids: Sequence[int], settings: Sequence[Settings], memory: Cache | None, first: int
) -> Tensor:
    """Probabilities `[T, vocab_size]` after every token from `first` on."""
    memory = DynamicCache(config=model.config) if memory is None else memory
    source = Recorded(settings, erased=-1, controls=Controls())
    chances = []
    index = 0
    while index < len(ids):
        until = first if index < first else len(ids)
        shared, count = source.next(index, min(CHUNK, until - index))
        logits = model(
            input_ids=torch.tensor([ids[index : index + count]], device=model.device),
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=1 if index < first else 0,
            **shared.model_options(model.config, count),
        ).logits
        if index >= first:
            chances.append(logits[0].float().softmax(-1).cpu())
        index += count
    return torch.cat(chances)
