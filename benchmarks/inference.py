"""Reading a prompt and writing token by token, at batch 1, beside a GPT-2 of equal parameters."""

import copy
import statistics
import time

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from hf_engram import EnnConfig, EnnForCausalLM

from .timing import ratio, resident_memory, rounds_of

PROMPT, NEW_TOKENS = 1024, 64
SHORT_CONTEXT, LONG_CONTEXT = 128, 32_768


class Clock(BaseStreamer):
    """When each token of `generate` arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """One token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more."""


def engram() -> EnnForCausalLM:
    """The model of the WikiText-2 recipe, untrained."""
    torch.manual_seed(0)
    return EnnForCausalLM(EnnConfig(vocab_size=4096, hidden_size=256, memory_size=64)).eval()


def equal_gpt2(parameters: int) -> GPT2LMHeadModel:
    """A GPT-2 of two layers, as wide as `parameters` allows."""

    def make(width: int) -> GPT2LMHeadModel:
        sizes = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 2 * PROMPT, "vocab_size": 4096}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    width = 8
    while make(width + 8).num_parameters() <= parameters:
        width += 8
    return make(width).eval()


@torch.inference_mode()
def seconds_per_token(model: PreTrainedModel, input_ids: Tensor, state: Cache) -> float:
    """Median time between two tokens of `generate`, going on after `input_ids`, all but one of them in `state`."""
    clock = Clock()
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(
        input_ids, past_key_values=copy.deepcopy(state), do_sample=False, pad_token_id=0, streamer=clock, **lengths
    )
    return statistics.median(later - earlier for earlier, later in zip(clock.times[2:], clock.times[3:], strict=False))


@torch.inference_mode()
def read(model: PreTrainedModel, input_ids: Tensor) -> Cache:
    """The state after all tokens but the last."""
    return model(input_ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def read_by_token(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Read token by token."""
    state = None
    for token in input_ids.split(1, dim=1):
        state = model(token, past_key_values=state, use_cache=True).past_key_values


def print_inference(rounds: int) -> None:
    """Print the section."""
    ours = engram()
    gpt2 = equal_gpt2(ours.num_parameters())
    prompt = torch.randint(1, 4096, (1, PROMPT))
    times = rounds_of({"whole": lambda: read(ours, prompt), "tokens": lambda: read_by_token(ours, prompt)}, rounds)
    rate = PROMPT / statistics.median(times["whole"])
    print(f"reading {PROMPT:,} tokens at once: {rate:.0f} tokens/s")
    print(f"  over reading them token by token: {ratio(times['tokens'], times['whole'])}", flush=True)

    states = {model: read(model, prompt) for model in (ours, gpt2)}
    contexts = {length: torch.randint(1, 4096, (1, length)) for length in (SHORT_CONTEXT, LONG_CONTEXT)}
    read_contexts = {length: read(ours, input_ids) for length, input_ids in contexts.items()}
    before = resident_memory()
    steps = {
        "engram": lambda: seconds_per_token(ours, prompt, states[ours]),
        "GPT-2": lambda: seconds_per_token(gpt2, prompt, states[gpt2]),
        "short": lambda: seconds_per_token(ours, contexts[SHORT_CONTEXT], read_contexts[SHORT_CONTEXT]),
        "long": lambda: seconds_per_token(ours, contexts[LONG_CONTEXT], read_contexts[LONG_CONTEXT]),
    }
    times = rounds_of(steps, max(rounds, 9))
    for name, model in (("engram", ours), ("GPT-2", gpt2)):
        rate = 1 / statistics.median(times[name])
        print(f"writing after {PROMPT:,} tokens, {name} ({model.num_parameters():,} parameters): {rate:.0f} tokens/s")
    print(f"  tokens/s of the engram model over GPT-2's: {ratio(times['GPT-2'], times['engram'])}")
    flat = ratio(times["short"], times["long"])
    print(f"tokens/s after {LONG_CONTEXT:,} tokens over those after {SHORT_CONTEXT}: {flat}")
    sizes = {length: state_bytes(state) for length, state in read_contexts.items()}
    print(f"bytes of the state after either: {sizes[LONG_CONTEXT]:,} and {sizes[SHORT_CONTEXT]:,}")
    print(f"growth of the process while writing: {resident_memory() - before:.0f} MiB", flush=True)


def state_bytes(state: Cache) -> int:
    """Size of a state."""
    return sum(tensor.nbytes for layer in state.layers for tensor in layer.state)
