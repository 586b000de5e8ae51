"""Memory files: the state of an ENN on disk (safetensors), and whether it fits the model that reads it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .cache_enn import TokenMemoryCacheLayer, are_of_types, as_new_sequence, empty_state, misfit
from .configuration_enn import EnnConfig

MEMORY_FORMAT = "hf_engram.memory.v1"
# Two states are interchangeable when the configs agree on these: shapes, and what the numbers in the trace mean.
ARCHITECTURE_FIELDS = (
    "hidden_size",
    "memory_size",
    "num_hidden_layers",
    "layer_types",
)
CELL_FIELDS = ("hebbian_lr", "trace_scale", "trace_clip", "trace_scope")
TOKEN_MEMORY_FIELDS = ("token_memory_size", "vocab_size")
BLOCK_FIELDS = ("num_attention_heads", "conv_kernel", "sliding_window")


def save_memory(past_key_values: Cache, path: str | os.PathLike, config: EnnConfig) -> None:
    """Write the state to a memory file (safetensors).

    Args:
        past_key_values: as returned by the model, `use_cache=True`.
        path: where to write; the file appears whole or not at all.
        config: the model's config; its architecture is written into the file.

    Raises:
        ValueError: the state is empty, or not one of a model with this config.
    """
    layers = past_key_values.layers if isinstance(past_key_values, Cache) else ()
    if not are_of_types(layers, config):
        raise ValueError(
            f"past_key_values ({type(past_key_values).__name__}) is not the state of a model with this config; "
            "expected what the model returned."
        )
    if layers[0].state is None:
        raise ValueError("past_key_values is empty: nothing has been written to this memory yet.")
    for index, layer in enumerate(layers):
        wrong = None if layer.state is None else misfit(layer, layer.state, config, len(layer.state[0]))
        if wrong is not None:
            raise ValueError(f"past_key_values does not fit config: it holds, in layer {index}, {wrong}.")
    tensors = {
        f"layers.{index}.{name}": value.contiguous()
        for index, layer in enumerate(past_key_values.layers)
        if layer.state is not None  # that of a token memory is not, where there is no language head
        for name, value in layer.state._asdict().items()
    }
    metadata = {
        "format": MEMORY_FORMAT,
        "architecture": json.dumps(architecture(config)),
        "tokens_seen": json.dumps(past_key_values.layers[0].tokens_seen),
    }
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_memory(path: str | os.PathLike, config: EnnConfig, device: str | torch.device = "cpu") -> DynamicCache:
    """Read a memory file, to be passed as `past_key_values`; the tokens given with it are new.

    Args:
        path: a file written by [`save_memory`].
        config: config of the model that will read it.
        device: where to put the state.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not a memory file, or written by another architecture; the message says which
            field differs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no memory file at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata, config, path)
            tokens_seen = json.loads(metadata["tokens_seen"])
            if type(tokens_seen) is not int or tokens_seen < 0:
                raise ValueError(
                    f"{os.fspath(path)!r} is not a readable memory file: tokens_seen is {tokens_seen!r}, expected a "
                    "whole number, 0 or more."
                )
            cache = empty_state(config)
            for index, layer in enumerate(cache.layers):
                names = [f"layers.{index}.{name}" for name in layer.state_class._fields]
                if isinstance(layer, TokenMemoryCacheLayer) and not set(names) & set(file.keys()):
                    continue  # written without a language head
                state = layer.state_class(*map(file.get_tensor, names))
                wrong = misfit(layer, state, config, rows=state[0].shape[0] if state[0].ndim else 0)
                if wrong is not None:
                    raise ValueError(f"{os.fspath(path)!r} holds {wrong}.")
                # Moved here: safetensors refuses some names of devices, such as the "cpu:0" of distributed runs.
                layer.store(layer.state_class(*(value.to(device) for value in state)), tokens_seen)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a readable memory file: {error}.") from error
    return as_new_sequence(cache)


def _check_metadata(metadata: dict[str, str], config: EnnConfig, path: str | os.PathLike) -> None:
    if metadata.get("format") != MEMORY_FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} is not a memory file: its format is {metadata.get('format')!r}, "
            f"expected {MEMORY_FORMAT!r}."
        )
    written, wanted = json.loads(metadata["architecture"]), architecture(config)
    if not isinstance(written, dict):
        raise ValueError(
            f"{os.fspath(path)!r} is not a readable memory file: architecture is {written!r}, expected the fields of a "
            "config."
        )
    differing = [name for name in wanted | written if written.get(name) != wanted.get(name)]
    if differing:
        values = {name: (written.get(name), getattr(config, name, None)) for name in differing}
        listed = "; ".join(f"{name} is {there!r} in the file, {here!r} here" for name, (there, here) in values.items())
        raise ValueError(f"{os.fspath(path)!r} was written by another architecture: {listed}.")


def architecture(config: EnnConfig) -> dict[str, Any]:
    """The fields of `config` that decide whether a state fits a model."""
    names = ARCHITECTURE_FIELDS
    names += CELL_FIELDS if "engram" in config.layer_types else ()
    names += BLOCK_FIELDS if set(config.layer_types) - {"engram"} else ()
    names += TOKEN_MEMORY_FIELDS if config.token_memory_size is not None else ()
    return {name: getattr(config, name) for name in names}
