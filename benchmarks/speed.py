"""Times a training step (forward and backward) of one engram layer beside its peers: `python -m benchmarks.speed`.

All peers of a work run in one process, one after the other in every round, so that what else the machine does falls on
all of them alike. A ratio is the median over rounds of ours divided by the peer's time in the same round; the range is
from the lower to the upper quartile. The floor is the time that the layer's multiply-adds, times three for forward and
backward, take at the fastest float32 matrix product found in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_engram import EnnConfig
from hf_engram.layers_enn import EnnCell
from hf_engram.ops_enn import enn_loop


class Work(NamedTuple):
    """Sizes of one work."""

    batch: int
    steps: int
    inputs: int
    hidden: int
    slots: int


WORKS = {
    "a": Work(128, 28, 28, 128, 64),
    "b": Work(32, 256, 128, 128, 64),
    "c": Work(16, 256, 256, 256, 64),
    "d": Work(8, 1024, 256, 256, 128),
}


def make_cell(work: Work) -> EnnCell:
    """The layer under test: the paper's cell, one trace per sequence."""
    config = EnnConfig(vocab_size=None, hidden_size=work.hidden, memory_size=work.slots, embedding_size=work.inputs)
    cell = EnnCell(config, work.inputs)
    for linear in (cell.encoder, cell.integrator, cell.output):
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(cell.memory_bank)
    return cell


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def equal_lstm_stack(work: Work, parameters: int) -> nn.LSTM:
    """Two LSTM layers, as wide as `parameters` allows."""
    width = 1
    while count(nn.LSTM(work.inputs, width + 1, 2)) <= parameters:
        width += 1
    return nn.LSTM(work.inputs, width, 2, batch_first=True)


def training_step(module: nn.Module, x: Tensor, run: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that runs forward and backward once."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        run().sum().backward()

    return step


def peers(work: Work, with_definition: bool) -> dict[str, Callable[[], None]]:
    """Training steps of ours (first) and of every peer, on the same input."""
    x = torch.randn(work.batch, work.steps, work.inputs)
    cell = make_cell(work)
    modules: dict[str, nn.Module] = {
        "LSTM stack, equal parameters": equal_lstm_stack(work, count(cell)),
        "LSTM, same width": nn.LSTM(work.inputs, work.hidden, batch_first=True),
        "GRU, same width": nn.GRU(work.inputs, work.hidden, batch_first=True),
    }
    steps = {"engram": training_step(cell, x, lambda: cell(x)[0])}
    for name, module in modules.items():
        steps[name] = training_step(module, x, lambda module=module: module(x)[0])
    if with_definition:
        settings = cell.settings
        steps["definition"] = training_step(
            cell, x, lambda: enn_loop(x, cell.initial_state(x), cell.weights(), settings).outputs
        )
    return steps


def rounds_of(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}


def fastest_product() -> float:
    """Multiply-adds per second of the fastest float32 `F.linear` among some shapes."""
    rates = []
    for rows, inputs, outputs in ((8192, 256, 768), (8192, 768, 256), (2048, 1024, 1024)):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        seconds = min(rounds_of({"": lambda x=x, w=weight: nn.functional.linear(x, w)}, 7)[""])
        rates.append(rows * inputs * outputs / seconds)
    return max(rates)


def multiply_adds(work: Work) -> int:
    """Multiply-adds of a training step: encoder, memory (two products with bank and trace each), integrator."""
    wide = 3 * work.hidden
    per_token = work.hidden * (work.inputs + 4 * work.slots + wide * 3 + wide)
    return 3 * work.batch * work.steps * per_token


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS), help="which works to time")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per work (default: %(default)s)")
    parser.add_argument("--definition", action="store_true", help="time the definition, too (slow)")
    args = parser.parse_args()

    product = fastest_product()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {2 * product / 1e9:.0f} GFLOP/s at best")
    print(f"{'work':6}{'peer':32}{'ms':>8}{'engram/peer':>13}{'quartiles':>14}")
    for name in args.works:
        work = WORKS[name]
        times = rounds_of(peers(work, args.definition), args.rounds)
        for peer, seconds in times.items():
            ratios = [ours / theirs for ours, theirs in zip(times["engram"], seconds, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1e3 * statistics.median(seconds)
            print(f"{name:6}{peer:32}{milliseconds:8.1f}{middle:13.2f}{f'{low:.2f} to {high:.2f}':>14}", flush=True)
        share = multiply_adds(work) / product / statistics.median(times["engram"])
        print(f"{name:6}{'floor':32}{1e3 * multiply_adds(work) / product:8.1f}{1 / share:13.2f}")


if __name__ == "__main__":
    main()
