"""Tiny models, inputs and readers that several test files use."""

import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from hf_engram import (
    EnnConfig,
    EnnForCausalLM,
    EnnForImageClassification,
    EnnForSequenceClassification,
    EnnModel,
)
from hf_engram.attention_enn import AttentionState
from hf_engram.ops_enn import CellState
from hf_engram.ops_mixer_enn import MixerState

BOOKS = Path(__file__).parent.parent / "model_cards" / "enn-books"
# Weights large enough, and a trace strong enough, that a state that is lost or doubled changes every logit.
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "memory_size": 8,
    "hebbian_lr": 0.3,
    "trace_scale": 2.0,
    "initializer_range": 0.5,
}
# The traces of these models reach 0.1 to 0.25: a clip in between acts on some rows and not on others.
ARCHITECTURES = {
    "bare": {},
    "stacked": {"num_hidden_layers": 2},
    "residual": {"num_hidden_layers": 2, "residual": True},
    "clipped": {"trace_clip": 0.15},
    "without_layer_norm": {"use_layer_norm": False},
    "gated": {"integrator": "gated", "num_hidden_layers": 2},
    "gru": {"integrator": "gru", "num_hidden_layers": 2, "residual": True},
    "scaled": {"integrator": "gated", "num_hidden_layers": 2, "residual": True, "layer_scale_init_value": 0.5},
    "mixer": {"layer_types": ["engram_mixer"] * 2, "num_hidden_layers": 2, "num_attention_heads": 2},
    "hybrid": {
        "layer_types": ["engram_mixer", "full_attention", "engram", "sliding_attention"],
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "sliding_window": 5,
    },
    "token_memory": {
        "layer_types": ["engram_mixer"],
        "num_attention_heads": 2,
        "token_memory_size": 6,
    },
    "gated_token_memory": {"integrator": "gated", "token_memory_size": 6},
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
KINDS = ("stacked", "mixer", "hybrid", "token_memory")
kinds = pytest.mark.parametrize("kind", [ARCHITECTURES[name] for name in KINDS], ids=KINDS)
CELLS = {name: fields for name, fields in ARCHITECTURES.items() if "layer_types" not in fields}
TINY_IMAGES = {"image_sequence": "row", "image_size": 8, "patch_size": 4, "num_channels": 3}
IMAGE_SEQUENCES = {
    "row": {},
    "pixel": {"image_sequence": "pixel", "image_size": 4},
    "patch": {"image_sequence": "patch"},
    "permuted": {"image_sequence": "pixel", "image_size": 4, "pixel_permutation_seed": 1},
    "with_places": {"image_sequence": "patch", "position_embedding_size": 3},
}
MODEL_CLASSES = (EnnModel, EnnForCausalLM, EnnForSequenceClassification, EnnForImageClassification)


def tiny_config(**kwargs):
    return EnnConfig(**{**TINY, **kwargs})


def tiny_model(model_class=EnnForCausalLM, dtype=torch.float64, **kwargs):
    """A model in evaluation mode, the same one at every call."""
    torch.manual_seed(0)
    if model_class is EnnForImageClassification:
        kwargs = {**TINY_IMAGES, **kwargs, "token_memory_size": None}
    return model_class(tiny_config(**kwargs)).to(dtype).eval()


def tiny_inputs(model, batch=3, steps=12):
    """Random inputs of the kind the model reads first."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.rand(batch, model.config.num_channels, size, size, dtype=model.dtype)}
    if model.config.vocab_size is None:
        return {"inputs_embeds": torch.randn(batch, steps, model.config.embedding_size, dtype=model.dtype)}
    return {"input_ids": tokens(batch, steps)}


def tokens(batch, steps, low=3):
    """Random token ids; those below `low` are left free for special tokens."""
    return torch.randint(low, TINY["vocab_size"], (batch, steps))


def left_padded(lengths, pad_token_id=1):
    """Random prompts of these lengths, padded on the left: input_ids and attention_mask."""
    attention_mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return {"input_ids": tokens(*attention_mask.shape).where(attention_mask > 0, pad_token_id)} | {
        "attention_mask": attention_mask
    }


def state(past_key_values, rows=slice(None)):
    """What every layer carries: of attention, what can be seen of each row."""
    tensors = []
    for layer in past_key_values.layers:
        if layer.state is None:  # of a token memory, behind a model without a language head
            continue
        values = layer.state._replace(**{name: value[rows] for name, value in layer.state._asdict().items()})
        if isinstance(values, AttentionState):
            for row, positions in enumerate(values.positions):
                seen = positions >= 0
                tensors += [values.keys[row, :, seen], values.values[row, :, seen], positions[seen], values.length[row]]
        else:
            tensors += values
    return tensors


def traces_in(past_key_values):
    """The traces of all layers with a memory; the token memory is no layer."""
    return [layer.state.trace for layer in past_key_values.layers if isinstance(layer.state, CellState | MixerState)]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def free_port():
    """A port on this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process, seconds=60):
    """What `url` answers, once the server that `process` starts is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url) as response:
                return response.read()
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"{url} does not answer:\n{process.stdout.read()}")


def table_cells(line):
    """The cells of a line of a Markdown table, without their bold face."""
    return [cell.strip(" *") for cell in line.split("|")[1:-1]]
