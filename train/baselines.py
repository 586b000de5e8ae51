"""RNN, GRU, LSTM and a small Transformer in the ENN's place.

Embeddings, dropout, residual blocks, pooling, heads, losses and the order of pixels are the ENN's own code: only the
layers differ. Their state is returned as `past_key_values` like the ENN's, detached and with one row per sequence, so
that streams, evaluation and `generate` treat all architectures alike.
"""

from typing import Any

import torch
import torch.nn as nn
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DynamicCache,
    configuration_utils,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification, EnnModel
from hf_engram.cache_enn import EnnCacheLayer
from hf_engram.masks_enn import document_starts, padding_mask
from hf_engram.modeling_enn import EnnModelOutput

from .attention import WindowedAttention

BASELINES = ("rnn", "gru", "lstm", "transformer")
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += BASELINES


@strict
class BaselineConfig(EnnConfig):
    """Configuration of a baseline. The fields of the memory are inherited and have no effect.

    Args:
        architecture: one of `BASELINES`.
        num_attention_heads: heads of the Transformer's attention.
        attention_window: how many tokens back the Transformer attends, and how many it keeps as its state.
        intermediate_size: width of the Transformer's feed-forward layer; `None` for `4 * hidden_size`.
    """

    model_type = "enn_baseline"

    architecture: str = "lstm"
    num_attention_heads: int = 4
    attention_window: int = 1024
    intermediate_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [self.architecture] * self.num_hidden_layers
        if self.architecture == "transformer":
            self.residual = True
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Layers of one known architecture."""
        self._require("architecture", self.architecture in BASELINES, f"one of {BASELINES}")
        wanted = [self.architecture] * self.num_hidden_layers
        self._require("layer_types", self.layer_types == wanted, f"{wanted} or None")

    def validate_baseline(self) -> None:
        """Sizes are positive, and there is no recall to regularise."""
        for name in ("num_attention_heads", "attention_window", "intermediate_size"):
            self._require(name, getattr(self, name) >= 1, "a positive integer")
        self._require("recall_entropy_weight", self.recall_entropy_weight == 0, "0: a baseline recalls nothing")


class RecurrentState(EnnCacheLayer):
    """State of an RNN or GRU layer: the hidden state `[B, H]`."""

    _layer_type = None
    number_of_states = 1

    def __init__(self, **kwargs: Any) -> None:
        number_of_states = type(self).number_of_states
        super().__init__()
        self.number_of_states = number_of_states
        self.reset()

    @property
    def state(self) -> tuple[Tensor, ...] | None:
        """The stored tensors, or `None` before the first forward pass."""
        return tuple(self.recurrent_states.values()) if self.is_initialized else None


class RnnState(RecurrentState):
    """State of an RNN layer."""

    _layer_type = "rnn"


class GruState(RecurrentState):
    """State of a GRU layer."""

    _layer_type = "gru"


class LstmState(RecurrentState):
    """State of an LSTM layer: hidden state and cell `[B, H]`."""

    _layer_type = "lstm"
    number_of_states = 2


class TransformerState(RecurrentState):
    """State of an attention layer: keys and values `[B, heads, S, D]`, and which of them can be seen, bool `[B, S]`."""

    _layer_type = "transformer"
    number_of_states = 3


class RecurrentCell(nn.Module):
    """`torch.nn.RNN`, `GRU` or `LSTM` with padding and document starts.

    It computes in its own dtype under autocast, too: oneDNN lacks the LSTM's loop in bfloat16 on some processors.
    """

    CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}

    def __init__(self, config: BaselineConfig, input_size: int) -> None:
        super().__init__()
        self.rnn = self.CELLS[config.architecture](input_size, config.hidden_size, batch_first=True)
        self.number_of_states = 2 if config.architecture == "lstm" else 1

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, valid: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run over `x` `[B, T, I]`; arguments as in the ENN's cell.

        Returns:
            outputs `[B, T, H]` and the state after the last step.
        """
        dtype, x = x.dtype, x.to(self.rnn.weight_hh_l0.dtype)
        if state is None:
            state = (x.new_zeros(len(x), self.rnn.hidden_size),) * self.number_of_states
        outputs = []
        for first, last in pieces(x.shape[1], valid, restart):
            if restart is not None:
                state = tuple(value.masked_fill(restart[:, first, None], 0) for value in state)
            hidden = [value[None].to(x.dtype).contiguous() for value in state]
            with torch.autocast(x.device.type, enabled=False):
                piece, new = self.rnn(x[:, first:last], tuple(hidden) if len(hidden) == 2 else hidden[0])
            new = tuple(value[0] for value in (new if isinstance(new, tuple) else (new,)))
            if valid is not None:
                going_on = valid[:, first, None]
                new = tuple(torch.where(going_on, a, b) for a, b in zip(new, state, strict=True))
            outputs.append(piece)
            state = new
        return torch.cat(outputs, 1).to(dtype), state


def pieces(steps: int, valid: Tensor | None, restart: Tensor | None) -> list[tuple[int, int]]:
    """First and last (excluded) step of the longest pieces in which no row restarts, begins or ends to be padding."""
    cuts = torch.zeros(steps, dtype=torch.bool)
    if restart is not None:
        cuts |= restart.any(0).cpu()
    if valid is not None:
        cuts[1:] |= (valid[:, 1:] != valid[:, :-1]).any(0).cpu()
    starts = sorted({0, *cuts.nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], steps], strict=True))


class BaselineLayer(GradientCheckpointingLayer):
    """One layer of a baseline: the bare cell, or the cell in a pre-norm residual block."""

    def __init__(self, config: BaselineConfig, layer_idx: int, input_size: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.input_norm = nn.LayerNorm(input_size, eps=config.layer_norm_eps) if config.residual else None
        cell_class = WindowedAttention if config.architecture == "transformer" else RecurrentCell
        self.cell = cell_class(config, input_size)
        self.feed_forward = FeedForward(config) if config.architecture == "transformer" else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        valid: Tensor | None = None,
        restart: Tensor | None = None,
    ) -> Tensor:
        """Run over `hidden_states` `[B, T, I]` and write the new state to `past_key_values`; returns `[B, T, H]`."""
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        x = hidden_states if self.input_norm is None else self.input_norm(hidden_states)
        outputs, state = self.cell(x, None if cache is None else cache.state, valid, restart)
        if cache is not None:
            cache.store(state, hidden_states.shape[1])
        outputs = self.dropout(outputs)
        if self.input_norm is not None:
            outputs = hidden_states + outputs
        if self.feed_forward is not None:
            outputs = outputs + self.dropout(self.feed_forward(outputs))
        return outputs


class FeedForward(nn.Module):
    """The second half of a Transformer's layer."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.inner = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        return self.output(nn.functional.gelu(self.inner(self.norm(hidden_states))))


class BaselineInitialization:
    """Recurrent layers begin as in Keras: Glorot input weights, orthogonal recurrent weights, forget bias 1."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.RNNBase):
            super()._init_weights(module)
            return
        init.xavier_uniform_(module.weight_ih_l0)
        init.orthogonal_(module.weight_hh_l0)
        init.zeros_(module.bias_ih_l0)
        init.zeros_(module.bias_hh_l0)
        if isinstance(module, nn.LSTM):
            gates = torch.zeros(4, module.hidden_size)
            gates[1] = 1  # the forget gate's
            init.copy_(module.bias_ih_l0, gates.flatten())


class BaselineModel(BaselineInitialization, EnnModel):
    """The ENN's backbone with the layers of a baseline."""

    config: BaselineConfig
    _no_split_modules = ["BaselineLayer"]
    _can_record_outputs = {"hidden_states": BaselineLayer}

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        first = config.embedding_size if self.embedding_projection is None else config.hidden_size
        self.layers = nn.ModuleList(
            BaselineLayer(config, index, config.hidden_size if index else first)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        write_mask: Tensor | None = None,
        plastic: bool = True,
        slot_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnnModelOutput:
        """Arguments as in [`EnnModel`]; those that change its memory are refused."""
        if write_mask is not None or slot_mask is not None or not plastic:
            raise ValueError("A baseline has no memory that write_mask, slot_mask or plastic=False could change.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        valid = padding_mask(attention_mask, inputs_embeds)
        restart = document_starts(position_ids, inputs_embeds, valid, past_key_values)
        hidden_states = self.embedding_dropout(inputs_embeds)
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values=past_key_values, valid=valid, restart=restart)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return EnnModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None)


class BaselineForCausalLM(BaselineInitialization, EnnForCausalLM):
    """A baseline with the ENN's language modelling head."""

    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.post_init()


class BaselineForImageClassification(BaselineInitialization, EnnForImageClassification):
    """A baseline with the ENN's image classification head."""

    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.post_init()


AutoConfig.register("enn_baseline", BaselineConfig, exist_ok=True)
AutoModelForCausalLM.register(BaselineConfig, BaselineForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(BaselineConfig, BaselineForImageClassification, exist_ok=True)
