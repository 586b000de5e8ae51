"""Causal attention over a window of past tokens, with a state that can be carried from segment to segment."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROTARY_BASE = 10_000.0


class WindowedAttention(nn.Module):
    """Multi-head attention with rotary positions over the last `config.attention_window` tokens of a document.

    Its state are the keys (before rotation) and values of these tokens, so that a text read in segments gives the
    outputs of the whole text. Heads are `hidden_size / num_attention_heads` wide, rounded up to an even number.
    """

    def __init__(self, config: Any, input_size: int) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_attention_heads, config.attention_window
        self.head_size = 2 * math.ceil(config.hidden_size / self.num_heads / 2)
        self.projection = nn.Linear(input_size, 3 * self.num_heads * self.head_size)
        self.output = nn.Linear(self.num_heads * self.head_size, config.hidden_size)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, valid: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run over `x` `[B, T, I]`.

        Args:
            state: keys and values `[B, heads, S, D]` of earlier tokens and which of them can be seen, bool `[B, S]`.
            valid: bool `[B, T]`; `False` at padding, which nothing attends to.
            restart: bool `[B, T]`; `True` where a new document begins: what is before cannot be seen.

        Returns:
            outputs `[B, T, H]` and the new state.
        """
        batch, steps = x.shape[:2]
        heads = self.projection(x).view(batch, steps, 3, self.num_heads, self.head_size)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        seen = torch.ones(batch, steps, dtype=torch.bool, device=x.device) if valid is None else valid
        if state is not None:
            keys, values = torch.cat([state[0].to(keys), keys], 2), torch.cat([state[1].to(values), values], 2)
            seen = torch.cat([state[2], seen], 1)
        past = seen.shape[1] - steps

        # Tokens of a row belong together when they have the same number; earlier tokens of the state have 0.
        documents = torch.zeros(batch, past + steps, dtype=torch.long, device=x.device)
        if restart is not None:
            documents[:, past:] = restart.cumsum(1)
        places = torch.arange(past + steps, device=x.device)
        distance = places[past:, None] - places
        near = (distance >= 0) & (distance < self.window)
        mask = near & seen[:, None] & (documents[:, past:, None] == documents[:, None])
        mask = mask | (distance == 0)  # padding attends to itself, so that no row of the softmax is empty

        queries, rotated = rotate(queries, places[past:]), rotate(keys, places)
        outputs = F.scaled_dot_product_attention(queries, rotated, values, attn_mask=mask[:, None])
        outputs = self.output(outputs.transpose(1, 2).flatten(2))
        kept = slice(-self.window, None)
        still_seen = seen & (documents == documents[:, -1:])
        return outputs, (keys[:, :, kept], values[:, :, kept], still_seen[:, kept])


def rotate(heads: Tensor, places: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): `[B, heads, T, D]` at `places` `[T]`; scores see differences."""
    half = heads.shape[-1] // 2
    precise = torch.promote_types(heads.dtype, torch.float32)
    rates = ROTARY_BASE ** (-torch.arange(half, device=heads.device, dtype=precise) / half)
    angles = places[:, None] * rates
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)
