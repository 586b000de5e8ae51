"""The engram mixer: a memory of several heads and time scales, parallel in training, one step at a time in decoding."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .configuration_enn import EnnConfig
from .dispatch_enn import selected_scan
from .ops_enn import NO_MASKS, StepMasks, l2_normalize, state_dtype
from .ops_mixer_enn import MixerBank, MixerReads, MixerState, convolve, convolve_loop
from .projections_enn import Projection, ResidualProjection
from .scan_mixer_enn import mixer_memory_scan

# The heads of a layer forget over times that are spread evenly, on a log scale, between these, before training.
SHORTEST_TIMESCALE, LONGEST_TIMESCALE = 4, 4096
INITIAL_TEMPERATURE = 0.1  # of cosines: a write is addressed to a few slots, not to all alike
INITIAL_TRACE_SCALE = 8.0  # of a write beside a slot's bank entry, which weighs 1


class EngramMixer(nn.Module):
    """A short causal convolution, the memory (`ops_mixer_enn`), and a gated, normalised output.

    How strongly a step writes (β) and how fast the trace decays before it (λ) depend on its input, head by head.
    """

    def __init__(self, config: EnnConfig) -> None:
        super().__init__()
        hidden_size, self.num_heads, self.head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.conv_weight = nn.Parameter(torch.empty(config.conv_kernel, hidden_size))
        self.q_proj = Projection(hidden_size, width, bias=False)
        self.k_proj = Projection(hidden_size, width, bias=False)
        self.v_proj = Projection(hidden_size, width, bias=False)
        self.gate_proj = Projection(hidden_size, width, bias=False)
        self.plasticity = nn.Linear(hidden_size, 2 * self.num_heads)  # strength of the write, decay of the trace
        self.bank_keys = nn.Parameter(torch.empty(self.num_heads, config.memory_size, self.head_dim))
        self.bank_values = nn.Parameter(torch.empty(self.num_heads, config.memory_size, self.head_dim))
        self.log_trace_scale = nn.Parameter(torch.empty(self.num_heads))
        self.log_write_temperature = nn.Parameter(torch.empty(self.num_heads))
        self.log_read_temperature = nn.Parameter(torch.empty(self.num_heads))
        self.output_norm = nn.RMSNorm(self.head_dim, eps=config.layer_norm_eps)
        self.o_proj = ResidualProjection(width, hidden_size, bias=False)

    def bank(self, dtype: torch.dtype) -> MixerBank:
        """The learned memory as `ops_mixer_enn` takes it."""
        keys, values = l2_normalize(self.bank_keys.to(dtype)), self.bank_values.to(dtype)
        logarithms = self.log_trace_scale, self.log_write_temperature, self.log_read_temperature
        return MixerBank(keys, values, *(value.to(dtype).exp() for value in logarithms))

    def initial_state(self, x: Tensor) -> MixerState:
        """Zero state before the first step of `x` `[B, T, H]`."""
        batch, _, width = x.shape
        slots = self.bank_keys.shape[1]
        return MixerState(
            x.new_zeros(batch, len(self.conv_weight) - 1, width),
            x.new_zeros(batch, self.num_heads, slots, 2 * self.head_dim + 1, dtype=state_dtype(x.dtype)),
        )

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        masks: StepMasks = NO_MASKS,
        plastic: bool = True,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, MixerReads, MixerState]:
        """Run over `x` `[B, T, H]`.

        Args:
            state: state before the first step, in any dtype; `None` starts afresh.
            masks: steps that are padding, begin a document, or do not write.
            plastic: `False` leaves the trace as it is.
            slots: bool `[N]`, the slots that take part; `None` for all.

        Returns:
            outputs `[B, T, H]`, recall weights `[B, T, heads, N]`, last trace `[B, heads, N, 2 * head_dim + 1]`, what
            the steps asked and wrote, and the state after the last step.
        """
        state = self.initial_state(x) if state is None else state
        convolution = convolve_loop if selected_scan() == "definition" else convolve
        inputs, tail = convolution(x, state.tail.to(x.dtype), self.conv_weight.to(x.dtype), masks)
        inputs = F.silu(inputs)
        precise = state_dtype(x.dtype)
        reads = self._reads(inputs, precise, masks, plastic)
        with torch.autocast(x.device.type, enabled=False):
            recalled, recall, trace = self._remember(reads, state.trace.to(precise), masks.restart, slots)
        recalled = self.output_norm(recalled.transpose(1, 2).to(self.output_norm.weight.dtype)).flatten(2)
        outputs = self.o_proj(recalled.to(inputs.dtype) * F.silu(self.gate_proj(inputs)))
        return outputs, recall.transpose(1, 2), trace, reads, MixerState(tail, trace)

    def _remember(
        self, reads: MixerReads, trace: Tensor, restart: Tensor | None, slots: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Recalled memory `[B, A, T, D]`, recall weights `[B, A, T, N]` and the trace after the last step."""
        bank = self.bank(trace.dtype)
        if slots is None:
            return mixer_memory_scan(reads, trace, bank, restart)
        bank = bank._replace(keys=bank.keys[:, slots], values=bank.values[:, slots])
        recalled, recall, new_trace = mixer_memory_scan(reads, trace[:, :, slots], bank, restart)
        index = slots.nonzero().squeeze(-1)
        recall = recall.new_zeros(*recall.shape[:3], len(slots)).index_copy(3, index, recall)
        return recalled, recall, trace.index_copy(2, index, new_trace)

    def _reads(self, inputs: Tensor, dtype: torch.dtype, masks: StepMasks, plastic: bool) -> MixerReads:
        def heads(projection: nn.Linear) -> Tensor:
            return projection(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(dtype)

        strength, rate = self.plasticity(inputs).transpose(1, 2).to(dtype).chunk(2, 1)  # [B, A, T] each
        strength, log_decay = torch.sigmoid(strength), -F.softplus(rate)
        if not plastic:
            strength, log_decay = torch.zeros_like(strength), torch.zeros_like(log_decay)
        if masks.valid is not None:
            strength, log_decay = strength * masks.valid[:, None], log_decay * masks.valid[:, None]
        if masks.writes is not None:
            strength = strength * masks.writes[:, None]
        return MixerReads(
            l2_normalize(heads(self.q_proj)), l2_normalize(heads(self.k_proj)), heads(self.v_proj), strength, log_decay
        )

    def extra_repr(self) -> str:
        """Sizes and the form in use."""
        slots = self.bank_keys.shape[1]
        return f"heads={self.num_heads}, slots={slots}, head_dim={self.head_dim}, scan={selected_scan()}"


def initial_decay_bias(num_heads: int) -> Tensor:
    """Bias of the decay rates, softplus(bias) = 1 / time scale, `[heads]`."""
    exponents = torch.linspace(math.log(SHORTEST_TIMESCALE), math.log(LONGEST_TIMESCALE), num_heads)
    return torch.expm1(torch.exp(-exponents)).log()
