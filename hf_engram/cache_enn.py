"""The state of an ENN, `past_key_values`: what every layer carries from step to step, and its memory file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .attention_enn import AttentionState
from .configuration_enn import ATTENTION_LAYER_TYPES, EnnConfig
from .ops_enn import CellState
from .ops_mixer_enn import MixerState

LayerState = CellState | MixerState | AttentionState
MEMORY_FORMAT = "hf_engram.memory.v1"
# Two states are interchangeable when the configs agree on these: shapes, and what the numbers in the trace mean.
ARCHITECTURE_FIELDS = (
    "hidden_size",
    "memory_size",
    "num_hidden_layers",
    "layer_types",
)
CELL_FIELDS = ("hebbian_lr", "trace_scale", "trace_clip", "trace_scope")
BLOCK_FIELDS = ("num_attention_heads", "conv_kernel", "sliding_window")


class StateLayer(LinearAttentionLayer, CacheLayerMixin):
    """State of one layer inside a stock `transformers.DynamicCache` or `StaticCache`.

    Recurrent state i is field i of the layer's `state_class`, a NamedTuple of tensors with the rows first.
    """

    state_class: ClassVar[type[LayerState]]
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=len(self.state_class._fields))
        self.keys = self.values = None  # read by Cache.__iter__
        self.is_initialized = False
        self.sequence_length = 0
        self.tokens_seen = 0

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: LayerState) -> list[tuple[int, ...]]:
        """Shapes that the fields of `state` must have for a model with this config."""
        raise NotImplementedError

    @property
    def state(self) -> LayerState | None:
        """The stored state, or `None` before the first forward pass."""
        if not self.is_initialized:
            return None
        values = self.recurrent_states.values()
        # Training may go on from a state made under `torch.inference_mode`, whose tensors autograd refuses.
        return self.state_class(*(v.clone() if torch.is_grad_enabled() and v.is_inference() else v for v in values))

    def store(self, state: LayerState, num_tokens: int) -> None:
        """Keep `state`, detached from the graph that made it, and count `num_tokens` more tokens per row."""
        for index, value in enumerate(state):
            self.update_recurrent_state(value, index)
        self.sequence_length += num_tokens
        self.tokens_seen += num_tokens

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace one state. Not in place: the old tensor may be part of a graph that is still to be traversed."""
        value = recurrent_states.detach().clone()  # the last hidden state is a view of the hidden states of all steps
        self.recurrent_states[state_idx] = value
        self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.device, self.dtype = value.device, value.dtype
        self.is_initialized = all(self.is_recurrent_states_initialized.values())
        return value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: layers hand over whole states."""
        raise NotImplementedError("A layer of an ENN stores its state with `store`, not keys and values.")

    def get_seq_length(self) -> int:
        """Tokens of the sequence at hand that the state has seen, padding included."""
        return self.sequence_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask: all tokens seen, from the first."""
        return self.sequence_length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: -1."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.recurrent_states = dict.fromkeys(range(self.number_of_states))
        self.is_recurrent_states_initialized = dict.fromkeys(range(self.number_of_states), False)
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        self.is_initialized = False
        self.sequence_length = self.tokens_seen = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda value: value[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a recurrent state cannot be rolled back."""
        raise NotImplementedError(
            "The state of an ENN cannot be rolled back, so it cannot be cropped (and assisted decoding, which crops, "
            "is not supported). Keep a `copy.deepcopy(past_key_values)` from before the tokens to remove."
        )

    def _map(self, change: Any) -> None:
        for index, value in self.recurrent_states.items():
            if value is not None:
                self.recurrent_states[index] = change(value)


class EnnCacheLayer(StateLayer):
    """State of an engram layer: hidden state `[B, H]` and trace `[B, N, H]`, float32 at least."""

    _layer_type = "engram"
    state_class = CellState

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: LayerState) -> list[tuple[int, ...]]:
        """Independent of how many tokens were seen."""
        return [(rows, config.hidden_size), (rows, config.memory_size, config.hidden_size)]


class MixerCacheLayer(StateLayer):
    """State of an engram mixer: tail of the convolution and trace ([`MixerState`])."""

    _layer_type = "engram_mixer"
    state_class = MixerState

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: LayerState) -> list[tuple[int, ...]]:
        """Independent of how many tokens were seen."""
        trace = (rows, config.num_attention_heads, config.memory_size, 2 * config.head_dim + 1)
        return [(rows, config.conv_kernel - 1, config.hidden_size), trace]


class AttentionCacheLayer(StateLayer):
    """State of an attention layer ([`AttentionState`]), which grows with the tokens seen, up to a sliding window."""

    _layer_type = None  # those of attention belong to transformers' own layers: see `own_layers`
    state_class = AttentionState

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: LayerState) -> list[tuple[int, ...]]:
        """As many tokens as the state has positions."""
        tokens = state.positions.shape[-1]
        heads = (rows, config.num_attention_heads, tokens, config.head_dim)
        return [heads, heads, (rows, tokens), (rows,)]


for layer_class in (EnnCacheLayer, MixerCacheLayer):
    STATIC_LAYER_TYPE_MAPPING[layer_class._layer_type] = layer_class


def own_layers(past_key_values: Cache) -> Cache:
    """Let our layers take the place of transformers' own ones for attention, which know no padding, while still empty.

    Changes `past_key_values` and returns it.
    """
    for index, layer in enumerate(past_key_values.layers):
        if isinstance(layer, (DynamicLayer, StaticLayer)) and layer.get_seq_length() == 0:
            past_key_values.layers[index] = AttentionCacheLayer()
    return past_key_values


def are_of_types(layers: Sequence[CacheLayerMixin], layer_types: list[str]) -> bool:
    """Whether the layers of a cache are those of a model with these layer types.

    Told by their names and not by `isinstance`: where several copies of this code are loaded (each repository on the
    Hub brings its own), transformers makes the cache layers of the copy that was imported last.
    """
    wanted = [AttentionCacheLayer._layer_type if name in ATTENTION_LAYER_TYPES else name for name in layer_types]
    return [getattr(layer, "_layer_type", "") for layer in layers] == wanted


def misfit(layer: StateLayer, state: LayerState, config: EnnConfig, rows: int) -> str | None:
    """What is wrong with the shapes of a layer's state of so many rows; `None` where it fits the config."""
    found, wanted = [tuple(value.shape) for value in state], layer.shapes(config, rows, state)
    return None if found == wanted else f"a state of shapes {found} {state._fields}; expected {wanted}"


def empty_state(config: EnnConfig) -> DynamicCache:
    """A state that has seen nothing."""
    return own_layers(DynamicCache(config=config))


def architecture(config: EnnConfig) -> dict[str, Any]:
    """The fields of `config` that decide whether a state fits a model."""
    names = ARCHITECTURE_FIELDS
    names += CELL_FIELDS if "engram" in config.layer_types else ()
    names += BLOCK_FIELDS if set(config.layer_types) - {"engram"} else ()
    return {name: getattr(config, name) for name in names}


def as_new_sequence(past_key_values: Cache) -> Cache:
    """Let the next tokens begin a new sequence on the memory at hand; changes `past_key_values` and returns it.

    `generate` takes `input_ids` to contain the tokens that `past_key_values` has already seen. After this call it
    takes them to be new.
    """
    for layer in past_key_values.layers:
        layer.sequence_length = 0
    return past_key_values


def save_memory(past_key_values: Cache, path: str | os.PathLike, config: EnnConfig) -> None:
    """Write the state to a memory file (safetensors).

    Args:
        past_key_values: as returned by the model, `use_cache=True`.
        path: where to write; the file appears whole or not at all.
        config: the model's config; its architecture is written into the file.

    Raises:
        ValueError: the state is empty.
    """
    tensors = {}
    for index, layer in enumerate(past_key_values.layers):
        if layer.state is None:
            raise ValueError("past_key_values is empty: nothing has been written to this memory yet.")
        for name, value in layer.state._asdict().items():
            tensors[f"layers.{index}.{name}"] = value.contiguous()
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
                names = layer.state_class._fields
                state = layer.state_class(*(file.get_tensor(f"layers.{index}.{name}") for name in names))
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
    differing = [name for name in wanted if written.get(name) != wanted[name]]
    if differing:
        listed = "; ".join(f"{name} is {written.get(name)!r} in the file, {wanted[name]!r} here" for name in differing)
        raise ValueError(f"{os.fspath(path)!r} was written by another architecture: {listed}.")
