"""The state of an ENN, `past_key_values`: what every layer carries from step to step."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
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
from .ops_token_memory_enn import TokenMemoryState

LayerState = CellState | MixerState | AttentionState | TokenMemoryState


class StateLayer(LinearAttentionLayer, CacheLayerMixin):
    """State of one layer inside a stock `transformers.DynamicCache` or `StaticCache`.

    Recurrent state i is field i of the layer's `state_class`, a NamedTuple of tensors with the rows first.
    """

    state_class: ClassVar[type[LayerState]]
    made_anew: ClassVar[frozenset[str]] = frozenset()  # large fields that no view and no older state shares: kept as is
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
        for index, (name, value) in enumerate(zip(state._fields, state, strict=True)):
            # The last hidden state, for one, is a view of the hidden states of all steps, and would keep them all.
            self.update_recurrent_state(value if name in self.made_anew else value.clone(), index)
        self.sequence_length += num_tokens
        self.tokens_seen += num_tokens

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace one state. Not in place: the old tensor may be part of a graph that is still to be traversed."""
        value = recurrent_states.detach()
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
    made_anew = frozenset({"trace"})

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


class TokenMemoryCacheLayer(StateLayer):
    """State of the token memory of a language head ([`TokenMemoryState`]), behind those of the layers."""

    _layer_type = "token_memory"
    state_class = TokenMemoryState
    made_anew = frozenset({"trace"})

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: LayerState) -> list[tuple[int, ...]]:
        """Independent of how many tokens were seen."""
        return [(rows, config.token_memory_size), (rows, config.vocab_size, config.token_memory_size)]


for layer_class in (EnnCacheLayer, MixerCacheLayer):
    STATIC_LAYER_TYPE_MAPPING[layer_class._layer_type] = layer_class


def own_layers(past_key_values: Cache, config: EnnConfig) -> Cache:
    """Let our layers take their places in a cache that transformers made, while it is still empty.

    They replace transformers' own ones for attention, which know no padding; that of a token memory, which is no layer
    of the network, comes behind all others. Changes `past_key_values` and returns it.
    """
    layers = past_key_values.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, (DynamicLayer, StaticLayer)) and layer.get_seq_length() == 0:
            layers[index] = AttentionCacheLayer()
    if config.token_memory_size is not None and len(layers) == config.num_hidden_layers:
        layers.append(TokenMemoryCacheLayer())
    return past_key_values


def are_of_types(layers: Sequence[CacheLayerMixin], config: EnnConfig) -> bool:
    """Whether the layers of a cache are those of a model with this config.

    Told by their names and not by `isinstance`: where several copies of this code are loaded (each repository on the
    Hub brings its own), transformers makes the cache layers of the copy that was imported last.
    """
    attention = AttentionCacheLayer._layer_type
    wanted = [attention if name in ATTENTION_LAYER_TYPES else name for name in config.layer_types]
    if config.token_memory_size is not None:
        wanted.append(TokenMemoryCacheLayer._layer_type)
    found = [getattr(layer, "_layer_type", "") for layer in layers]
    return found == wanted and all(hasattr(layer, "state_class") for layer in layers)


def misfit(layer: StateLayer, state: LayerState, config: EnnConfig, rows: int) -> str | None:
    """What is wrong with the shapes of a layer's state of so many rows; `None` where it fits the config."""
    found, wanted = [tuple(value.shape) for value in state], layer.shapes(config, rows, state)
    return None if found == wanted else f"a state of shapes {found} {state._fields}; expected {wanted}"


def state_on(device: torch.device, layer: StateLayer | None) -> LayerState | None:
    """The state that a layer of a cache holds, on a device: a memory file may have been loaded to another one."""
    state = None if layer is None else layer.state
    if state is None or state[0].device == device:
        return state
    return type(state)(*(value.to(device) for value in state))


def empty_state(config: EnnConfig) -> DynamicCache:
    """A state that has seen nothing."""
    return own_layers(DynamicCache(config=config), config)


def as_new_sequence(past_key_values: Cache) -> Cache:
    """Let the next tokens begin a new sequence on the memory at hand; changes `past_key_values` and returns it.

    `generate` takes `input_ids` to contain the tokens that `past_key_values` has already seen. After this call it
    takes them to be new.
    """
    for layer in past_key_values.layers:
        layer.sequence_length = 0
    return past_key_values
