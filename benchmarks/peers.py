"""The layers that are timed: ours, and what PyTorch and Keras have in their place."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_engram import EnnConfig
from hf_engram.dispatch_enn import SCAN_VARIABLE
from hf_engram.layers_enn import EnnCell
from hf_engram.ops_enn import enn_loop

from .timing import Step


class Work(NamedTuple):
    """Sizes of one work."""

    batch: int
    steps: int
    inputs: int
    hidden: int
    slots: int

    @property
    def tokens(self) -> int:
        """Steps of all rows."""
        return self.batch * self.steps


WORKS = {
    "a": Work(128, 28, 28, 128, 64),
    "b": Work(32, 256, 128, 128, 64),
    "c": Work(16, 256, 256, 256, 64),
    "d": Work(8, 1024, 256, 256, 128),
}
STACK = "LSTM stack, equal parameters"


def make_cell(work: Work, **config: object) -> EnnCell:
    """One engram layer of this size: the paper's cell with one trace per sequence, unless `config` says otherwise."""
    torch.manual_seed(0)
    sizes = {"hidden_size": work.hidden, "memory_size": work.slots, "embedding_size": work.inputs}
    cell = EnnCell(EnnConfig(vocab_size=None, **sizes, **config), work.inputs)
    for linear in (cell.encoder, cell.integrator, cell.output):
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(cell.memory_bank)
    return cell


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def equal_lstm_stack(work: Work) -> nn.LSTM:
    """Two LSTM layers, as wide as the parameters of our layer allow."""
    width, parameters = 1, count(make_cell(work))
    while count(nn.LSTM(work.inputs, width + 1, 2)) <= parameters:
        width += 1
    return nn.LSTM(work.inputs, width, 2, batch_first=True)


def backward_step(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A function that runs forward and backward once."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()

    return step


def training_step(module: nn.Module, run: Callable[[Tensor], Tensor], work: Work) -> Step:
    """A function that runs forward and backward once, on random input."""
    x = torch.randn(work.batch, work.steps, work.inputs)
    return backward_step(module, lambda: run(x).sum())


def engram_step(work: Work, **config: object) -> Step:
    """Training step of our layer."""
    cell = make_cell(work, **config)
    return training_step(cell, lambda x: cell(x)[0], work)


def chunkwise_step(work: Work) -> Step:
    """Training step of our layer in PyTorch alone."""
    step = engram_step(work)

    def run() -> None:
        selected = os.environ.pop(SCAN_VARIABLE, None)
        os.environ[SCAN_VARIABLE] = "chunkwise"
        step()
        os.environ.pop(SCAN_VARIABLE)
        os.environ.update({} if selected is None else {SCAN_VARIABLE: selected})

    return run


def definition_step(work: Work) -> Step:
    """Training step of the definition, step by step under autograd."""
    cell = make_cell(work)
    return training_step(
        cell, lambda x: enn_loop(x, cell.initial_state(x), cell.weights(), cell.settings).outputs, work
    )


def torch_step(work: Work, name: str) -> Step:
    """Training step of a layer of PyTorch: "LSTM", "GRU", or the LSTM stack."""
    layers = {"LSTM": nn.LSTM, "GRU": nn.GRU}
    module = equal_lstm_stack(work) if name == STACK else layers[name](work.inputs, work.hidden, batch_first=True)
    return training_step(module, lambda x: module(x)[0], work)


class KerasStep:
    """Training step of the original's Keras layer, in a Python of its own that takes turns with this one.

    Args:
        python: an interpreter with `tensorflow` and `tensorflow-engram`.
    """

    def __init__(self, python: str, work: Work) -> None:
        script = Path(__file__).with_name("keras_peer.py")
        self.process = subprocess.Popen(
            [python, script, *map(str, (torch.get_num_threads(), *work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> float:
        """Seconds of one step, as measured there."""
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Keras peer ended with code {self.process.wait()}; its error is printed above")
        return float(line)

    def close(self) -> None:
        """End the other Python."""
        self.process.stdin.close()
        self.process.wait()


def multiply_adds(work: Work) -> int:
    """Multiply-adds of a training step of our layer: three times those of the forward pass.

    Forward, per token: the encoder, two products with the bank and two with the trace, and the integrator.
    """
    integrator = 3 * work.hidden * 3 + 3 * work.hidden
    return 3 * work.tokens * work.hidden * (work.inputs + 4 * work.slots + integrator)
