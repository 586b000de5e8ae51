"""Causal attention over the tokens of a document, for hybrids: its state are the keys and values of these tokens."""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .configuration_enn import EnnConfig
from .ops_enn import NO_MASKS, StepMasks, state_dtype
from .projections_enn import Projection, ResidualProjection

ROTARY_BASE = 10_000.0
HIDDEN = -1  # position of a token that cannot be seen


class AttentionState(NamedTuple):
    """What an attention layer carries from step to step; S tokens."""

    keys: Tensor  # [B, A, S, D], rotated
    values: Tensor  # [B, A, S, D]
    positions: Tensor  # [B, S], int64: places in the document; HIDDEN at padding and in earlier documents
    length: Tensor  # [B], int64: tokens of the document that were seen, padding not counted


class CausalAttention(nn.Module):
    """Multi-head attention with rotary positions, over all tokens of a document or over the last `sliding_window`.

    Positions count the tokens of a document, not its padding, so that padding changes nothing.
    """

    def __init__(self, config: EnnConfig, sliding_window: int | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.sliding_window = config.num_attention_heads, config.head_dim, sliding_window
        width = self.num_heads * self.head_dim
        self.q_proj = Projection(config.hidden_size, width, bias=False)
        self.k_proj = Projection(config.hidden_size, width, bias=False)
        self.v_proj = Projection(config.hidden_size, width, bias=False)
        self.o_proj = ResidualProjection(width, config.hidden_size, bias=False)

    def initial_state(self, x: Tensor) -> AttentionState:
        """Empty state before the first step of `x` `[B, T, H]`."""
        nothing = x.new_zeros(len(x), self.num_heads, 0, self.head_dim)
        positions = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
        return AttentionState(nothing, nothing, positions, positions.sum(1))

    def forward(
        self, x: Tensor, state: AttentionState | None = None, masks: StepMasks = NO_MASKS
    ) -> tuple[Tensor, AttentionState]:
        """Run over `x` `[B, T, H]`.

        Args:
            state: state before the first step; `None` starts afresh.
            masks: steps that are padding or begin a document. Every token can be seen by later ones, `masks.writes` or
                not: attention has no memory to write into.

        Returns:
            outputs `[B, T, H]` and the state after the last step.
        """
        state = self.initial_state(x) if state is None else state
        queries, keys, values = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        places, documents = self._places(x, state, masks)
        queries, keys = rotate(queries, places), rotate(keys, places)
        seen = places if masks.valid is None else places.masked_fill(~masks.valid, HIDDEN)
        past = state.positions.shape[1]
        keys = torch.cat([state.keys.to(keys), keys], 2)
        values = torch.cat([state.values.to(values), values], 2)
        positions = torch.cat([state.positions, seen], 1)
        documents = F.pad(documents, (past, 0))  # what the state holds goes with the first document

        visible = self._visible(places, positions, documents, past)
        outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None])
        outputs = self.o_proj(outputs.transpose(1, 2).flatten(2))
        last = documents[:, -1:]
        positions = positions.masked_fill(documents != last, HIDDEN)
        length = torch.maximum(positions.amax(1) + 1, torch.where(last[:, 0] > 0, 0, state.length))
        return outputs, self._trim(AttentionState(keys, values, positions, length))

    def _places(self, x: Tensor, state: AttentionState, masks: StepMasks) -> tuple[Tensor, Tensor]:
        """Place of every step in its document, and the number of the document, counted from 0; `[B, T]` each."""
        batch, steps = x.shape[:2]
        counted = x.new_ones(batch, steps, dtype=torch.long) if masks.valid is None else masks.valid.long()
        before = state.length[:, None] + counted.cumsum(1) - counted
        if masks.restart is None:
            return before, torch.zeros_like(before)
        begun = torch.where(masks.restart, before, 0).cummax(1).values
        return before - begun, masks.restart.long().cumsum(1)

    def _visible(self, places: Tensor, positions: Tensor, documents: Tensor, past: int) -> Tensor:
        """Which of the tokens (columns) every step (row) may see, bool `[B, T, S]`."""
        distance = places[:, :, None] - positions[:, None]
        visible = (distance >= 0) & (positions >= 0)[:, None]
        if self.sliding_window is not None:
            visible = visible & (distance < self.sliding_window)
        visible = visible & (documents[:, past:, None] == documents[:, None])
        # Every step sees itself, padding too: no row of the softmax may be empty.
        steps = torch.arange(positions.shape[1], device=places.device)
        return visible | (steps[past:, None] == steps)

    def _trim(self, state: AttentionState) -> AttentionState:
        """Hide what lies behind the window, and leave the columns out that no row will see again."""
        positions = state.positions
        if self.sliding_window is not None:
            far = state.length[:, None] - positions >= self.sliding_window
            positions = positions.masked_fill(far, HIDDEN)
        if is_compiling():  # to look at values would break the graph
            return state._replace(positions=positions)
        needed = (positions >= 0).any(0).nonzero()
        first = needed[0, 0] if len(needed) else positions.shape[1]
        return AttentionState(state.keys[:, :, first:], state.values[:, :, first:], positions[:, first:], state.length)


def rotate(heads: Tensor, places: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): `[B, heads, T, D]` at `places` `[B, T]`."""
    half, precise = heads.shape[-1] // 2, state_dtype(heads.dtype)
    rates = ROTARY_BASE ** (-torch.arange(half, device=heads.device, dtype=precise) / half)
    angles = places[:, None, :, None] * rates
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)
