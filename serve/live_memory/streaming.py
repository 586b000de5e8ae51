"""Text from a model, token by token, with what every token recalls from the memory and writes to it.

Letters in shapes: T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_engram import EnnForCausalLM
from hf_engram.cache_enn import empty_state

from .controls import Controls, Settings, SettingsSource
from .memories import replayable
from .remembered import Remembered, TokenMemoryLog
from .sampling import Sampler, Sampling

PROMPT_CHUNK = 64  # tokens read between two looks at the controls


class Candidate(NamedTuple):
    """A token that could have come next, with the model's probability for it."""

    text: str
    probability: float


class TokenStep(NamedTuple):
    """One token that the memory has read.

    Attributes:
        token_id: in the vocabulary.
        text: empty while a character is incomplete, and for special tokens.
        is_prompt: given, not chosen.
        settings: how it was read.
        memories: float32 `[F]`, what it recalled from every memory and wrote there (`memories.replayable`).
        probability: what the model gave it (before temperature and top-p), `None` for tokens that were given.
        candidates: the most likely tokens at its place, `()` for tokens that were given.
        remembered: what the token memory added to `probability`; `None` for tokens that were given, and without one.
    """

    token_id: int
    text: str
    is_prompt: bool
    settings: Settings
    memories: np.ndarray
    probability: float | None = None
    candidates: tuple[Candidate, ...] = ()
    remembered: Remembered | None = None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, most: int) -> list[int]:
    """The tokens of a prompt.

    Raises:
        ValueError: the prompt is empty, or has more than `most` tokens.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("The prompt is empty: write at least one word to continue from.")
    if len(ids) > most:
        raise ValueError(f"The prompt has {len(ids)} tokens; at most {most} are allowed.")
    return ids


class TokenStream:
    """Given tokens and their continuation, to be iterated over once.

    Every token is read by the model as soon as it is chosen, so a token is yielded together with its own recall, and
    the memory ends having read the whole text (but not the end-of-text token).

    Args:
        model: in evaluation mode; only read, so streams may share it.
        tokenizer: the model's, a fast one.
        given: ids of the tokens to continue.
        sampling: how to choose tokens.
        memory: state to go on from, changed in place; `None` begins with an empty one.
        source: interventions, and when to stop.
        num_prompt: how many of the given tokens are the prompt; the others were chosen in an earlier run with the same
            sampling, and count as such. All, if not told.
        num_candidates: length of `TokenStep.candidates`.

    Attributes:
        memory: the state, up to date with what was yielded.
        finish_reason: empty until the iteration has ended, then `"eos"`, `"length"` or `"stopped"`.
    """

    def __init__(
        self,
        model: EnnForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        given: Sequence[int],
        sampling: Sampling,
        memory: Cache | None = None,
        source: SettingsSource | None = None,
        num_prompt: int | None = None,
        num_candidates: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.given = list(given)
        self.sampling = sampling
        self.memory = empty_state(model.config) if memory is None else memory
        self.source = Controls() if source is None else source
        self.num_prompt = len(self.given) if num_prompt is None else num_prompt
        self.num_candidates = num_candidates
        self.finish_reason = ""
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._names: dict[int, str] = {}
        self._log = TokenMemoryLog(model, self.memory)

    def __iter__(self) -> Iterator[list[TokenStep]]:
        """Yield the given tokens in chunks, then every new token."""
        index = 0
        while index < len(self.given):
            if self._stopped():
                return
            settings, count = self.source.next(index, min(PROMPT_CHUNK, len(self.given) - index))
            logits, steps = self._read(index, self.given[index : index + count], settings)
            yield steps
            index += count

        sampler = Sampler(self.sampling)
        sampler.skip(len(self.given) - self.num_prompt, logits.shape[-1])
        eos = self.model.generation_config.eos_token_id
        eos_ids = [eos] if isinstance(eos, int) else eos or []
        while index < self.num_prompt + self.sampling.max_new_tokens:
            if self._stopped():
                return
            token_id = sampler.choose(logits)
            if token_id in eos_ids:
                self.finish_reason = "eos"
                return
            chances, remembered = logits[0].softmax(-1), self._log.part_of(token_id)
            settings, _ = self.source.next(index, 1)
            logits, (step,) = self._read(index, [token_id], settings)
            chosen = {"probability": float(chances[token_id]), "candidates": self._candidates(chances)}
            yield [step._replace(**chosen, remembered=remembered)]
            index += 1
        self.finish_reason = "length"

    def _stopped(self) -> bool:
        if self.source.stop:
            self.finish_reason = "stopped"
        return self.source.stop

    @torch.inference_mode()
    def _read(self, index: int, ids: list[int], settings: Settings) -> tuple[Tensor, list[TokenStep]]:
        """Let the model read `ids`: logits `[1, vocab_size]` after the last one, and a step for each."""
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=self.memory,
            use_cache=True,
            logits_to_keep=1,
            output_recall=True,
            output_encodings=True,
            output_reads=True,
            **settings.model_options(self.model.config, len(ids)),
        )
        memories = replayable(self.model, output, settings)
        self._log.add(output.token_reads, settings.cleared)
        steps = []
        for offset, token_id in enumerate(ids):
            text = self._decoder.step(self.tokenizer.backend_tokenizer, token_id) or ""
            is_prompt = index + offset < self.num_prompt
            own = settings if offset == 0 else settings._replace(cleared=False)
            steps.append(TokenStep(token_id, text, is_prompt, own, memories[offset]))
        return output.logits[:, -1].float().cpu(), steps

    def _candidates(self, chances: Tensor) -> tuple[Candidate, ...]:
        if not self.num_candidates:
            return ()
        top = chances.topk(min(self.num_candidates, len(chances)))
        return tuple(
            Candidate(self._name(i), p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        )

    def _name(self, token_id: int) -> str:
        if token_id not in self._names:
            self._names[token_id] = self.tokenizer.decode([token_id])
        return self._names[token_id]
