"""Figures of recordings, drawn with matplotlib: what a memory recalled, what it held, and where recalls came from.

Colours are ones that colour-blind people can tell apart: the map cividis, and four of the palette of Okabe and Ito.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .recordings import LayerRecording

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise ImportError("Plots need matplotlib, which is not installed: pip install 'hf-engram[traces]'.") from error

if TYPE_CHECKING:
    from .counterfactuals import Counterfactual

COLOUR_MAP = "cividis"
PART_COLOURS = {"bank": "#0072B2", "tokens": "#E69F00", "carried": "#009E73", "clip": "#CC79A7"}
PART_NAMES = {"bank": "learned bank", "tokens": "earlier tokens", "carried": "memory carried in", "clip": "clip"}
TOKENS_SO_FAR = "tokens so far"  # where a token recalls what it wrote itself, too
MAX_TICKS = 64
EDGE = {"linewidth": 0.4, "edgecolor": "white"}


def plot_layer(layer: LayerRecording, head: int | None = None) -> Figure:
    """Four panels of one layer: recall, trace, where recalled memories came from, and from which tokens.

    Args:
        layer: a recording of one to a few hundred tokens; with more, only some tokens are named.
        head: of a mixer; `None` for the mean over heads.

    Raises:
        IndexError: there is no such head.
    """
    layer = layer.of_head(head)
    steps = len(layer)
    width = float(np.clip(0.16 * steps, 5.5, 11))
    figure = Figure(figsize=(2 * width + 2, width + 1), layout="constrained")
    if layer.caption:
        figure.suptitle(layer.caption)
    left, right = figure.subfigures(1, 2, wspace=0.02)
    recall, trace, parts = left.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    plot_recall(layer, recall)
    plot_trace_norms(layer, trace)
    plot_parts(layer, parts)
    plot_attribution(layer, right.subplots())
    return figure


def plot_recall(layer: LayerRecording, axes: Axes) -> None:
    """Recall weights: slots from bottom to top, tokens from left to right."""
    slot_map(layer.recall.numpy(), "recall weight", axes)
    axes.set_title("What each token recalls", loc="left")


def plot_trace_norms(layer: LayerRecording, axes: Axes) -> None:
    """Length of every slot of the trace after each token."""
    slot_map(layer.trace_norms.numpy(), "length of the slot", axes)
    axes.set_title("What the trace holds after each token", loc="left")


def plot_parts(layer: LayerRecording, axes: Axes) -> None:
    """Contributions to each recalled memory, stacked: bank, tokens, carried memory, clip."""
    contribution = layer.attribution.contribution
    parts = {name: getattr(contribution, name).numpy() for name in PART_NAMES}
    parts["tokens"] = parts["tokens"].sum(1)
    top, bottom = np.zeros(len(layer)), np.zeros(len(layer))
    for name, values in parts.items():
        if name in ("carried", "clip") and not values.any():
            continue
        base = np.where(values >= 0, top, bottom)  # what speaks against the recalled memory hangs below zero
        label = TOKENS_SO_FAR if name == "tokens" and layer.recalls_itself else PART_NAMES[name]
        axes.bar(np.arange(len(layer)), values, 1, base, label=label, color=PART_COLOURS[name], **EDGE)
        top, bottom = top + values.clip(min=0), bottom + values.clip(max=0)
    first = layer.attribution.first_inexact
    if first is not None:
        axes.axvline(first - 0.5, color="black", linestyle="--", linewidth=1, label="clipped from here on")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("contribution")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    lines = -(-len(legend.get_texts()) // 3)
    axes.set_title("Where recalled memories came from", loc="left", pad=6 + 14 * lines)
    name_tokens(axes, layer.tokens, "x")


def plot_attribution(layer: LayerRecording, axes: Axes) -> None:
    """Share of what each token (rows) recalled that each token before it, or up to it (columns) wrote.

    The bank, and carried memory and clip if there are, have columns of their own to the left, and a scale of their own.
    """
    share = layer.attribution.share
    whole = {name: getattr(share, name).numpy() for name in PART_NAMES if name != "tokens"}
    shown = [name for name, values in whole.items() if name == "bank" or values.any()]
    steps, columns = len(layer), len(shown)
    recallable = np.tri(steps, k=0 if layer.recalls_itself else -1, dtype=bool)
    tokens = np.where(recallable, share.tokens.numpy(), np.nan)
    others = np.column_stack([whole[name] for name in shown])
    drawing = {"cmap": COLOUR_MAP, "aspect": "auto", "interpolation": "nearest"}
    gap = columns + 0.02 * steps
    # The empty triangle above the diagonal has room for both scales.
    for values, left, right, height, label in (
        (tokens, -0.5, steps - 0.5, 0.9, "share written by this token"),
        (others, -0.5 - gap, columns - 0.5 - gap, 0.76, "share from: " + ", ".join(PART_NAMES[name] for name in shown)),
    ):
        image = axes.imshow(values, **drawing, vmin=0, extent=(left, right, steps - 0.5, -0.5))
        scale = axes.figure.colorbar(image, cax=axes.inset_axes((0.58, height, 0.38, 0.025)), orientation="horizontal")
        scale.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        scale.set_label(label)
    axes.set_xlim(-0.5 - gap, steps - 0.5)
    axes.set_ylim(steps - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.set_title("Who wrote what each token recalls", loc="left")
    axes.set_xlabel("written by")
    axes.set_ylabel("recalled by")
    name_tokens(axes, layer.tokens, "y")
    name_tokens(axes, layer.tokens, "x", {place - gap: PART_NAMES[name] for place, name in enumerate(shown)})


def slot_map(values: np.ndarray, label: str, axes: Axes) -> None:
    """Values `[T, N]` as a picture, a column per token."""
    norm = PowerNorm(0.5, vmin=0)
    image = axes.imshow(values.T, COLOUR_MAP, norm, aspect="auto", interpolation="nearest", origin="lower")
    axes.figure.colorbar(image, ax=axes, label=label)
    axes.set_ylabel("slot")


def name_tokens(axes: Axes, tokens: Sequence[str], axis: str, others: dict[float, str] | None = None) -> None:
    """Name the ticks of an axis after tokens, at most `MAX_TICKS` of them, and after what is at other places."""
    every = -(-len(tokens) // MAX_TICKS)
    names = {**(others or {}), **{place: visible(tokens[place]) for place in range(0, len(tokens), every)}}
    style = {"fontsize": "small", "parse_math": False}
    if axis == "x":
        axes.set_xticks([*names], names.values(), rotation=90, **style)
    else:
        axes.set_yticks([*names], names.values(), **style)


def visible(token: str) -> str:
    """A token's text without the spaces around it, or with its white space made visible."""
    return token.strip() or token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def plot_counterfactual(result: "Counterfactual", step: int = -1, count: int = 10) -> Figure:
    """How far predictions moved after each token, and the next tokens after `step` whose probability changed most."""
    tokens = result.original.tokens
    figure = Figure(figsize=(float(np.clip(0.16 * len(tokens), 5, 11)) + 4.5, 5), layout="constrained")
    moved, changed = figure.subplots(1, 2, width_ratios=(3, 2))

    erased = ", ".join(f"“{visible(tokens[step])}”" for step in result.erased)
    moved.bar(np.arange(len(tokens)), result.total_variation.numpy(), 1, color=PART_COLOURS["bank"], **EDGE)
    for place in result.erased:
        moved.axvline(place, color=PART_COLOURS["tokens"], linewidth=2)
    figure.suptitle(f"Without the write of {erased}", parse_math=False)  # a text may have dollars
    moved.set_ylabel("total variation")
    moved.set_title("How far next-token probabilities move", loc="left")
    name_tokens(moved, tokens, "x")

    changes = result.most_changed(step, count)[::-1]
    differences = np.array([change.after - change.before for change in changes])
    colours = [PART_COLOURS["tokens" if difference > 0 else "bank"] for difference in differences]
    places = np.arange(len(changes))
    changed.barh(places, 100 * differences, color=colours)
    values = changed.secondary_yaxis("right")
    values.set_yticks(places, [f"{change.before:.2%} → {change.after:.2%}" for change in changes], fontsize="small")
    values.tick_params(length=0)
    changed.axvline(0, color="black", linewidth=0.8)
    name_tokens(changed, [change.token for change in changes], "y")
    changed.set_xlabel("change in probability (percentage points)")
    changed.set_title(
        f"Next token after “{visible(tokens[step])}” (token {step % len(tokens)})", loc="left", parse_math=False
    )
    return figure
