"""The Engram cell over whole sequences, fast, with the values and gradients of its definition.

Three facts make it fast. The encoding does not depend on time; the memory recurrence does not depend on the hidden
state; and recall needs only N numbers per step, not the trace itself, because everything it asks of the trace is a
sum over earlier writes (`chunkwise_memory`). What remains sequential are two small recurrences, each one autograd
function with its own backward pass, so that nothing but their inputs and outputs is kept per step.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiled_enn import can_compile
from .compiled_enn import recall_backward as compiled_backward
from .compiled_enn import recall_forward as compiled_forward
from .kernels_enn import ChunkRecalls, ChunkTerms, recall_backward, recall_forward
from .ops_enn import (
    NO_MASKS,
    SQUARED_NORM_FLOOR,
    CellSettings,
    CellState,
    CellWeights,
    ScanOutput,
    StepMasks,
    encode,
    enn_loop,
    integrator_step,
    memory_step,
)

CHUNK_SIZE = 64
SCAN_VARIABLE = "HF_ENGRAM_SCAN"
SCANS = ("auto", "chunkwise", "definition")


def selected_scan() -> str:
    """The scan that `enn_scan` uses: the environment variable `HF_ENGRAM_SCAN`, "auto" unless it is set.

    "auto" is the chunkwise form with its inner loop compiled by numba where that is installed and the tensors are on
    the CPU; "chunkwise" is the same in PyTorch alone; "definition" runs `ops_enn.enn_loop`.

    Raises:
        ValueError: the variable holds an unknown name.
    """
    name = os.environ.get(SCAN_VARIABLE, "auto")
    if name not in SCANS:
        raise ValueError(f"{SCAN_VARIABLE} is {name!r}; allowed: {SCANS}.")
    return name


def enn_scan(
    x: Tensor,
    state: CellState,
    weights: CellWeights,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    noise: Tensor | None = None,
) -> ScanOutput:
    """Run the cell over a sequence; arguments and result as in `ops_enn.enn_loop`, which it equals.

    Single steps, noisy writes and a trace shared by the batch run the definition itself; so does everything when
    `HF_ENGRAM_SCAN=definition`.
    """
    stepwise = x.shape[1] == 1 or noise is not None or settings.trace_scope == "batch"
    if stepwise or selected_scan() == "definition":
        return enn_loop(x, state, weights, settings, masks, noise)

    z = encode(x, weights, settings)
    with torch.autocast(x.device.type, enabled=False):
        precise = state.trace.dtype
        recalled, recall, trace = memory_scan(
            z.to(precise), state.trace, weights.memory_bank.to(precise), settings, masks
        )
        recalled = recalled.to(z.dtype)
    outputs, hidden = integrator_scan(z, recalled, state.hidden, weights, settings, masks)
    return ScanOutput(outputs, recall, z, CellState(hidden, trace))


def memory_scan(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """All recalls and writes of a sequence, chunk by chunk.

    Args:
        z: encodings `[B, T, H]`.
        trace: trace before the first step `[B, N, H]`.
        memory_bank: learned slots `[N, H]`.
        masks: each `[B, T]`, as in `ops_enn.enn_loop`.

    Returns:
        recalled memory `[B, T, H]`, recall weights `[B, T, N]`, trace after the last step `[B, N, H]`.
    """
    recalled, recalls = [], []
    for start in range(0, z.shape[1], chunk_size):
        steps = slice(start, start + chunk_size)
        chunk = (z[:, steps], trace, memory_bank, settings, masks.steps(steps))
        clipped = settings.trace_clip is not None
        chunk_recalled, chunk_recall, trace = clipped_chunk(*chunk) if clipped else chunkwise_memory(*chunk)
        recalled.append(chunk_recalled)
        recalls.append(chunk_recall)
    return torch.cat(recalled, 1), torch.cat(recalls, 1), trace


def chunkwise_memory(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of the memory recurrence without a clip; shapes as in `memory_scan`, with T = C.

    With the trace unrolled into its writes, what step t asks of it is
    `z_t · A_t = carry_t (z_t · A_0) + Σ_r decay_tr (z_t · z_r) a_r`, and the row norms of bank plus trace follow from
    two running N-vectors per row; `kernels_enn.recall_forward` runs that recurrence.
    """
    scale = settings.trace_scale
    rate = z.new_full(z.shape[:2], settings.hebbian_lr)
    if masks.valid is not None:
        rate = rate * masks.valid
    write_rate = rate if masks.writes is None else rate * masks.writes
    decay, carry = decay_factors(z, settings.hebbian_lr, masks)
    within, to_end = decay[:, :-1], decay[:, -1:]
    squared = z.square().sum(-1)
    terms = ChunkTerms(
        bank_dot=z @ memory_bank.T,
        gram=within * (z @ z.mT),
        squared=squared,
        inverse_norm=squared.clamp_min(SQUARED_NORM_FLOOR).rsqrt(),
        keep=1 - rate,
        write=write_rate,
        restart=masks.restart,
    )
    trace_dot = carry[:, :-1] * (z @ trace.mT)
    bank_squared = memory_bank.square().sum(-1)
    mu, nu = (trace * memory_bank).sum(-1), trace.square().sum(-1)
    recall = ChunkRecall.apply(*terms, trace_dot, bank_squared, mu, nu, settings)
    own_writes = (within * (recall @ recall.mT)) @ z
    recalled = recall @ memory_bank + scale * ((carry[:, :-1] * recall) @ trace + own_writes)
    trace = carry[:, -1:] * trace + (to_end.mT * recall).mT @ z
    return recalled, recall, trace


def decay_factors(z: Tensor, hebbian_lr: float, masks: StepMasks) -> tuple[Tensor, Tensor]:
    """How much of each write, and of the first trace, is left at each step of a chunk.

    Returns:
        decay `[B or 1, C + 1, C]`: the weight of the write of step r in the trace read at step t (t = C: the trace
            after the chunk). Padding does not write and does not decay; a restart forgets all before it.
        carry `[B or 1, C + 1, 1]`: the weight of the chunk's first trace in the trace read at step t.
    """
    steps = z.shape[1]
    decays = z.new_ones(1, steps) if masks.valid is None else masks.valid.to(z.dtype)
    writes = decays if masks.writes is None else decays * masks.writes
    before = F.pad(decays.cumsum(-1), (1, 0))  # [B, C + 1], decays before step t
    elapsed = before[:, :, None] - before[:, None, 1:]  # [B, C + 1, C]
    keep = 1 - hebbian_lr
    step = torch.arange(steps + 1, device=z.device)
    seen = step[:, None] > step[None, :-1]
    decay = torch.where(seen, hebbian_lr * keep ** elapsed.clamp_min(0), 0) * writes[:, None, :]
    carry = keep**before
    if masks.restart is not None:
        document = masks.restart.cumsum(-1)
        document_read = torch.cat([document, document[:, -1:]], -1)  # [B, C + 1]
        decay = decay * (document_read[:, :, None] == document[:, None, :])
        carry = carry * (document_read == 0)
    return decay, carry[:, :, None]


class ChunkRecall(torch.autograd.Function):
    """Recall weights `[B, C, N]` of a chunk: `recall_forward` with its gradients, compiled where possible."""

    @staticmethod
    def forward(
        ctx, bank_dot, gram, squared, inverse_norm, keep, write, restart, trace_dot, bank_squared, mu, nu, settings
    ):
        ctx.settings = settings
        ctx.compiled = selected_scan() == "auto" and can_compile(bank_dot)
        run = compiled_forward if ctx.compiled else recall_forward
        terms = ChunkTerms(bank_dot, gram, squared, inverse_norm, keep, write, restart)
        found = run(terms, trace_dot, bank_squared, mu, nu, settings)
        ctx.save_for_backward(*terms, *found)
        return found.recall

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_recall):
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
        terms, found = ChunkTerms(*saved[:7]), ChunkRecalls(*saved[7:])
        run = compiled_backward if ctx.compiled else recall_backward
        grad = run(grad_recall, terms, found, ctx.settings)
        grad_gram = grad.product @ found.recall.mT
        grad_terms = (grad.bank_dot, grad_gram, grad.squared, grad.inverse_norm, None, None, None)
        return (*grad_terms, grad.product, grad.bank_squared, grad.mu, grad.nu, None)


def clipped_chunk(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunkwise_memory` under the clip, exact.

    A row whose trace provably stays within the clip all through the chunk needs no clip; the others run step by step.
    The proof is `|A_t| <= |A_0| + hebbian_lr Σ_r a_r |z_r|`, entry by entry.
    """
    recalled, recall, new_trace = chunkwise_memory(z, trace, memory_bank, settings, masks)
    with torch.no_grad():
        bound = trace.abs() + settings.hebbian_lr * (recall.mT @ z.abs())
        clipped = (bound.amax((1, 2)) > settings.trace_clip).nonzero().squeeze(-1)
    if len(clipped) == 0:
        return recalled, recall, new_trace
    stepwise = memory_loop(z[clipped], trace[clipped], memory_bank, settings, masks.rows(clipped))
    if len(clipped) == len(z):
        return stepwise
    return (
        recalled.index_copy(0, clipped, stepwise[0]),
        recall.index_copy(0, clipped, stepwise[1]),
        new_trace.index_copy(0, clipped, stepwise[2]),
    )


def memory_loop(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_scan` by the definition of a step."""
    recalled, recalls = [], []
    for t in range(z.shape[1]):
        if masks.restart is not None:
            trace = trace.masked_fill(masks.restart[:, t, None, None], 0)
        step_recalled, recall, trace = memory_step(z[:, t], trace, memory_bank, settings, masks.steps(t))
        recalled.append(step_recalled)
        recalls.append(recall)
    return torch.stack(recalled, 1), torch.stack(recalls, 1), trace


def integrator_scan(
    z: Tensor,
    recalled: Tensor,
    hidden: Tensor,
    weights: CellWeights,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
) -> tuple[Tensor, Tensor]:
    """All hidden states of a sequence, given its encodings and recalled memories.

    Args:
        z, recalled: `[B, T, H]`.
        hidden: hidden state before the first step `[B, H]`.
        masks: each `[B, T]`, as in `ops_enn.enn_loop`.

    Returns:
        hidden states `[B, T, H]` and the last one `[B, H]`.
    """
    if weights.gate is not None:
        return gated_loop(z, recalled, hidden, weights, settings, masks)
    valid, restart, _ = masks
    width = hidden.shape[-1]
    from_inputs, from_hidden = weights.integrator_weight.split([2 * width, width], dim=1)
    drive = F.linear(torch.cat([z, recalled], -1), from_inputs, weights.integrator_bias)
    norm_weight, norm_bias = weights.output_norm or (None, None)
    outputs = IntegratorRecurrence.apply(
        drive.transpose(0, 1).to(from_hidden.dtype),
        hidden.to(from_hidden.dtype),
        from_hidden,
        weights.output_weight,
        weights.output_bias,
        norm_weight,
        norm_bias,
        settings.layer_norm_eps,
        None if valid is None else valid.T[:, :, None],
        None if restart is None else restart.T[:, :, None],
    )
    return outputs.transpose(0, 1), outputs[-1]


def gated_loop(
    z: Tensor, recalled: Tensor, hidden: Tensor, weights: CellWeights, settings: CellSettings, masks: StepMasks
) -> tuple[Tensor, Tensor]:
    """`integrator_scan` with a gate, by the definition of a step."""
    outputs = []
    for t in range(z.shape[1]):
        step = masks.steps(t)
        if step.restart is not None:
            hidden = hidden.masked_fill(step.restart[:, None], 0)
        new = integrator_step(z[:, t], recalled[:, t], hidden, weights, settings.layer_norm_eps)
        hidden = new if step.valid is None else torch.where(step.valid[:, None], new, hidden)
        outputs.append(hidden)
    return torch.stack(outputs, 1), hidden


class IntegratorRecurrence(torch.autograd.Function):
    """h_t = LN(relu(relu(drive_t + h_{t-1} Whᵀ) Woᵀ + bo)), time first; only dh is sequential in the backward pass."""

    @staticmethod
    def forward(ctx, drive, hidden, w_hidden, w_out, b_out, norm_weight, norm_bias, eps, valid, restart):
        steps, batch, _ = drive.shape
        width = hidden.shape[-1]
        inner = torch.empty_like(drive, memory_format=torch.contiguous_format)
        active = drive.new_empty(steps, batch, width)
        states = drive.new_empty(steps + 1, batch, width)
        states[0] = hidden
        before = states[:-1] if restart is None else torch.empty_like(active)  # the hidden state each step reads
        mean, rstd = drive.new_empty(2, steps, batch, 1) if norm_weight is not None else (None, None)
        w_hidden_t, w_out_t = w_hidden.T.contiguous(), w_out.T.contiguous()
        every_step = zip(drive, inner, active, before, states, states[1:], strict=False)
        for t, (drive_t, inner_t, active_t, before_t, last, state) in enumerate(every_step):
            if restart is not None:
                before_t.copy_(last).masked_fill_(restart[t], 0)
            torch.addmm(drive_t, before_t, w_hidden_t, out=inner_t).relu_()
            if norm_weight is None:
                torch.addmm(b_out, inner_t, w_out_t, out=state).relu_()
                active_t.copy_(state)
            else:
                torch.addmm(b_out, inner_t, w_out_t, out=active_t).relu_()
                torch.ops.aten.native_layer_norm.out(
                    active_t, (width,), norm_weight, norm_bias, eps, out0=state, out1=mean[t], out2=rstd[t]
                )
            if valid is not None:
                torch.where(valid[t], state, before_t, out=state)
        ctx.save_for_backward(
            inner, active, before, mean, rstd, w_hidden, w_out, norm_weight, norm_bias, valid, restart
        )
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        inner, active, before, mean, rstd, w_hidden, w_out, norm_weight, norm_bias, valid, restart = ctx.saved_tensors
        relu_backward = torch.ops.aten.threshold_backward.grad_input
        grad_inner, grad_active, grad_normed = (
            torch.empty_like(inner),
            torch.empty_like(active),
            torch.empty_like(active),
        )
        grad = torch.zeros_like(active[0])
        every_step = zip(grad_outputs, inner, active, grad_inner, grad_active, grad_normed, strict=True)
        for t, (grad_output, inner_t, active_t, d_inner, d_active, d_normed) in reversed(list(enumerate(every_step))):
            torch.add(grad, grad_output, out=d_normed)
            if valid is not None:
                kept = d_normed.masked_fill(valid[t], 0)
                d_normed.masked_fill_(~valid[t], 0)
            d_relu = d_normed
            if norm_weight is not None:
                d_relu = torch.ops.aten.native_layer_norm_backward(
                    d_normed,
                    active_t,
                    active_t.shape[-1:],
                    mean[t],
                    rstd[t],
                    norm_weight,
                    norm_bias,
                    (True, False, False),
                )[0]
            relu_backward(d_relu, active_t, 0, grad_input=d_active)
            relu_backward(torch.mm(d_active, w_out, out=d_inner), inner_t, 0, grad_input=d_inner)
            torch.mm(d_inner, w_hidden, out=grad)
            if valid is not None:
                grad += kept
            if restart is not None:
                grad.masked_fill_(restart[t], 0)
        rows_inner, rows_active = grad_inner.flatten(0, 1), grad_active.flatten(0, 1)
        grad_norm_weight = grad_norm_bias = None
        if norm_weight is not None:
            grad_norm_weight = (grad_normed * (active - mean) * rstd).sum((0, 1))
            grad_norm_bias = grad_normed.sum((0, 1))
        return (
            grad_inner,
            grad,
            rows_inner.T @ before.flatten(0, 1),
            rows_active.T @ inner.flatten(0, 1),
            rows_active.sum(0),
            grad_norm_weight,
            grad_norm_bias,
            None,
            None,
            None,
        )
