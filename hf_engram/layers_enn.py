"""Modules of the Engram Neural Network: the cell, the layers around it and around mixers, pooling over time."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_enn import CausalAttention
from .cache_enn import LayerState, state_on
from .configuration_enn import EnnConfig
from .dispatch_enn import selected_scan
from .mixer_enn import EngramMixer
from .ops_enn import NO_MASKS, CellSettings, CellState, CellWeights, ScanOutput, StepMasks, state_dtype
from .projections_enn import Projection, ResidualProjection
from .scan_enn import enn_scan
from .wrapped_enn import weight_and_bias


class EnnCell(nn.Module):
    """The Engram cell over a sequence: encode, recall, integrate, write."""

    def __init__(self, config: EnnConfig, input_size: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.encoder = nn.Linear(input_size, hidden_size)
        self.memory_bank = nn.Parameter(torch.empty(config.memory_size, hidden_size))
        self.output = self.gate = self.recurrence = self.encoder_norm = self.output_norm = None
        if config.integrator == "gru":
            self.integrator = nn.Linear(hidden_size, 3 * hidden_size)
            self.recurrence = nn.Linear(hidden_size, 3 * hidden_size)
        else:
            self.integrator = nn.Linear(3 * hidden_size, config.integrator_size)
            self.output = nn.Linear(config.integrator_size, hidden_size)
            if config.integrator == "gated":
                self.gate = nn.Linear(3 * hidden_size, hidden_size)
        if config.use_layer_norm:
            self.encoder_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
            if config.integrator != "gru":
                self.output_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.settings = CellSettings(
            hebbian_lr=config.hebbian_lr,
            trace_scale=config.trace_scale,
            temperature=config.effective_temperature,
            trace_clip=config.trace_clip,
            trace_scope=config.trace_scope,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.trace_noise = config.trace_noise
        self.initial_state_std = config.initial_state_std

    def weights(self) -> CellWeights:
        """The parameters as `ops_enn` takes them."""
        optional = (self.encoder_norm, self.output, self.output_norm, self.gate, self.recurrence)
        encoder_norm, output, output_norm, gate, recurrence = (
            None if module is None else weight_and_bias(module) for module in optional
        )
        return CellWeights(
            *weight_and_bias(self.encoder),
            encoder_norm,
            self.memory_bank,
            *weight_and_bias(self.integrator),
            *(output or (None, None)),
            output_norm,
            gate,
            recurrence,
        )

    def initial_state(self, x: Tensor) -> CellState:
        """State before the first step of `x` `[B, T, I]`: zero, or random in training if the config asks for it."""
        slots, width = self.memory_bank.shape
        hidden = x.new_zeros(x.shape[0], width)
        trace = x.new_zeros(x.shape[0], slots, width, dtype=state_dtype(x.dtype))
        if self.training and self.initial_state_std > 0:
            hidden = hidden.normal_(std=self.initial_state_std)
            # One draw for all rows when they share their trace.
            shape = (slots, width) if self.settings.trace_scope == "batch" else trace.shape
            trace = trace + torch.empty(shape, dtype=trace.dtype, device=x.device).normal_(std=self.initial_state_std)
        return CellState(hidden, trace)

    def write_noise(self, x: Tensor) -> Tensor | None:
        """Noise inside the writes of `x` `[B, T, I]`: `[T, N, H]` or `[T, B, N, H]`, `None` outside training."""
        if not (self.training and self.trace_noise > 0):
            return None
        batch, steps = x.shape[:2]
        rows = () if self.settings.trace_scope == "batch" else (batch,)
        shape = (steps, *rows, *self.memory_bank.shape)
        return torch.empty(shape, dtype=state_dtype(x.dtype), device=x.device).normal_(std=self.trace_noise)

    def forward(
        self,
        x: Tensor,
        state: CellState | None = None,
        masks: StepMasks = NO_MASKS,
        plastic: bool = True,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run over `x` `[B, T, I]`.

        Args:
            state: state before the first step, in any dtype; `None` starts afresh.
            masks: steps that are padding, begin a document, or do not write.
            plastic: `False` leaves the trace as it is.
            slots: bool `[N]`, the slots that take part; `None` for all.

        Returns:
            outputs `[B, T, H]`, recall weights `[B, T, N]`, last trace `[B, N, H]`, encodings `[B, T, H]`, last hidden
            state `[B, H]`.
        """
        if state is None:
            state = self.initial_state(x)
        state = CellState(state.hidden.to(x.dtype), state.trace.to(state_dtype(x.dtype)))
        # Nothing decays and nothing is written at a rate of 0.
        settings = self.settings if plastic else self.settings._replace(hebbian_lr=0.0)
        if slots is None:
            scan = enn_scan(x, state, self.weights(), settings, masks, self.write_noise(x))
        else:
            scan = self._scan_with_slots(x, state, settings, masks, slots)
        return scan.outputs, scan.recall, scan.state.trace, scan.encodings, scan.state.hidden

    def _scan_with_slots(
        self, x: Tensor, state: CellState, settings: CellSettings, masks: StepMasks, slots: Tensor
    ) -> ScanOutput:
        weights, noise = self.weights(), self.write_noise(x)
        scan = enn_scan(
            x,
            CellState(state.hidden, state.trace[:, slots]),
            weights._replace(memory_bank=weights.memory_bank[slots]),
            settings,
            masks,
            None if noise is None else noise[..., slots, :],
        )
        index = slots.nonzero().squeeze(-1)
        recall = scan.recall.new_zeros(*scan.recall.shape[:2], len(slots)).index_copy(2, index, scan.recall)
        trace = state.trace.index_copy(1, index, scan.state.trace)
        return scan._replace(recall=recall, state=CellState(scan.state.hidden, trace))

    def extra_repr(self) -> str:
        """Slots and the scan in use."""
        slots, width = self.memory_bank.shape
        return f"slots={slots}, width={width}, scan={selected_scan()}"


def initial_gate_bias(longest_timescale: float | None, units: int) -> Tensor:
    """Logits of the shares by which units move in a step, `[units]`.

    A unit that moves by 1 / τ forgets over τ steps: τ is 3.7 for all, which keeps most of a hidden state at first, or
    is spread evenly on a log scale from 2 to the longest.
    """
    if longest_timescale is None:
        return torch.full((units,), -1.0)
    timescales = torch.linspace(math.log(2), math.log(longest_timescale), units).exp()
    return -torch.log(timescales - 1)


class StatefulLayer(GradientCheckpointingLayer):
    """What all layers share: they go on from the state in `past_key_values` and leave their new one there.

    A subclass says in `mix` what a layer does; it is wrapped in a pre-norm residual block if the config asks for it.
    """

    def __init__(self, config: EnnConfig, layer_idx: int, input_size: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.residual = config.residual
        self.input_norm = nn.LayerNorm(input_size, eps=config.layer_norm_eps) if config.residual else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def mix(
        self, x: Tensor, state: LayerState | None, masks: StepMasks, plastic: bool, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """Run over `x` `[B, T, I]`.

        Returns:
            outputs `[B, T, H]`, recall weights (`None` without a memory), and the state after the last step.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        masks: StepMasks = NO_MASKS,
        plastic: bool = True,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run over `hidden_states` `[B, T, I]` and write the new state to `past_key_values`; else as [`EnnCell`].

        Returns:
            outputs `[B, T, H]` and recall weights, of a cell `[B, T, N]`, of a mixer `[B, T, heads, N]`, else `None`.
        """
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        x = hidden_states if self.input_norm is None else self.input_norm(hidden_states)
        outputs, recall, state = self.mix(x, state_on(x.device, cache), masks, plastic, slots)
        if cache is not None:
            cache.store(state, hidden_states.shape[1])
        outputs = self.dropout(outputs)
        return (hidden_states + outputs if self.residual else outputs), recall


class EnnLayer(StatefulLayer):
    """One engram layer: the bare cell, or the cell in a pre-norm residual block, its outputs scaled if so asked."""

    def __init__(self, config: EnnConfig, layer_idx: int, input_size: int) -> None:
        super().__init__(config, layer_idx, input_size)
        self.cell = EnnCell(config, input_size)
        scaled = config.layer_scale_init_value is not None
        self.layer_scale = nn.Parameter(torch.empty(config.hidden_size)) if scaled else None

    def mix(
        self, x: Tensor, state: CellState | None, masks: StepMasks, plastic: bool, slots: Tensor | None
    ) -> tuple[Tensor, Tensor, CellState]:
        """The cell."""
        outputs, recall, trace, _, hidden = self.cell(x, state, masks, plastic, slots)
        if self.layer_scale is not None:
            outputs = outputs * self.layer_scale.to(outputs.dtype)
        return outputs, recall, CellState(hidden, trace)


class EnnBlock(StatefulLayer):
    """A mixer or attention, then a feed-forward layer, each in a pre-norm residual block."""

    def __init__(self, config: EnnConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.hidden_size)
        layer_type = config.layer_types[layer_idx]
        if layer_type == "engram_mixer":
            self.mixer = EngramMixer(config)
        else:
            window = config.sliding_window if layer_type == "sliding_attention" else None
            self.mixer = CausalAttention(config, window)
        # Not asked of `mixer`, which PEFT may have wrapped.
        self.has_memory = layer_type == "engram_mixer"
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)

    def mix(
        self, x: Tensor, state: LayerState | None, masks: StepMasks, plastic: bool, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """The mixer, or attention."""
        if not self.has_memory:
            outputs, state = self.mixer(x, state, masks)
            return outputs, None, state
        outputs, recall, _, _, state = self.mixer(x, state, masks, plastic, slots)
        return outputs, recall, state

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As in [`StatefulLayer`], and the feed-forward layer after it."""
        hidden_states, recall = super().forward(hidden_states, *args, **kwargs)
        return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states))), recall


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EnnConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def make_layer(config: EnnConfig, layer_idx: int, input_size: int) -> EnnLayer | EnnBlock:
    """The layer of the type that the config asks for."""
    if config.layer_types[layer_idx] == "engram":
        return EnnLayer(config, layer_idx, input_size)
    return EnnBlock(config, layer_idx)


class Pooling(nn.Module):
    """One vector per sequence: the last valid step, the mean of the valid steps, or attention over them.

    The attention is the original package's: weights softmax over time of tanh(h_t w + b).
    """

    def __init__(self, config: EnnConfig) -> None:
        super().__init__()
        self.kind = config.pooling
        self.score = nn.Linear(config.hidden_size, 1) if config.pooling == "attention" else None

    def forward(self, hidden_states: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool `[B, T, H]` to `[B, H]`; `valid` is bool `[B, T]`, `False` at padding."""
        if valid is None:
            valid = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        if self.score is not None:
            scores = torch.tanh(self.score(hidden_states).squeeze(-1))
            weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=1)
        elif self.kind == "mean":
            weights = valid / valid.sum(1, keepdim=True).clamp_min(1)
        else:
            last = hidden_states.shape[1] - 1 - valid.flip(1).int().argmax(1)
            return hidden_states[torch.arange(hidden_states.shape[0], device=last.device), last]
        return torch.einsum("bt,bth->bh", weights.to(hidden_states.dtype), hidden_states)

    def extra_repr(self) -> str:
        """Kind of pooling."""
        return self.kind
