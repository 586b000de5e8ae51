"""Tables and plots of what the models answered."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .recall_tasks import Task

# The palette of Okabe and Ito, whose colours colour-blind people can tell apart.
COLOURS = ("#D55E00", "#E69F00", "#F0E442", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#000000")
LINES = {"on": "-", "off": ":", "frozen": "--", "none": "-"}


class Curve(NamedTuple):
    """Accuracy of a model whose trace is on, off, frozen, or not there ("none")."""

    model: str
    trace: str
    difficulties: list[int]
    values: np.ndarray  # [seeds, difficulties], shares of right answers


def curves(runs: dict[str, list[dict[str, Any]]], axis: str) -> list[Curve]:
    """The curves along one way to be difficult.

    Args:
        runs: for every model, what `recall_runs.run` returned with every seed.
        axis: a key of `Task.exams`.
    """
    found = []
    for model, by_seed in runs.items():
        for trace, exams in by_seed[0]["accuracy"].items():
            values = np.array([list(run["accuracy"][trace][axis].values()) for run in by_seed])
            found.append(Curve(model, trace, [int(value) for value in exams[axis]], values))
    return found


def report(name: str, task: Task, runs: dict[str, list[dict[str, Any]]]) -> str:
    """The runs of one task in Markdown: a table of the trainings, and one for every way to be difficult."""
    lines = [
        f"## {name}",
        "",
        f"{task.title}; {1 / task.answers:.1%} by chance.",
        "",
        "| model | parameters | state, bytes | right when training ends, after steps, by learning rate | CPU seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model, by_seed in runs.items():
        first = by_seed[0]
        seconds = np.mean([run["cpu_seconds"] for run in by_seed])
        cells = [model, f"{first['parameters']:,}", f"{first['state_bytes']:,}", trainings(by_seed), f"{seconds:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for axis in task.exams:
        lines += ["", *table(curves(runs, axis), axis)]
    return "\n".join(lines)


def trainings(by_seed: list[dict[str, Any]]) -> str:
    """How training ended with every rate that the first seed tried, the best in bold, and with the other seeds."""
    first, *others = by_seed
    chosen, cells = f"{first['settings']['learning_rate']:g}", []
    for rate, end in first["tried"].items():
        cell = f"{rate}: {end_of_training(end)}"
        cells.append(f"**{cell}**" if rate == chosen else cell)
    listed = ", ".join(cells)
    return f"{listed}; other seeds: {', '.join(map(end_of_training, others))}" if others else listed


def end_of_training(run: dict[str, Any]) -> str:
    """The share of right answers when training ended, and the steps it took."""
    return f"{run['training_accuracy']:.3f} ({run['steps']:,})"


def table(found: list[Curve], axis: str) -> list[str]:
    """Accuracies along one way to be difficult: mean, and standard deviation over seeds if there are several."""
    header = [f"{axis}:", "trace", *map(str, found[0].difficulties)]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for curve in found:
        trace = "" if curve.trace == "none" else curve.trace
        lines.append(f"| {' | '.join([curve.model, trace, *map(cell, curve.values.T)])} |")
    return lines


def cell(values: np.ndarray) -> str:
    """Accuracies with all seeds as they are written in a table."""
    mean = f"{values.mean():.3f}"
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def draw(task: Task, runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Save a panel for every way to be difficult; a model has a colour, and its trace a kind of line."""
    figure = Figure(figsize=(5.2 * len(task.exams) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(task.exams), sharey=True, squeeze=False)[0]
    colours = dict(zip(runs, COLOURS, strict=False))
    for axes, axis in zip(panels, task.exams, strict=True):
        draw_panel(curves(runs, axis), axis, task, colours, axes)
    panels[0].set_ylabel("right answers")
    figure.suptitle(task.title)
    handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def draw_panel(found: list[Curve], axis: str, task: Task, colours: dict[str, str], axes: Axes) -> None:
    """One panel."""
    for curve in found:
        label = curve.model if curve.trace == "none" else f"{curve.model}, trace {curve.trace}"
        mean, style = curve.values.mean(0), LINES[curve.trace]
        axes.plot(curve.difficulties, mean, style, marker="o", markersize=3, color=colours[curve.model], label=label)
    axes.axhline(1 / task.answers, color="grey", linewidth=0.8, linestyle="-.", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found[0].difficulties, map(str, found[0].difficulties))
    axes.set_xticks([], minor=True)
    axes.set(xlabel=axis, ylim=(-0.02, 1.02))
