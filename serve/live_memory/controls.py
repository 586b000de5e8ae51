"""Interventions: under which settings a token is read, now or again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from hf_engram import EnnConfig


class Settings(NamedTuple):
    """How one token is read.

    Attributes:
        plastic: the trace decays and is written.
        slots_off: slots that are neither recalled nor written.
        cleared: the memory is emptied before the token.
        writes: the token itself writes; if not, the trace only decays.
    """

    plastic: bool = True
    slots_off: tuple[int, ...] = ()
    cleared: bool = False
    writes: bool = True

    def model_options(self, config: EnnConfig, count: int) -> dict[str, Any]:
        """Arguments of the model's forward pass over `count` tokens; none where nothing is out of the ordinary."""
        options: dict[str, Any] = {}
        if not self.plastic:
            options["plastic"] = False
        if self.slots_off:
            options["slot_mask"] = torch.ones(config.memory_size, dtype=torch.bool)
            options["slot_mask"][list(self.slots_off)] = False
        if not self.writes:
            options["write_mask"] = torch.zeros(1, count, dtype=torch.bool)
        if self.cleared:
            options["position_ids"] = torch.arange(count)[None]  # position 0 begins a new document
        return options


class SettingsSource(Protocol):
    """Where a run takes its settings from, token by token."""

    stop: bool

    def next(self, index: int, longest: int) -> tuple[Settings, int]:
        """Settings of token `index`, and how many tokens from there on, up to `longest`, share them."""


@dataclass
class Controls:
    """Set by a visitor while the model reads and writes; what is set counts from the next token on.

    Attributes:
        stop: end before the next token.
        clear: empty the memory before the next token, once.
        plastic, slots_off: as in `Settings`.
    """

    stop: bool = False
    clear: bool = False
    plastic: bool = True
    slots_off: tuple[int, ...] = ()

    def next(self, index: int, longest: int) -> tuple[Settings, int]:
        """The settings of this moment."""
        cleared, self.clear = self.clear, False
        return Settings(self.plastic, self.slots_off, cleared), longest


class Recorded:
    """The settings of an earlier run, but that one token does not write; after its end, the last ones.

    Args:
        settings: of every token of that run.
        erased: index of the token that does not write.
        controls: only their `stop` counts.
    """

    def __init__(self, settings: Sequence[Settings], erased: int, controls: Controls) -> None:
        self.settings = [s._replace(writes=s.writes and index != erased) for index, s in enumerate(settings)]
        self.controls = controls

    @property
    def stop(self) -> bool:
        """Whether the run is to end."""
        return self.controls.stop

    def next(self, index: int, longest: int) -> tuple[Settings, int]:
        """The settings of then; a token before which the memory was cleared begins a stretch of its own."""
        if index >= len(self.settings):
            return self.settings[-1]._replace(cleared=False, writes=True), longest
        first = self.settings[index]
        rest = first._replace(cleared=False)
        count = 1
        while count < longest and self.settings[index + count : index + count + 1] == [rest]:
            count += 1
        return first, count


def parse_slots(text: str, slots: int) -> tuple[int, ...]:
    """Slots written as "3, 7-9".

    Raises:
        ValueError: the text is something else, or names a slot that does not exist.
    """
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if not part:
            continue
        if not re.fullmatch(r"\d{1,6}(-\d{1,6})?", part, re.ASCII):
            raise ValueError(f"Slots switched off: {part!r} is not a slot. Write numbers and ranges, such as 3, 7-9.")
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high < slots:
            raise ValueError(f"Slots switched off: {part!r} is out of range; this model has slots 0 to {slots - 1}.")
        chosen |= set(range(low, high + 1))
    if len(chosen) == slots:
        raise ValueError("Slots switched off: at least one slot has to stay on.")
    return tuple(sorted(chosen))


def format_slots(slots: Sequence[int]) -> str:
    """The inverse of `parse_slots`: "3, 7-9"."""
    ranges: list[list[int]] = []
    for slot in sorted(slots):
        if ranges and slot == ranges[-1][1] + 1:
            ranges[-1][1] = slot
        else:
            ranges.append([slot, slot])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
