"""What forward passes recalled and wrote, as a recorder keeps it.

Letters in shapes: B rows, T tokens, A heads, N slots, H hidden width, D head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_token_memory_enn import TokenReads


class MixerWrites(NamedTuple):
    """What the steps of a sequence wrote into the heads of a mixer, float32 at least."""

    keys: Tensor  # [B, A, T, D]
    values: Tensor  # [B, A, T, D]
    strengths: Tensor  # [B, A, T], 0 at steps that wrote nothing
    log_decays: Tensor  # [B, A, T], 0 at steps where nothing decayed


class Packet(NamedTuple):
    """What one forward pass recalled and wrote."""

    input_ids: Tensor | None  # [B, T]; None for inputs that are not tokens
    recall: tuple[Tensor, ...]  # per layer with a memory [B, T, N], of a mixer [B, T, A, N], float32 at least
    encodings: tuple[Tensor, ...]  # per engram layer [B, T, H], in the model's dtype
    mixer_writes: tuple[MixerWrites, ...]  # per mixer
    valid: Tensor | None  # bool [B, T]; False at padding
    restart: Tensor | None  # bool [B, T]; True where the memory was cleared before the token
    writes: Tensor | None  # bool [B, T]; False where the token wrote nothing
    plastic: bool  # False: the memory neither decayed nor was written
    slots: list[Tensor | None]  # per layer of the model bool [N]; False for slots that were switched off
    token_reads: TokenReads | None = None  # of the token memory, where there is one


def join(packets: list[Packet]) -> Packet:
    """All packets of a run as one, on the CPU, with no mask left out, and `plastic` and `slots` per token."""

    def along_time(values: list[Tensor], dim: int = 1) -> Tensor:
        return torch.cat(values, dim).cpu()

    def masks(name: str, default: bool) -> Tensor:
        given = (getattr(packet, name) for packet in packets)
        shapes = (packet.recall[0].shape[:2] for packet in packets)
        filled = (torch.full(shape, default) if m is None else m.cpu() for m, shape in zip(given, shapes, strict=True))
        return torch.cat(list(filled), dim=1)

    first = packets[0]
    steps = [packet.recall[0].shape[1] for packet in packets]
    every = torch.ones(first.recall[0].shape[-1], dtype=torch.bool)

    def active_slots(layer: int) -> Tensor:
        given = (packet.slots[layer] for packet in packets)
        return torch.cat([(every if m is None else m.cpu()).expand(n, -1) for m, n in zip(given, steps, strict=True)])

    def mixer_writes(mixer: int) -> MixerWrites:
        fields = zip(*(packet.mixer_writes[mixer] for packet in packets), strict=True)
        return MixerWrites(*(along_time(list(values), dim=2) for values in fields))

    def token_reads() -> TokenReads | None:
        if first.token_reads is None:
            return None
        return TokenReads(*map(along_time, map(list, zip(*(p.token_reads for p in packets), strict=True))))

    ids = [packet.input_ids for packet in packets]
    return Packet(
        input_ids=None if any(i is None for i in ids) else along_time(ids),
        recall=tuple(along_time([packet.recall[index] for packet in packets]) for index in range(len(first.recall))),
        encodings=tuple(
            along_time([packet.encodings[index] for packet in packets]) for index in range(len(first.encodings))
        ),
        mixer_writes=tuple(map(mixer_writes, range(len(first.mixer_writes)))),
        valid=masks("valid", True),
        restart=masks("restart", False),
        writes=masks("writes", True),
        plastic=torch.cat([torch.full((n,), packet.plastic) for n, packet in zip(steps, packets, strict=True)]),
        slots=[active_slots(layer) for layer in range(len(first.slots))],
        token_reads=token_reads(),
    )
