"""What a memory did while a sequence was read.

Letters in shapes: T tokens (padding left out), N memory slots, H hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, Parts
from .ops_enn import CellSettings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PANDAS_MISSING = "`to_pandas` needs pandas, which is not installed: pip install 'hf-engram[traces]'."
WHOLE_PARTS = ("bank", "carried", "clip")
TABLES = ("attribution", "slots")


class Replay(NamedTuple):
    """The memory once more, step by step."""

    recalled: Tensor  # [T, H]
    trace_norms: Tensor  # [T, N], after each token
    clipped: Tensor  # bool [T, N]; the clip acted on this slot when the token wrote


@dataclass(frozen=True, eq=False, repr=False)
class LayerRecording:
    """One layer's memory while one sequence was read.

    The trace `[N, H]` after token t is `decay ∘ trace + writes[t] ⊗ encodings[t]`, so that nothing larger than
    `[N + H]` is kept per token; everything else is computed when it is asked for, and kept then.

    Attributes:
        layer: its number, from 0.
        tokens: the text of each token.
        recall: recall weights over slots `[T, N]`.
        encodings: the encoding z of each token, what it writes `[T, H]`.
        plastic: bool `[T]`; `False` where plasticity was frozen: the trace neither decayed nor was written.
        written: bool `[T]`; `False` where the token wrote nothing.
        restart: bool `[T]`; `True` where the memory was cleared before the token.
        active_slots: bool `[T, N]`; `False` for slots that were switched off.
        bank: the learned slots `[N, H]`.
        carried_trace: the trace before the first token `[N, H]`.
        settings: the cell's constants.
    """

    layer: int
    tokens: tuple[str, ...]
    recall: Tensor
    encodings: Tensor
    plastic: Tensor
    written: Tensor
    restart: Tensor
    active_slots: Tensor
    bank: Tensor
    carried_trace: Tensor
    settings: CellSettings

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        slots, width = self.bank.shape
        return f"LayerRecording(layer={self.layer}, tokens={len(self)}, slots={slots}, width={width})"

    @cached_property
    def writes(self) -> Tensor:
        """How much of its encoding each token added to each slot `[T, N]`: `hebbian_lr · recall`, 0 if not written."""
        return self.settings.hebbian_lr * self.recall * (self.written[:, None] & self.active_slots)

    @property
    def recalled(self) -> Tensor:
        """The memory that each token recalled `[T, H]`."""
        return self._replay.recalled

    @property
    def trace_norms(self) -> Tensor:
        """Length of every slot of the trace after each token `[T, N]`."""
        return self._replay.trace_norms

    @property
    def clipped(self) -> Tensor:
        """Bool `[T, N]`: the clip acted on this slot when the token wrote."""
        return self._replay.clipped

    def trace(self, step: int = -1) -> Tensor:
        """The trace `[N, H]` after token `step`; negative steps count from the end.

        Raises:
            IndexError: there is no such token.
        """
        if not -len(self) <= step < len(self):
            raise IndexError(f"step is {step}; allowed: {-len(self)} to {len(self) - 1}, there are {len(self)} tokens.")
        wanted = step % len(self)
        return next(trace for t, (_, trace, _) in enumerate(self._steps()) if t == wanted)

    @cached_property
    def attribution(self) -> Attribution:
        """Where each recalled memory came from (`hf_engram.attribution`); takes O(T²) memory."""
        settings, recall = self.settings, self.recall
        coefficients = recall.new_zeros(len(self), len(self))
        carry = torch.empty_like(recall)
        # Slots that were always on and off together decay alike: one decay matrix for each such group.
        patterns, group_of_slot = self.active_slots.unique(dim=1, return_inverse=True)
        for group, pattern in enumerate(patterns.T):
            slots = group_of_slot == group
            decay, carry[:, slots] = self._decay(self.plastic & pattern, self.restart & pattern)
            coefficients += decay * (recall[:, slots] @ self.writes[:, slots].T)
        coefficients *= settings.trace_scale
        bank = recall @ self.bank
        carried = settings.trace_scale * ((carry * recall) @ self.carried_trace)
        exact = self._exact()
        clip = self.recalled - (bank + carried + coefficients @ self.encodings)
        return Attribution(
            recalled=self.recalled,
            bank=bank,
            carried=carried,
            coefficients=coefficients,
            encodings=self.encodings,
            clip=torch.where(exact[:, None], 0, clip),
            exact=exact,
        )

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

    def plot(self) -> "Figure":
        """A figure of recall, writes, and where recalled memories came from ([`hf_engram.plots.plot_layer`]).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_layer

        return plot_layer(self)

    @cached_property
    def _replay(self) -> Replay:
        steps = [(recalled, trace.norm(dim=-1), clipped) for recalled, trace, clipped in self._steps()]
        return Replay(*(torch.stack(values) for values in zip(*steps, strict=True)))

    def _steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each token: the recalled memory `[H]`, the trace after it `[N, H]`, which slots were clipped `[N]`."""
        eta, scale, clip = self.settings.hebbian_lr, self.settings.trace_scale, self.settings.trace_clip
        trace, clipped = self.carried_trace, torch.zeros_like(self.active_slots[0])
        changing = self.plastic[:, None] & self.active_slots  # [T, N]
        keep = 1 - eta * changing.to(trace)
        for t in range(len(self)):
            if self.restart[t]:
                trace = trace.masked_fill(self.active_slots[t, :, None], 0)
            recalled = self.recall[t] @ (self.bank + scale * trace)
            trace = keep[t, :, None] * trace + self.writes[t, :, None] * self.encodings[t]
            if clip is not None:
                inside = torch.where(changing[t, :, None], trace.clamp(-clip, clip), trace)
                trace, clipped = inside, (inside != trace).any(-1)
            yield recalled, trace, clipped

    def _exact(self) -> Tensor:
        """Bool `[T]`: no slot that this token recalled has been clipped since it was last cleared."""
        clips_before = self.clipped.cumsum(0) - self.clipped.long()
        when_cleared = torch.where(self._cleared, clips_before, 0).cummax(0).values
        return ~(self.active_slots & (clips_before > when_cleared)).any(-1)

    @property
    def _cleared(self) -> Tensor:
        """Bool `[T, N]`: the slot was cleared before the token. Slots that are off keep their trace even then."""
        return self.restart[:, None] & self.active_slots

    def _decay(self, decaying: Tensor, cleared: Tensor) -> tuple[Tensor, Tensor]:
        """What is left, at each step, of every earlier write and of the carried-over trace.

        Args:
            decaying: bool `[T]`, the steps at which the trace decays.
            cleared: bool `[T]`, the steps before which it was cleared.

        Returns:
            `[T, T]`, zero unless the write came before the step and was not cleared since; and `[T, 1]`.
        """
        keep = 1 - self.settings.hebbian_lr
        after = decaying.cumsum(0)  # decaying steps up to and including t
        before = after - decaying.long()
        document = cleared.cumsum(0)
        seen = (document[:, None] == document).tril(-1)
        elapsed = (before[:, None] - after).clamp_min(0)
        decay = torch.where(seen, keep ** elapsed.to(self.recall), 0)
        carry = torch.where(document == 0, keep ** before.to(self.recall), 0)
        return decay, carry[:, None]

    def _attribution_columns(self) -> dict[str, Any]:
        parts = self.attribution
        listed = len(WHOLE_PARTS)
        step, column = torch.ones(len(self), listed + len(self)).tril(listed - 1).nonzero().numpy().T
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


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """What the memories of all layers did while one sequence was read.

    Attributes:
        tokens: the text of each token; its number where there is no tokenizer, its position where there are no tokens.
        token_ids: `[T]`; `None` for inputs that are not tokens.
        layers: one [`LayerRecording`] per layer.
    """

    tokens: tuple[str, ...]
    token_ids: Tensor | None
    layers: tuple[LayerRecording, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Recording(tokens={len(self)}, layers={len(self.layers)})"

    def to_pandas(self, table: str = "attribution") -> "pd.DataFrame":
        """The tables of all layers ([`LayerRecording.to_pandas`]) below each other, with a first column `layer`."""
        tables = [layer.to_pandas(table) for layer in self.layers]
        import pandas as pd

        return pd.concat(dict(enumerate(tables)), names=["layer"]).reset_index("layer").reset_index(drop=True)

    def plot(self, layer: int = 0) -> "Figure":
        """The figure of one layer ([`LayerRecording.plot`])."""
        return self.layers[layer].plot()
