"""What the memories of a model did while a sequence was read: what recordings of all kinds of layers can tell.

Letters in shapes: T tokens (padding left out), N memory slots, H hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, MixerAttribution, Parts
from .steps import resolve_step
from .token_memory_recordings import TokenMemoryRecording

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PANDAS_MISSING = "`to_pandas` needs pandas, which is not installed: pip install 'hf-engram[traces]'."
WHOLE_PARTS = ("bank", "carried", "clip")
TABLES = ("attribution", "slots")


class LayerRecording(ABC):
    """One layer's memory, or that of one head of a mixer, while one sequence was read.

    Attributes:
        layer: number of the layer in the model, from 0.
        tokens: the text of each token.
        recall: recall weights over slots `[T, N]`.
        writes: how much of what it writes each token added to each slot `[T, N]`.
        recalled: the memory that each token recalled `[T, H]`.
        trace_norms: length of every slot of the trace after each token `[T, N]`.
        attribution: where each recalled memory came from (`hf_engram.attribution`); takes O(T²) memory.
        plastic: bool `[T]`; `False` where plasticity was frozen: the trace neither decayed nor was written.
        written: bool `[T]`; `False` where the token wrote nothing.
        restart: bool `[T]`; `True` where the memory was cleared before the token.
        active_slots: bool `[T, N]`; `False` for slots that were switched off.
        heads: the recordings of a mixer's heads; none of other layers.
        recalls_itself: a token writes before it recalls, so that it recalls what it wrote itself, too.
        caption: what of the layer is recorded, where it is not the whole.
    """

    layer: int
    tokens: tuple[str, ...]
    recall: Tensor
    writes: Tensor
    recalled: Tensor
    trace_norms: Tensor
    attribution: Attribution | MixerAttribution
    plastic: Tensor
    written: Tensor
    restart: Tensor
    active_slots: Tensor
    heads: tuple["LayerRecording", ...]
    recalls_itself: ClassVar[bool] = False
    caption: ClassVar[str] = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def trace(self, step: int = -1) -> Tensor:
        """The trace after token `step`; negative steps count from the end.

        Raises:
            IndexError: there is no such token.
        """

    def of_head(self, head: int | None) -> "LayerRecording":
        """The recording of one head of a mixer; with `None` this one, which is the mean over heads.

        Raises:
            IndexError: there is no such head.
        """
        if head is None:
            return self
        if not -len(self.heads) <= head < len(self.heads):
            heads = f" or {-len(self.heads)} to {len(self.heads) - 1}" if self.heads else ""
            raise IndexError(f"head is {head}; allowed: None{heads}, layer {self.layer} has {len(self.heads)} heads.")
        return self.heads[head]

    def to_pandas(self, table: str = "attribution") -> "pd.DataFrame":
        """A tidy table of this layer.

        Args:
            table: `"attribution"` has a row for every token and every part of its recalled memory (columns step,
                token, source: "bank", "carried", "clip" or "token"; source_step, source_token, coefficient, share,
                contribution, exact); `"slots"` a row for every token and slot (step, token, slot, recall, write,
                trace_norm).

        Raises:
            ValueError: there is no such table.
            ImportError: pandas is not installed.
        """
        if table not in TABLES:
            raise ValueError(f"table is {table!r}; allowed: {TABLES}.")
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(PANDAS_MISSING) from error
        columns = self._attribution_columns() if table == "attribution" else self._slot_columns()
        frame = pd.DataFrame(columns)
        return frame.astype({"source_step": "Int64"}) if table == "attribution" else frame

    def plot(self, head: int | None = None) -> "Figure":
        """A figure of recall, writes, and where recalled memories came from ([`hf_engram.plots.plot_layer`]).

        Args:
            head: of a mixer; `None` for the mean over heads.

        Raises:
            IndexError: there is no such head.
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_layer

        return plot_layer(self, head)

    def _attribution_columns(self) -> dict[str, Any]:
        parts = self.attribution
        listed = len(WHOLE_PARTS)
        recallable = torch.ones(len(self), listed + len(self)).tril(listed - 1 + self.recalls_itself)
        step, column = recallable.nonzero().numpy().T
        is_token, source = column >= listed, np.maximum(column - listed, 0)
        coefficients = parts.coefficients.numpy()[step, source]
        tokens = np.array(self.tokens, dtype=object)

        def values(of: Parts) -> np.ndarray:
            whole = torch.stack([getattr(of, name) for name in WHOLE_PARTS], 1)
            return torch.cat([whole, of.tokens], 1).numpy()[step, column]

        return {
            "step": step,
            "token": tokens[step],
            "source": np.array([*WHOLE_PARTS, "token"], dtype=object)[np.minimum(column, listed)],
            "source_step": np.where(is_token, source, np.nan),
            "source_token": np.where(is_token, tokens[source], None),
            "coefficient": np.where(is_token, coefficients, np.nan),
            "share": values(parts.share),
            "contribution": values(parts.contribution),
            "exact": parts.exact.numpy()[step],
        }

    def _slot_columns(self) -> dict[str, Any]:
        steps, slots = self.recall.shape
        return {
            "step": np.repeat(np.arange(steps), slots),
            "token": np.repeat(np.array(self.tokens, dtype=object), slots),
            "slot": np.tile(np.arange(slots), steps),
            "recall": self.recall.flatten().numpy(),
            "write": self.writes.flatten().numpy(),
            "trace_norm": self.trace_norms.flatten().numpy(),
        }


class Step(NamedTuple):
    """The memory at one token."""

    recalled: Tensor  # [H]
    trace: Tensor  # [N, ...], after the token
    clipped: Tensor  # bool [N]; the clip acted on this slot when the token wrote


class Replay(NamedTuple):
    """The memory once more, step by step."""

    recalled: Tensor  # [T, H]
    trace_norms: Tensor  # [T, N]
    clipped: Tensor  # bool [T, N]


@dataclass(frozen=True, eq=False, repr=False)
class MemoryRecording(LayerRecording):
    """One memory, of a cell or of a head of a mixer: what its recalls and its trace are computed from, and how.

    Attributes:
        carried_trace: the trace before the first token `[N, ...]`.
    """

    heads: ClassVar[tuple[LayerRecording, ...]] = ()

    layer: int
    tokens: tuple[str, ...]
    recall: Tensor
    plastic: Tensor
    written: Tensor
    restart: Tensor
    active_slots: Tensor
    carried_trace: Tensor

    @property
    def recalled(self) -> Tensor:
        """The memory that each token recalled `[T, H]`."""
        return self._replay.recalled

    @property
    def trace_norms(self) -> Tensor:
        """Length of every slot of the trace after each token `[T, N]`."""
        return self._replay.trace_norms

    def trace(self, step: int = -1) -> Tensor:
        """The trace after token `step`; negative steps count from the end.

        Raises:
            IndexError: there is no such token.
        """
        wanted = resolve_step(step, len(self))
        return next(found.trace for t, found in enumerate(self._steps()) if t == wanted)

    @cached_property
    def _replay(self) -> Replay:
        steps = [(step.recalled, step.trace.norm(dim=-1), step.clipped) for step in self._steps()]
        return Replay(*(torch.stack(values) for values in zip(*steps, strict=True)))

    @abstractmethod
    def _steps(self) -> Iterator[Step]:
        """The memory at each token."""

    def _slot_groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Slots that were always on and off together and so decay alike, bool `[N]`, and when they were on, `[T]`."""
        patterns, group_of_slot = self.active_slots.unique(dim=1, return_inverse=True)
        for group, pattern in enumerate(patterns.T):
            yield group_of_slot == group, pattern


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """What the memories of all layers did while one sequence was read.

    Attributes:
        tokens: the text of each token; its number where there is no tokenizer, its position where there are no tokens.
        token_ids: `[T]`; `None` for inputs that are not tokens.
        layers: one [`LayerRecording`] per layer with a memory, which says which layer it is; attention has none.
        token_memory: the token memory of the language head; `None` where there is none.
    """

    tokens: tuple[str, ...]
    token_ids: Tensor | None
    layers: tuple[LayerRecording, ...]
    token_memory: TokenMemoryRecording | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Recording(tokens={len(self)}, layers={len(self.layers)})"

    def to_pandas(self, table: str = "attribution") -> "pd.DataFrame":
        """The tables of all layers ([`LayerRecording.to_pandas`]) below each other, with a first column `layer`."""
        tables = {layer.layer: layer.to_pandas(table) for layer in self.layers}
        import pandas as pd

        return pd.concat(tables, names=["layer"]).reset_index("layer").reset_index(drop=True)

    def plot(self, layer: int = 0, head: int | None = None) -> "Figure":
        """The figure of one of `layers` ([`LayerRecording.plot`]).

        Raises:
            IndexError: there is no such layer, or head.
            ImportError: matplotlib is not installed.
        """
        if not -len(self.layers) <= layer < len(self.layers):
            raise IndexError(f"layer is {layer}; allowed: 0 to {len(self.layers) - 1}.")
        return self.layers[layer].plot(head)
