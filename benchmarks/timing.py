"""How times, ratios and memory are measured."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

Step = Callable[[], object]


class Ratio(NamedTuple):
    """Median and quartiles of a ratio over rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def rounds_of(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round to warm up.

    A round runs all steps, one after the other, so that what else the machine does falls on all of them alike. A step
    that returns a number has measured itself.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            measured = step()
            times[name].append(measured if isinstance(measured, float) else time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Ours over theirs, round by round."""
    return Ratio(*statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4))


def fastest_product() -> float:
    """Multiply-adds per second of the fastest float32 matrix product to be had in this process.

    Candidates: `F.linear` and, where torch has it, oneDNN's linear with packed weights.
    """
    rates = []
    for rows, inputs, outputs in ((8192, 256, 768), (8192, 768, 256), (2048, 1024, 1024)):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        products: dict[str, Step] = {"linear": lambda x=x, w=weight: nn.functional.linear(x, w)}
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            products["oneDNN"] = lambda x=x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
            products["oneDNN"]()
        except (AttributeError, RuntimeError, NotImplementedError):
            products.pop("oneDNN", None)
        with torch.inference_mode():
            times = rounds_of(products, 9)
        rates += [rows * inputs * outputs / min(seconds) for seconds in times.values()]
    return max(rates)


def peak_memory(make_step: Callable[..., Step], *arguments: object) -> float | None:
    """MiB by which one step raises the peak of a process of its own; `None` where the system does not tell.

    `make_step(*arguments)` builds the step there; it is run once before, so that what is made once does not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_step, (make_step, *arguments))


def _peak_of_step(make_step: Callable[..., Step], *arguments: object) -> float:
    step = make_step(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def resident_memory() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
