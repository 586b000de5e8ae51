"""The page's API: the same generation, with the trace as JSON, for `gradio_client` and plain HTTP."""

import dataclasses
from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from hf_engram.traces import CellRecording, HeadRecording, Recorder, TokenMemoryRecording

from .controls import Controls, parse_slots
from .limits import Limits
from .memories import traces, watched_memories
from .models import LoadedModel
from .sampling import Sampling
from .streaming import TokenStream, prompt_ids

LEAST = 0.001  # tokens with less are summed up
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

        Prompt and continuation together are limited to 1024 tokens, unless this server says otherwise, as the answer
        grows with the square of their number.

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
        - `sources`, per memory, what it recalled in parts whose contributions sum to 1 (a negative one speaks against
          what was recalled): `bank`; `carried`, from a memory that was there before; `clip`; `tokens`, a list of
          `[index of the writer, contribution]`; and `others`, the sum of all writers below 0.001;
        - `prediction`, where the model has a token memory, who makes the prediction of the next token, in shares that
          sum to 1: `network`; `carried`, from a memory that was there before; `tokens`, a list of `[index, share]`,
          each for that token to come again; and `others`, the sum of all with a share below 0.001.

    Raises:
        ValueError: something is not allowed; the message says what, and what is.
    """
    sampling.check_length(limits.new_tokens)
    ids = prompt_ids(loaded.processor, prompt, limits.prompt_tokens)
    if len(ids) + sampling.max_new_tokens > limits.api_tokens:
        raise ValueError(
            f"The prompt has {len(ids)} tokens and `max_new_tokens` is {sampling.max_new_tokens}; at most "
            f"{limits.api_tokens} together are allowed here."
        )
    recorder = Recorder(loaded.model, loaded.processor)
    stream = TokenStream(loaded.model, loaded.processor, ids, sampling, source=controls)
    with recorder:
        steps = [step for steps in stream for step in steps]
    (recording,) = recorder.recordings()
    memories = [memory for layer in recording.layers for memory in layer.heads or (layer,)]
    recall = np.stack([memory.recall.numpy() for memory in memories], 1)  # [T, M, N]
    sources_of_tokens = zip(*(sources(memory) for memory in memories), strict=True)
    tokens = [
        {
            "text": step.text,
            "is_prompt": step.is_prompt,
            "probability": None if step.probability is None else rounded(step.probability),
            "recall": rounded(weights),
            "sources": list(parts),
        }
        for step, weights, parts in zip(steps, recall, sources_of_tokens, strict=True)
    ]
    if recording.token_memory is not None:
        for token, prediction in zip(tokens, predictions(recording.token_memory), strict=True):
            token["prediction"] = prediction
    return {
        "model": loaded.choice.name,
        "text": "".join(step.text for step in steps),
        "finish_reason": stream.finish_reason,
        "memories": [{"layer": memory.layer, "head": memory.head} for memory in watched_memories(loaded.model)],
        "tokens": tokens,
        "trace": [rounded(trace) for trace, _ in traces(stream.memory)],
    }


def sources(memory: CellRecording | HeadRecording) -> list[dict[str, Any]]:
    """Where the recall of every token from one memory came from."""
    # Asked of a copy that is dropped, since a recording keeps its attribution, several matrices [T, T].
    contribution = dataclasses.replace(memory).attribution.contribution
    return [
        {"bank": rounded(bank), "carried": rounded(carried), "clip": rounded(clip), **by_token(tokens)}
        for bank, carried, tokens, clip in zip(*contribution, strict=True)
    ]


def predictions(memory: TokenMemoryRecording) -> list[dict[str, Any]]:
    """Who makes the prediction after every token."""
    return [
        {"network": rounded(network), "carried": rounded(carried), **by_token(tokens)}
        for network, tokens, carried in zip(*memory.shares, strict=True)
    ]


def by_token(parts: Tensor) -> dict[str, Any]:
    """The parts of all tokens `[T]`, those that are large by index, the others as their sum."""
    values = np.asarray(parts)
    named = np.flatnonzero(np.abs(values) >= LEAST)
    return {
        "tokens": [[int(index), rounded(values[index])] for index in named],
        "others": rounded(values.sum() - values[named].sum()),
    }


def rounded(values: Any) -> Any:
    """A number or an array as JSON."""
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
