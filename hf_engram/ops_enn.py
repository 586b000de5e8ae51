"""The Engram cell as functions on tensors: the definition that every faster path must reproduce.

Source of the formulas: Szelogowski, arXiv 2507.21474, checked against numbers recorded from its public code
(tests/fixtures/reference). Letters in shapes: B batch, T steps, I input width, H hidden width, K integrator width,
N memory slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARED_NORM_FLOOR = 1e-12


class CellWeights(NamedTuple):
    """Weights of one cell, in the layout of `torch.nn.Linear`; the norms are `None` without layer normalisation.

    A GRU integrator has a `recurrence`, and neither output layer nor output norm.
    """

    encoder_weight: Tensor  # [H, I]
    encoder_bias: Tensor  # [H]
    encoder_norm: tuple[Tensor, Tensor] | None  # weight [H], bias [H]
    memory_bank: Tensor  # [N, H]
    integrator_weight: Tensor  # [K, 3H], columns in the order encoding, recalled memory, hidden state; of a GRU [3H, H]
    integrator_bias: Tensor  # [K], of a GRU [3H]
    output_weight: Tensor | None  # [H, K]
    output_bias: Tensor | None  # [H]
    output_norm: tuple[Tensor, Tensor] | None  # weight [H], bias [H]
    gate: tuple[Tensor, Tensor] | None = None  # weight [H, 3H] (columns as above), bias [H]; `None`: no gate
    recurrence: tuple[Tensor, Tensor] | None = None  # of a GRU: weight [3H, H], bias [3H]; reset, update, proposal


class CellSettings(NamedTuple):
    """Constants of one cell."""

    hebbian_lr: float
    trace_scale: float
    temperature: float  # of the softmax over slots, sparsity already divided out
    trace_clip: float | None
    trace_scope: str  # "sequence" or "batch"
    layer_norm_eps: float


class StepMasks(NamedTuple):
    """Steps of a sequence that are not like the others, each bool `[B, T]`; `None` where all are alike."""

    valid: Tensor | None = None  # False at padding, which leaves the whole state as it is
    restart: Tensor | None = None  # True where a new document begins: the state is zero before that step
    writes: Tensor | None = None  # False at a token that writes nothing; the trace decays all the same

    def steps(self, steps: slice | int) -> "StepMasks":
        """The masks of some steps (`[B, t]`) or of one (`[B]`)."""
        return StepMasks(*(None if mask is None else mask[:, steps] for mask in self))

    def rows(self, rows: Tensor) -> "StepMasks":
        """The masks of the rows with these indices."""
        return StepMasks(*(None if mask is None else mask[rows] for mask in self))


NO_MASKS = StepMasks()


class CellState(NamedTuple):
    """What a cell carries from step to step."""

    hidden: Tensor  # [B, H], in the dtype of the inputs
    trace: Tensor  # [B, N, H], float32 at least


class ScanOutput(NamedTuple):
    """What a scan over a sequence returns."""

    outputs: Tensor  # [B, T, H], the hidden state after every step
    recall: Tensor  # [B, T, N], the weights over slots at every step
    encodings: Tensor  # [B, T, H], what every step compared with the memory and wrote
    state: CellState  # after the last step


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the trace and of everything computed with it: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def layer_norm(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """Layer normalisation over the last axis; the identity when `norm` is `None`."""
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm[0], norm[1], eps)


def l2_normalize(x: Tensor) -> Tensor:
    """`x / sqrt(max(|x|², 1e-12))` over the last axis: the floor is on the *squared* norm, as published."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(SQUARED_NORM_FLOOR).rsqrt()


def encode(x: Tensor, weights: CellWeights, settings: CellSettings) -> Tensor:
    """Encoding z = LN(relu(x We + be)): `[..., I]` to `[..., H]`."""
    z = F.relu(F.linear(x, weights.encoder_weight, weights.encoder_bias))
    return layer_norm(z, weights.encoder_norm, settings.layer_norm_eps)


def memory_step(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recall from bank and trace, then write.

    Args:
        z: encoding `[B, H]`.
        trace: Hebbian trace `[B, N, H]`, restarts already cleared.
        memory_bank: learned slots `[N, H]`.
        masks: of this step, each `[B]`; `restart` is not looked at.
        noise: `[N, H]` or `[B, N, H]`, added inside the write.

    Returns:
        recalled memory `[B, H]`, recall weights `[B, N]`, new trace `[B, N, H]`.
    """
    eta = settings.hebbian_lr
    effective = memory_bank + settings.trace_scale * trace  # [B, N, H]
    cosine = torch.einsum("bh,bnh->bn", l2_normalize(z), l2_normalize(effective))
    recall = torch.softmax(cosine / settings.temperature, dim=-1)
    recalled = torch.einsum("bn,bnh->bh", recall, effective)

    write = torch.einsum("bn,bh->bnh", recall, z)
    if settings.trace_scope == "batch":
        write = _mean_of_writers(write, masks)
    elif masks.writes is not None:
        write = torch.where(masks.writes[:, None, None], write, 0)
    if noise is not None:
        write = write + noise
    new_trace = (1 - eta) * trace + eta * write
    if settings.trace_clip is not None and eta > 0:
        new_trace = new_trace.clamp(-settings.trace_clip, settings.trace_clip)
    if masks.valid is not None:
        new_trace = torch.where(masks.valid[:, None, None], new_trace, trace)
    return recalled, recall, new_trace


def _mean_of_writers(write: Tensor, masks: StepMasks) -> Tensor:
    writers = torch.ones(len(write), dtype=torch.bool, device=write.device)
    for mask in (masks.valid, masks.writes):
        writers = writers if mask is None else writers & mask
    return torch.where(writers[:, None, None], write, 0).sum(0) / writers.sum().clamp_min(1)


def integrator_step(z: Tensor, recalled: Tensor, hidden: Tensor, weights: CellWeights, eps: float) -> Tensor:
    """Next hidden state `[B, H]` from encoding, recalled memory and hidden state, each `[B, H]`.

    Without a gate, the paper's: h = LN(relu(u Wo + bo)) with u = relu([z, m, h] Wi + bi). With one, ours:
    h + g ∘ (LN(u Wo + bo) - h) with g = sigmoid([z, m, h] Wg + bg). With a `recurrence`, [`gru_step`].
    """
    if weights.recurrence is not None:
        return gru_step(z, recalled, hidden, weights)
    read = torch.cat([z, recalled, hidden], -1)
    inner = F.relu(F.linear(read, weights.integrator_weight, weights.integrator_bias))
    proposal = F.linear(inner, weights.output_weight, weights.output_bias)
    if weights.gate is None:
        return layer_norm(F.relu(proposal), weights.output_norm, eps)
    gate = torch.sigmoid(F.linear(read, *weights.gate))
    return hidden + gate * (layer_norm(proposal, weights.output_norm, eps) - hidden)


def gru_step(z: Tensor, recalled: Tensor, hidden: Tensor, weights: CellWeights) -> Tensor:
    """Next hidden state by a GRU (Cho et al., arXiv 1406.1078, as in `torch.nn.GRU`) that reads z + m.

    r, u = sigmoid((z + m) W + b + h U + c), each with rows of its own; n = tanh((z + m) Wn + bn + r ∘ (h Un + cn));
    u ∘ h + (1 - u) ∘ n.
    """
    from_inputs = F.linear(z + recalled, weights.integrator_weight, weights.integrator_bias).chunk(3, -1)
    from_hidden = F.linear(hidden, *weights.recurrence).chunk(3, -1)
    reset, update = (torch.sigmoid(a + b) for a, b in zip(from_inputs[:2], from_hidden[:2], strict=True))
    proposal = torch.tanh(from_inputs[2] + reset * from_hidden[2])
    return proposal + update * (hidden - proposal)


def enn_step(
    x: Tensor,
    state: CellState,
    weights: CellWeights,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, CellState]:
    """One step of the cell.

    Args:
        x: input `[B, I]`.
        state: hidden `[B, H]` and trace `[B, N, H]` before the step.
        masks: of this step, each `[B]`.
        noise: `[N, H]` or `[B, N, H]`, added inside the write.

    Returns:
        recall weights `[B, N]`, encoding `[B, H]`, and the state after the step, whose `hidden` is the output.
    """
    if masks.restart is not None:
        state = clear_rows(state, masks.restart)
    z = encode(x, weights, settings)
    precise = state.trace.dtype
    with torch.autocast(x.device.type, enabled=False):
        recalled, recall, trace = memory_step(
            z.to(precise), state.trace, weights.memory_bank.to(precise), settings, masks, noise
        )
    hidden = integrator_step(z, recalled.to(z.dtype), state.hidden, weights, settings.layer_norm_eps)
    if masks.valid is not None:
        hidden = torch.where(masks.valid[:, None], hidden, state.hidden)
    return recall, z, CellState(hidden, trace)


def enn_loop(
    x: Tensor,
    state: CellState,
    weights: CellWeights,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    noise: Tensor | None = None,
) -> ScanOutput:
    """The definition, step by step over a sequence.

    Args:
        x: inputs `[B, T, I]`.
        state: hidden `[B, H]` and trace `[B, N, H]` before the first step.
        masks: each `[B, T]`.
        noise: `[T, N, H]` or `[T, B, N, H]`, added inside the writes.
    """
    outputs, recalls, encodings = [], [], []
    for t in range(x.shape[1]):
        step_noise = None if noise is None else noise[t]
        recall, z, state = enn_step(x[:, t], state, weights, settings, masks.steps(t), step_noise)
        outputs.append(state.hidden)
        recalls.append(recall)
        encodings.append(z)
    return ScanOutput(torch.stack(outputs, 1), torch.stack(recalls, 1), torch.stack(encodings, 1), state)


def clear_rows(state: CellState, rows: Tensor) -> CellState:
    """The state with the rows marked in `rows` (bool `[B]`) set to zero."""
    return CellState(
        state.hidden.masked_fill(rows[:, None], 0),
        state.trace.masked_fill(rows[:, None, None], 0),
    )
