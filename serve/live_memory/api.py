"""The page's API: the same generation, with the trace as JSON, for `gradio_client` and plain HTTP."""

from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from hf_engram.traces import Parts, PredictionShares, Recorder

from .controls import Controls, parse_slots
from .limits import Limits
from .memories import traces, watched_memories
from .models import LoadedModel
from .sampling import Sampling
from .streaming import TokenStep, TokenStream, prompt_ids

LEAST_SHARE = 0.001  # writers of less are summed up
DIGITS = 5


def add_api(loaded: LoadedModel, limits: Limits) -> None:
    """Add the endpoint `/generate` to the page that is being built."""

    def generate(
        prompt: str,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        freeze_plasticity: bool = False,
        slots_off: str = "",
    ) -> dict:
        """Continue a text, and return it with the memory that it was written from.

        Args:
            prompt: text to continue.
            max_new_tokens: where to end.
            temperature: divides the logits; 0 always takes the most likely token.
            top_p: the smallest set of tokens with this much probability stays in the draw.
            seed: of the draws; the same seed gives the same text as on the page.
            freeze_plasticity: read the memory without writing to it.
            slots_off: slots that are neither recalled nor written, such as "3, 7-9".
        """
        try:
            return generate_with_trace(
                loaded,
                prompt,
                Sampling(temperature, top_p, max_new_tokens, seed),
                Controls(
                    plastic=not freeze_plasticity, slots_off=parse_slots(slots_off, loaded.model.config.memory_size)
                ),
                limits,
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.api(generate, api_name="generate", concurrency_limit=limits.concurrent_runs, concurrency_id="model")


def generate_with_trace(
    loaded: LoadedModel, prompt: str, sampling: Sampling, controls: Controls, limits: Limits
) -> dict[str, Any]:
    """A text and its memory as JSON.

    Returns:
        `text`, the whole of it; `finish_reason`, `"eos"` or `"length"`; `model`; `memories`, one for every engram
        layer and for every head of a mixer, each with its `layer` and its `head` (`None` for a layer); `trace`, after
        the last token, as lists `[memories][slots][width]`; and `tokens`, each with

        - `text`, `is_prompt`, and `probability`, `None` in the prompt;
        - `recall`, the weights over slots as lists `[memories][slots]`;
        - `prediction`, where the model has a token memory, who makes the prediction of the next token, in parts that
          sum to 1: `network`; `carried`, from a memory that was there before; `tokens`, a list of `[index, share]`,
          each for that token to come again; and `others`, the sum of all with a share below 0.001;
        - `sources`, per memory, what it recalled in parts whose shares sum to 1: `bank`; `carried`, from a memory that
          was there before; `clip`; `tokens`, a list of `[index of the writer, share]`; and `others`, the sum of all
          writers with a share below 0.001.
    """
    sampling.check_length(limits.new_tokens)
    ids = prompt_ids(loaded.processor, prompt, limits.prompt_tokens)
    recorder = Recorder(loaded.model, loaded.processor)
    stream = TokenStream(loaded.model, loaded.processor, ids, sampling, source=controls)
    with recorder:
        steps = [step for steps in stream for step in steps]
    (recording,) = recorder.recordings()
    memories = [memory for layer in recording.layers for memory in layer.heads or (layer,)]
    parts = [memory.attribution.contribution for memory in memories]
    recall = np.stack([memory.recall.numpy() for memory in memories], 1)  # [T, M, N]
    shares = None if recording.token_memory is None else recording.token_memory.shares
    return {
        "model": loaded.choice.name,
        "text": "".join(step.text for step in steps),
        "finish_reason": stream.finish_reason,
        "memories": [{"layer": memory.layer, "head": memory.head} for memory in watched_memories(loaded.model)],
        "tokens": [token_entry(step, recall, parts, shares, index) for index, step in enumerate(steps)],
        "trace": [rounded(trace) for trace, _ in traces(stream.memory)],
    }


def token_entry(
    step: TokenStep, recall: np.ndarray, parts: list[Parts], shares: PredictionShares | None, index: int
) -> dict[str, Any]:
    """One token of the answer."""
    entry = {
        "text": step.text,
        "is_prompt": step.is_prompt,
        "probability": None if step.probability is None else round(step.probability, DIGITS),
        "recall": rounded(recall[index]),
        "sources": [sources(of_memory, index) for of_memory in parts],
    }
    if shares is not None:
        network, carried = rounded(shares.network[index]), rounded(shares.carried[index])
        entry["prediction"] = {"network": network, "carried": carried, **by_token(shares.tokens[index])}
    return entry


def sources(contribution: Parts, index: int) -> dict[str, Any]:
    """Where the recall of token `index` from one memory came from."""
    return {
        "bank": rounded(contribution.bank[index]),
        "carried": rounded(contribution.carried[index]),
        "clip": rounded(contribution.clip[index]),
        **by_token(contribution.tokens[index]),
    }


def by_token(tokens: Tensor) -> dict[str, Any]:
    """The shares of all tokens `[T]`, those that are large by index, the others as their sum."""
    shares = np.asarray(tokens)
    named = np.flatnonzero(np.abs(shares) >= LEAST_SHARE)
    return {
        "tokens": [[int(writer), rounded(shares[writer])] for writer in named],
        "others": rounded(shares.sum() - shares[named].sum()),
    }


def rounded(values: Any) -> Any:
    """A number or an array as JSON."""
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
