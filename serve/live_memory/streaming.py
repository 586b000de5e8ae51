"""Text from a model, token by token, with what every token recalls from the memory and writes to it.

Letters in shapes: L layers, N memory slots, H hidden width, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

from hf_engram import EnnForCausalLM
from hf_engram.layers_enn import EnnLayer
from hf_engram.ops_enn import encode

PROMPT_CHUNK = 64  # tokens read between two looks at the stop flag
MAX_PROMPT_TOKENS = 4096
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: the smallest set of tokens with this much probability stays in the draw.
        max_new_tokens: where to end.
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("temperature", self.temperature is not None and self.temperature >= 0, "0 or more")
        self._require("top_p", self.top_p is not None and 0 < self.top_p <= 1, "above 0, up to 1")
        self._require("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "1 or more")
        self._require(
            "seed", isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED, f"whole numbers from 0 to {MAX_SEED}"
        )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed: {allowed}.")


class TokenStep(NamedTuple):
    """One token that the memory has read."""

    text: str  # empty while a character is incomplete, and for special tokens
    is_prompt: bool
    recall: np.ndarray  # float32 [L, N], the weights over slots
    encoding: np.ndarray  # float32 [L, H], what was written, to each slot in proportion to its recall weight


class TokenStream:
    """A prompt and its continuation, to be iterated over once.

    Every token is read by the model as soon as it is chosen, so a token is yielded together with its own recall, and
    the memory ends having read the whole text (but not the end-of-text token).

    Args:
        model: in evaluation mode; only read, so streams may share it.
        tokenizer: the model's, a fast one.
        prompt: text to continue.
        sampling: how to choose tokens.
        memory: state to go on from, changed in place; `None` begins with an empty one.
        should_stop: asked before every step of the model.

    Attributes:
        memory: the state, up to date with what was yielded.
        finish_reason: empty until the iteration has ended, then `"eos"`, `"length"` or `"stopped"`.

    Raises:
        ValueError: the prompt is empty or too long.
    """

    def __init__(
        self,
        model: EnnForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        sampling: Sampling,
        memory: Cache | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
        if not self.prompt_ids:
            raise ValueError("The prompt is empty: write at least one word to continue from.")
        if len(self.prompt_ids) > MAX_PROMPT_TOKENS:
            raise ValueError(f"The prompt has {len(self.prompt_ids)} tokens; at most {MAX_PROMPT_TOKENS} are allowed.")
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.memory = DynamicCache(config=model.config) if memory is None else memory
        self.should_stop = should_stop
        self.finish_reason = ""

        self._decoder = DecodeStream(skip_special_tokens=True)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            self._warpers += [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(sampling.top_p)]

    def __iter__(self) -> Iterator[list[TokenStep]]:
        """Yield the prompt in chunks, then every new token."""
        for start in range(0, len(self.prompt_ids), PROMPT_CHUNK):
            if self._stopped():
                return
            logits, steps = self._read(self.prompt_ids[start : start + PROMPT_CHUNK], is_prompt=True)
            yield steps

        eos = self.model.generation_config.eos_token_id
        eos_ids = [eos] if isinstance(eos, int) else eos or []
        for _ in range(self.sampling.max_new_tokens):
            if self._stopped():
                return
            token_id = self._choose(logits)
            if token_id in eos_ids:
                self.finish_reason = "eos"
                return
            logits, steps = self._read([token_id], is_prompt=False)
            yield steps
        self.finish_reason = "length"

    def _stopped(self) -> bool:
        stopped = self.should_stop()
        if stopped:
            self.finish_reason = "stopped"
        return stopped

    @torch.inference_mode()
    def _read(self, ids: list[int], is_prompt: bool) -> tuple[Tensor, list[TokenStep]]:
        """Let the model read `ids`: logits `[1, vocab_size]` after the last one, and a step for each."""
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=self.memory,
            use_cache=True,
            logits_to_keep=1,
            output_recall=True,
            output_hidden_states=True,
        )
        recall = torch.stack(output.recall, dim=2)[0]  # [T, L, N]
        encoding = torch.stack(self._encodings(output.hidden_states), dim=2)[0]  # [T, L, H]
        steps = [
            TokenStep(self._decoder.step(self.tokenizer.backend_tokenizer, token_id) or "", is_prompt, a, z)
            for token_id, a, z in zip(ids, recall.float().cpu().numpy(), encoding.float().cpu().numpy(), strict=True)
        ]
        return output.logits[:, -1].float().cpu(), steps

    def _encodings(self, hidden_states: tuple[Tensor, ...]) -> list[Tensor]:
        """What each layer writes `[1, T, H]`, from the inputs of the layers."""
        encodings = []
        layers = cast(list[EnnLayer], self.model.model.layers)
        for layer, x in zip(layers, hidden_states[:-1], strict=True):
            x = x if layer.input_norm is None else layer.input_norm(x)
            encodings.append(encode(x, layer.cell.weights(), layer.cell.settings))
        return encodings

    def _choose(self, logits: Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scores = self._warpers(torch.LongTensor(), logits)  # they look at the scores only
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
