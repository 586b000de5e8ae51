"""What a model would have read and said if it had not written some token into its memory: the run once more."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .modeling_enn import EnnForCausalLM
from .recorder import Recorder, token_texts
from .recordings import Recording
from .steps import resolve_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ProbabilityChange(NamedTuple):
    """How the probability of one next token changed."""

    token_id: int
    token: str
    before: float  # with the write
    after: float  # without it


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactual:
    """A text read twice, the second time without the writes of some tokens.

    Attributes:
        erased: the tokens whose writes were left out.
        original, without: the two recordings.
        original_logits, logits_without: next-token logits `[T, vocab_size]` of the two runs.
        tokenizer: for the text of tokens.
    """

    erased: tuple[int, ...]
    original: Recording
    without: Recording
    original_logits: Tensor
    logits_without: Tensor
    tokenizer: PreTrainedTokenizerBase | None

    def __repr__(self) -> str:
        return f"Counterfactual(erased={self.erased}, tokens={len(self.original)})"

    @cached_property
    def total_variation(self) -> Tensor:
        """How far each next-token distribution moved `[T]`, from 0 (not at all) to 1; half the sum of all changes."""
        return (self.logits_without.softmax(-1) - self.original_logits.softmax(-1)).abs().sum(-1) / 2

    def most_changed(self, step: int = -1, count: int = 10) -> list[ProbabilityChange]:
        """The tokens whose probability of being next changed most, largest change first.

        Args:
            step: the token after which to look; negative numbers count from the end.
            count: how many.

        Raises:
            IndexError: there is no such step.
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}; allowed: 1 or more.")
        step = resolve_step(step, len(self.original_logits))
        before, after = self.original_logits[step].softmax(-1), self.logits_without[step].softmax(-1)
        token_ids = (after - before).abs().topk(min(count, len(before))).indices
        texts = token_texts(token_ids, len(token_ids), self.tokenizer)
        values = zip(token_ids.tolist(), texts, before[token_ids].tolist(), after[token_ids].tolist(), strict=True)
        return [ProbabilityChange(*change) for change in values]

    def plot(self, step: int = -1, count: int = 10) -> "Figure":
        """A figure of how far predictions moved, and of the changes of [`most_changed`].

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_counterfactual

        return plot_counterfactual(self, step, count)


def counterfactual(
    model: EnnForCausalLM,
    input_ids: Tensor,
    erase: SupportsIndex | Iterable[SupportsIndex],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **inputs: Any,
) -> Counterfactual:
    """Read a text twice, the second time without what some tokens wrote: the difference that these writes make.

    The second run is a whole run of the model: recalls, later writes and hidden states all change with what is
    missing. (`attribution` says what a write contributes to a recall while everything else stays as it was.)

    Args:
        model: in evaluation mode.
        input_ids: token ids `[1, T]`, without padding.
        erase: the token, or tokens, whose writes to leave out; negative numbers count from the end.
        tokenizer: for the text of tokens.
        inputs: other arguments of the model's `forward`. `past_key_values` is copied, not changed.

    Raises:
        TypeError: the model is no EnnForCausalLM.
        ValueError: more than one row, padding, or no such token.
    """
    if not isinstance(model, EnnForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; expected EnnForCausalLM.")
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected [1, tokens]: one row at a time.")
    attention_mask = inputs.pop("attention_mask", None)
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("attention_mask has zeros; expected a row without padding.")
    steps = input_ids.shape[1]
    asked = torch.as_tensor(erase if hasattr(erase, "__index__") else list(erase)).flatten()
    is_whole = asked.dtype != torch.bool and not asked.is_floating_point()  # a mask would read as tokens 0 and 1
    if not is_whole or not len(asked) or not all(-steps <= step < steps for step in asked):
        raise ValueError(
            f"erase is {erase}; allowed: one or more whole numbers from {-steps} to {steps - 1}, there are {steps} "
            "tokens."
        )
    erased = tuple(sorted({step % steps for step in asked.tolist()}))

    kept = inputs.pop("write_mask", None)
    write_mask = torch.ones_like(input_ids, dtype=torch.bool) if kept is None else kept.clone()
    original = read(model, input_ids, tokenizer, write_mask=write_mask, **inputs)
    write_mask_without = write_mask.clone()
    write_mask_without[:, list(erased)] = False
    without = read(model, input_ids, tokenizer, write_mask=write_mask_without, **inputs)
    return Counterfactual(erased, original[0], without[0], original[1], without[1], tokenizer)


def read(
    model: EnnForCausalLM, input_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None, **inputs: Any
) -> tuple[Recording, Tensor]:
    """The recording of a one-row run on a copy of the memory, and its logits `[T, vocab_size]`, on the CPU."""
    recorder = Recorder(model, tokenizer)
    with torch.no_grad(), recorder:
        logits = model(input_ids=input_ids, **copy.deepcopy(inputs)).logits
    [recording] = recorder.recordings()
    return recording, logits[0].float().cpu()
