"""The memory of the engram mixer over whole sequences, parallel in time.

The steps are cut into chunks. What a chunk writes does not depend on what was written before, so one short loop hands
the trace from chunk to chunk, and everything else is products over all chunks at once. Time and memory grow with T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay_enn import decay_between
from .dispatch_enn import selected_scan
from .ops_mixer_enn import MixerBank, MixerReads, mixer_memory_loop, write_weights

CHUNK_SIZE = 64


def mixer_memory_scan(
    reads: MixerReads, trace: Tensor, bank: MixerBank, restart: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `ops_mixer_enn.mixer_memory_loop`, which it equals and which runs single steps."""
    steps = reads.keys.shape[2]
    if steps == 1 or selected_scan() == "definition":
        return mixer_memory_loop(reads, trace, bank, restart)
    weights = write_weights(reads.keys, reads.strengths, bank)
    chunk = min(CHUNK_SIZE, steps)
    missing = -steps % chunk

    def cut(x: Tensor) -> Tensor:
        # Steps that neither decay nor write fill the last chunk up.
        padded = F.pad(x, (0,) * (2 * (x.ndim - 3)) + (0, missing)) if missing else x
        return padded.unflatten(2, (-1, chunk))  # [B, A, chunks, C, ...]

    queries, keys, values, weights, log_decays = map(
        cut, (reads.queries, reads.keys, reads.values, weights, reads.log_decays)
    )
    documents = None if restart is None else cut(restart[:, None].long()).cumsum(-1)  # [B, 1, chunks, C]
    decay, since_start = decay_between(log_decays, documents)  # [B, A, chunks, C, C] and [B, A, chunks, C]

    written = torch.cat([keys, values, torch.ones_like(keys[..., :1])], -1)
    writes = (weights * decay[..., -1, :, None]).mT @ written  # [B, A, chunks, N, 2 D + 1]
    traces = []
    for index in range(writes.shape[2]):
        traces.append(trace)
        trace = since_start[:, :, index, -1, None, None] * trace + writes[:, :, index]
    width = keys.shape[-1]
    key_traces, value_traces, masses = torch.stack(traces, 2).split([width, width, 1], -1)

    scale = bank.trace_scale[:, None, None, None]
    mass = since_start[..., None] * masses.mT + decay @ weights
    total = 1 + scale * mass
    old = (queries @ key_traces.mT) * since_start[..., None]
    new = ((queries @ keys.mT) * decay) @ weights
    scores = queries @ bank.keys.mT[:, None] + scale * (old + new)
    recall = torch.softmax(scores / total / bank.read_temperature[:, None, None, None], -1)
    shares = recall / total
    old = (shares @ value_traces) * since_start[..., None]
    new = ((shares @ weights.mT) * decay) @ values
    recalled = shares @ bank.values[:, None] + scale * (old + new)
    return recalled.flatten(2, 3)[:, :, :steps], recall.flatten(2, 3)[:, :, :steps], trace
