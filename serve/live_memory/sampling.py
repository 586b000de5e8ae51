"""How the next token is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .limits import MAX_SEED


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: the smallest set of tokens with this much probability stays in the draw.
        max_new_tokens: where to end.
        seed: of the draws; the same seed gives the same text.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("temperature", _is_number(self.temperature) and 0 <= self.temperature <= 10, "0 to 10")
        self._require("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, up to 1")
        self._require("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "1 or more")
        in_range = isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED
        self._require("seed", in_range, f"whole numbers from 0 to {MAX_SEED}")

    def check_length(self, most: int) -> None:
        """Refuse more than `most` new tokens.

        Raises:
            ValueError: there would be more.
        """
        self._require("max_new_tokens", self.max_new_tokens <= most, f"1 to {most}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed: {allowed}.")


class Sampler:
    """Draws tokens as `generate` does after `torch.manual_seed(seed)`, from a generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.is_greedy = sampling.temperature == 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self.is_greedy:
            self._warpers += [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(sampling.top_p)]

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits `[1, vocab_size]`."""
        if self.is_greedy:
            return int(logits.argmax())
        scores = self._warpers(torch.LongTensor(), logits)  # they look at the scores only
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def skip(self, draws: int, vocab_size: int) -> None:
        """Go on as if `draws` tokens had been drawn already."""
        if not self.is_greedy:
            even = torch.ones(1, vocab_size)
            for _ in range(draws):
                torch.multinomial(even, 1, generator=self._generator)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
