"""The memories of a model, as the page watches them: one for every engram layer, and one for every head of a mixer.

All of them follow one rule, which the browser replays: a token writes `trace ← kept · trace + share ⊗ content`, where a
share is how much of the content a slot takes in. What the kinds of layers do otherwise, `WatchedMemory` says.

Letters in shapes: T tokens, N memory slots, W width of a memory.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_engram.cache_enn import StateLayer
from hf_engram.configuration_enn import MEMORY_LAYER_TYPES, memory_layers
from hf_engram.modeling_enn import EnnModelOutput
from hf_engram.ops_mixer_enn import MixerReads, write_weights

from .controls import Settings


class WatchedMemory(NamedTuple):
    """One memory.

    Attributes:
        layer: the number of its layer in the model, from 0.
        head: its number in its mixer, from 0; `None` where it is the memory of a layer.
        bank: `[N, W]`.
        scale: weight of the trace beside the bank.
        clip: bound of every entry of the trace; `None` for no bound.
    """

    layer: int
    head: int | None
    bank: Tensor
    scale: float
    clip: float | None

    @property
    def averages(self) -> bool:
        """A token recalls means, of bank and writes, and does so after it has written: the memory is a mixer's."""
        return self.head is not None


def watched_memories(model: PreTrainedModel) -> list[WatchedMemory]:
    """The memories of a model, in the order of its layers and heads."""
    memories = []
    for layer, (layer_type, module) in _memory_layers(model).items():
        if layer_type == "engram":
            settings, bank = module.settings, module.memory_bank.detach()
            memories.append(WatchedMemory(layer, None, bank, settings.trace_scale, settings.trace_clip))
        else:
            bank = module.bank(torch.float32)
            scales, values = bank.trace_scale.tolist(), bank.values.detach()
            memories += [WatchedMemory(layer, head, values[head], scales[head], None) for head in range(len(scales))]
    return memories


def _memory_layers(model: PreTrainedModel) -> dict[int, tuple[str, Any]]:
    """Type and module of every layer with a memory. By name: Hub code brings copies of the classes."""
    layer_types, layers = model.config.layer_types, model.base_model.layers
    return {
        index: (layer_types[index], layers[index].cell if layer_types[index] == "engram" else layers[index].mixer)
        for index in memory_layers(layer_types)
    }


def replayable(model: PreTrainedModel, output: EnnModelOutput, settings: Settings) -> np.ndarray:
    """What every token of a row recalled and wrote: for every memory, recall, shares, kept and content one after
    the other, float32 `[T, sum of 2 N + 1 + W]`.

    Args:
        output: of a forward pass with `output_recall`, `output_encodings` and `output_reads`.
        settings: how all of its tokens were read.
    """
    encodings, reads = iter(output.encodings or ()), iter(output.reads or ())
    columns: list[Tensor] = []
    for (recall, *_), (layer_type, module) in zip(output.recall, _memory_layers(model).values(), strict=True):
        if layer_type == "engram":
            columns += _of_cell(module, recall, next(encodings)[0], settings)
        else:
            columns += _of_mixer(module, recall, next(reads), settings)
    return torch.cat([column.float() for column in columns], -1).cpu().numpy()


def _of_cell(cell: Any, recall: Tensor, encodings: Tensor, settings: Settings) -> list[Tensor]:
    rate = cell.settings.hebbian_lr if settings.plastic else 0.0
    shares = recall * (rate if settings.writes else 0.0)
    return [recall, shares, recall.new_full((len(recall), 1), 1 - rate), encodings]


def _of_mixer(mixer: Any, recall: Tensor, reads: MixerReads, settings: Settings) -> list[Tensor]:
    bank = mixer.bank(reads.keys.dtype)
    on = torch.ones(bank.keys.shape[1], dtype=torch.bool)
    on[list(settings.slots_off)] = False
    shares = reads.keys.new_zeros(*reads.keys.shape[1:3], len(on))  # [A, T, N]
    # Shared out among the slots that are on.
    shares[..., on] = write_weights(reads.keys, reads.strengths, bank._replace(keys=bank.keys[:, on]))[0]
    kept, values = reads.log_decays[0, ..., None].exp(), reads.values[0]
    return [part for head in range(len(shares)) for part in (recall[:, head], shares[head], kept[head], values[head])]


def traces(memory: Cache) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The trace of every memory of a one-row state, float32 `[N, W]`, and a mixer's mass of writes, `[N]`."""
    found: list[tuple[np.ndarray, np.ndarray | None]] = []
    for layer in state_layers(memory):
        if layer.state is None or layer._layer_type not in MEMORY_LAYER_TYPES:
            continue
        trace = layer.state.trace[0].float().cpu().numpy()
        if layer._layer_type == "engram":
            found.append((trace, None))
        else:
            width = trace.shape[-1] // 2
            found += [(head[:, width : 2 * width], head[:, -1]) for head in trace]  # [N, 2 W + 1] each
    return found


def tokens_seen(memory: Cache | None) -> int:
    """Tokens that a state has read in its life."""
    return 0 if memory is None else state_layers(memory)[0].tokens_seen


def state_layers(memory: Cache) -> list[StateLayer]:
    """The layers of the state of an ENN."""
    return cast(list[StateLayer], memory.layers)
