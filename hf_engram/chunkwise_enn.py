"""The memory recurrence chunk by chunk in PyTorch, on any device: equal to `ops_enn.memory_step` at every step.

With the trace unrolled into its writes, what step t asks of it is
`z_t · A_t = carry_t (z_t · A_0) + Σ_r decay_tr (z_t · z_r) a_r`, and the row norms of bank plus trace follow from two
running N-vectors per row (`recall_enn`). So the trace itself is needed only between chunks, and the rest is products of
matrices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_enn import SQUARED_NORM_FLOOR, CellSettings, StepMasks, memory_step
from .recall_enn import chunk_recall

CHUNK_SIZE = 64


def chunkwise_scan(
    z: Tensor, trace: Tensor, memory_bank: Tensor, settings: CellSettings, masks: StepMasks
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_enn.memory_scan`, exact under the clip.

    A row whose trace provably stays within the clip needs none; the others run once more, step by step. The proof is
    `|A_t| <= |A_0| + Σ_r |write_r|` within every chunk, entry by entry. It is looked at once, after the last chunk, so
    that a GPU need not wait for it in between.
    """
    first, recalled, recalls = trace, [], []
    exceeds = z.new_zeros(len(z), dtype=torch.bool)
    for start in range(0, z.shape[1], CHUNK_SIZE):
        steps = slice(start, start + CHUNK_SIZE)
        begin, chunk_masks = trace, masks.steps(steps)
        chunk_recalled, recall, trace = chunkwise_memory(z[:, steps], trace, memory_bank, settings, chunk_masks)
        recalled.append(chunk_recalled)
        recalls.append(recall)
        if settings.trace_clip is not None:
            writes = write_rates(z[:, steps], settings, chunk_masks)[..., None] * recall
            bound = begin.abs() + writes.mT @ z[:, steps].abs()
            exceeds |= bound.detach().amax((1, 2)) > settings.trace_clip
    found = (torch.cat(recalled, 1), torch.cat(recalls, 1), trace)
    if settings.trace_clip is None or not exceeds.any():
        return found
    rows = exceeds.nonzero().squeeze(-1)
    stepwise = memory_loop(z[rows], first[rows], memory_bank, settings, masks.rows(rows))
    return tuple(whole.index_copy(0, rows, part) for whole, part in zip(found, stepwise, strict=True))


def keep_rates(z: Tensor, settings: CellSettings, masks: StepMasks) -> Tensor:
    """What every step leaves of the trace `[B, T]`: `1 - hebbian_lr`, 1 at padding."""
    keep = z.new_full(z.shape[:2], 1 - settings.hebbian_lr)
    return keep if masks.valid is None else torch.where(masks.valid, keep, 1)


def write_rates(z: Tensor, settings: CellSettings, masks: StepMasks) -> Tensor:
    """Weight of every step's write `[B, T]`: `hebbian_lr`, 0 where nothing is written."""
    write = z.new_full(z.shape[:2], settings.hebbian_lr)
    for mask in (masks.valid, masks.writes):
        write = write if mask is None else write * mask
    return write


def chunkwise_memory(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of the memory recurrence without a clip; shapes as in `chunkwise_scan`, with T = C."""
    scale = settings.trace_scale
    decay, carry = decay_factors(z, settings.hebbian_lr, masks)
    within, to_end = decay[:, :-1], decay[:, -1:]
    squared = z.square().sum(-1)
    recall, *_ = chunk_recall(
        z @ memory_bank.T,
        within * (z @ z.mT),
        carry[:, :-1] * (z @ trace.mT),
        squared,
        squared.clamp_min(SQUARED_NORM_FLOOR).rsqrt(),
        memory_bank.square().sum(-1),
        (trace * memory_bank).sum(-1),
        trace.square().sum(-1),
        keep_rates(z, settings, masks),
        write_rates(z, settings, masks),
        masks.restart,
        scale,
        settings.temperature,
    )
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


def memory_loop(
    z: Tensor,
    trace: Tensor,
    memory_bank: Tensor,
    settings: CellSettings,
    masks: StepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the definition of a step."""
    recalled, recalls = [], []
    for t in range(z.shape[1]):
        if masks.restart is not None:
            trace = trace.masked_fill(masks.restart[:, t, None, None], 0)
        step_recalled, recall, trace = memory_step(z[:, t], trace, memory_bank, settings, masks.steps(t))
        recalled.append(step_recalled)
        recalls.append(recall)
    return torch.stack(recalled, 1), torch.stack(recalls, 1), trace
