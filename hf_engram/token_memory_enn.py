"""The token memory: what a language head remembers of the tokens it has read, and adds to its predictions."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .configuration_enn import EnnConfig
from .dispatch_enn import selected_scan
from .ops_enn import NO_MASKS, StepMasks, l2_normalize, state_dtype
from .ops_token_memory_enn import TokenMemoryState, TokenReads, write_addresses
from .projections_enn import Projection
from .scan_token_memory_enn import mix, mix_targets, target_memory_scan, token_memory_scan

INITIAL_TIMESCALE = 500  # tokens over which the memory forgets, before training
INITIAL_TEMPERATURE = 0.04  # of cosines: an address is spread over a few slots
INITIAL_SCALE = 0.37  # of what is recalled beside the network's own prediction


class TokenMemory(nn.Module):
    """Addresses from hidden states, the memory (`ops_token_memory_enn`), and the mixture with the head's logits."""

    def __init__(self, config: EnnConfig) -> None:
        super().__init__()
        self.address_proj = Projection(config.hidden_size, config.hidden_size, bias=False)
        self.slot_keys = nn.Parameter(torch.empty(config.token_memory_size, config.hidden_size))
        self.scale = nn.Linear(config.hidden_size, 1)
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.log_timescale = nn.Parameter(torch.empty(()))

    def forward(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        input_ids: Tensor,
        state: TokenMemoryState | None = None,
        masks: StepMasks = NO_MASKS,
        plastic: bool = True,
        kept: Tensor | None = None,
        targets: Tensor | None = None,
        with_state: bool = True,
    ) -> tuple[Tensor, TokenMemoryState | None, TokenReads]:
        """Mix what is recalled into the logits, or into those of one token of every step.

        Args:
            logits: of the kept steps `[B, T or len(kept), V]`.
            hidden_states: of all steps, as the head reads them, `[B, T, H]`.
            input_ids: `[B, T]`.
            state: state before the first step, in any dtype; `None` starts afresh.
            masks: steps that are padding, begin a document, or do not write.
            plastic: `False` leaves the trace as it is.
            kept: indices of the steps that `logits` are of; `None` for all.
            targets: token ids `[B, T]`, or -100 where nothing is asked, with the logits of all steps. These alone are
                mixed, and nothing as large as the vocabulary is kept.
            with_state: `False` where the state after the last step is not needed.

        Returns:
            logarithms of probabilities, shaped as `logits`, or as `targets`, in float32 at least; the state after the
            last step; and what the steps asked and wrote.
        """
        reads, last = self.reads(hidden_states, input_ids, state, masks, plastic)
        trace = None if state is None else state.trace.to(last.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            logits, vocab_size = logits.to(last.dtype), logits.shape[-1]
            if targets is None:
                recalled, trace = token_memory_scan(reads, trace, vocab_size, masks.restart, kept, with_state)
                mixed = mix(logits, recalled)
            else:
                mass, total, trace = target_memory_scan(reads, targets, trace, vocab_size, masks.restart, with_state)
                own = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(mass)
                mixed = mix_targets(own, mass, total)
        return mixed, TokenMemoryState(last, trace) if with_state else None, reads

    def reads(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        state: TokenMemoryState | None = None,
        masks: StepMasks = NO_MASKS,
        plastic: bool = True,
    ) -> tuple[TokenReads, Tensor]:
        """What the steps ask and write, and the address of the last token `[B, N]`; arguments as in `forward`."""
        precise = state_dtype(hidden_states.dtype)
        queries, scales = self.address_proj(hidden_states), self.scale(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            cosines = l2_normalize(queries.to(precise)) @ l2_normalize(self.slot_keys.to(precise)).mT
            addresses = torch.softmax(cosines / self.log_temperature.to(precise).exp(), -1)
        last = torch.zeros_like(addresses[:, 0]) if state is None else state.address.to(precise)
        writes, last = write_addresses(addresses, last, masks.valid, masks.restart)
        log_decays = -torch.exp(-self.log_timescale.to(precise)).expand(input_ids.shape)
        if not plastic:
            writes, log_decays = torch.zeros_like(writes), torch.zeros_like(log_decays)
        if masks.valid is not None:
            writes, log_decays = writes * masks.valid[..., None], log_decays * masks.valid
        if masks.writes is not None:
            writes = writes * masks.writes[..., None]
        return TokenReads(input_ids, addresses, writes, scales[..., 0].to(precise).exp(), log_decays), last

    def extra_repr(self) -> str:
        """Sizes and the form in use."""
        slots, width = self.slot_keys.shape
        return f"slots={slots}, width={width}, scan={selected_scan()}"


def mean_loss(scores: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The loss of the targets' log probabilities `[B, T]`, averaged as transformers' loss of a causal language model.

    Args:
        targets: token ids `[B, T]`, -100 where nothing is asked.
        num_items_in_batch: of the whole batch, where this is a part of it; `None`: the targets at hand.
    """
    asked = (targets != -100).to(scores.device)
    return -(scores * asked).sum() / (asked.sum() if num_items_in_batch is None else num_items_in_batch)
