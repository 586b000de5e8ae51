"""The Engram cell over whole sequences, fast, with the values and gradients of its definition.

Two facts make it fast. The encoding does not depend on time, and the memory does not depend on the hidden state: so a
layer is one product for all encodings, then the memory of all steps (`memory_enn`), then the integrator of all steps
(`integrator_enn`, `gru_enn`).
"""

import torch
from torch import Tensor

from .dispatch_enn import selected_scan
from .gru_enn import gru_scan
from .integrator_enn import integrator_scan
from .memory_enn import memory_scan
from .ops_enn import NO_MASKS, CellSettings, CellState, CellWeights, ScanOutput, StepMasks, encode, enn_loop
from .shared_memory_enn import is_shared, shared_memory_scan


def enn_scan(
    x: Tensor,
    state: CellState,
    weights: CellWeights,
    settings: CellSettings,
    masks: StepMasks = NO_MASKS,
    noise: Tensor | None = None,
) -> ScanOutput:
    """Run the cell over a sequence; arguments and result as in `ops_enn.enn_loop`, which it equals.

    Single steps run the definition itself; so do noisy writes and a trace of the whole batch, unless its rows share
    one trace (`shared_memory_enn`), and everything when `HF_ENGRAM_SCAN=definition`.
    """
    stepwise = x.shape[1] == 1 or selected_scan() == "definition"
    shared = not stepwise and is_shared(state.trace, settings, masks)
    if stepwise or (not shared and (noise is not None or settings.trace_scope == "batch")):
        return enn_loop(x, state, weights, settings, masks, noise)

    z = encode(x, weights, settings)
    with torch.autocast(x.device.type, enabled=False):
        precise = state.trace.dtype
        inputs = z.to(precise), state.trace, weights.memory_bank.to(precise), settings
        recalled, recall, trace = shared_memory_scan(*inputs, noise) if shared else memory_scan(*inputs, masks)
        recalled = recalled.to(z.dtype)
    if weights.recurrence is None:
        outputs = integrator_scan(z, recalled, state.hidden, weights, settings, masks)
    else:
        outputs = gru_scan(z, recalled, state.hidden, weights, masks)
    return ScanOutput(outputs, recall, z, CellState(outputs[:, -1], trace))
