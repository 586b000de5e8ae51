"""The memory of a batch whose rows share one trace, as published: the values and gradients of its definition.

The rows never part: each adds the same mean write. So one trace of `[N, H]` stands for all, and a step's write is one
product of recall weights and encodings.
"""

import torch
from torch import Tensor

from .ops_enn import CellSettings, StepMasks, l2_normalize


def is_shared(trace: Tensor, settings: CellSettings, masks: StepMasks) -> bool:
    """Whether all rows of the trace `[B, N, H]` are alike, stay so, and have no gradients of their own."""
    if settings.trace_scope != "batch" or trace.requires_grad or any(mask is not None for mask in masks):
        return False
    return bool((trace == trace[:1]).all())


def shared_memory_scan(
    z: Tensor, trace: Tensor, memory_bank: Tensor, settings: CellSettings, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `memory_enn.memory_scan`, for a trace that [`is_shared`]; noise `[T, N, H]`."""
    eta, batch = settings.hebbian_lr, len(z)
    shared = trace[0] if batch else torch.zeros_like(memory_bank)
    directions = l2_normalize(z)
    recalled, recalls = [], []
    for t in range(z.shape[1]):
        effective = memory_bank + settings.trace_scale * shared  # [N, H]
        recall = torch.softmax(directions[:, t] @ l2_normalize(effective).T / settings.temperature, -1)
        recalled.append(recall @ effective)
        recalls.append(recall)
        write = recall.T @ z[:, t] / max(batch, 1)
        if noise is not None:
            write = write + noise[t]
        shared = (1 - eta) * shared + eta * write
        if settings.trace_clip is not None and eta > 0:
            shared = shared.clamp(-settings.trace_clip, settings.trace_clip)
    return torch.stack(recalled, 1), torch.stack(recalls, 1), shared.expand(batch, -1, -1)
