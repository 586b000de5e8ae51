"""Prints how fast the engram layer is: `python -m benchmarks.speed`, or `make bench`.

training         a training step (forward and backward) of one layer beside its peers, for four works
                 (batch, steps, inputs, hidden size, slots); with --forms also our layer in PyTorch alone and the
                 definition under autograd, and with --keras_python the original's Keras layer
behaviour        cost per token of long sequences, cost of the clip, peak memory, first call
inference        reading a prompt and writing token by token, at batch 1, beside a GPT-2 of equal parameters
language_models  a training step of whole language models of equal parameters, in sequences of 512 tokens

All peers of a row run in one process, one after the other in every round, so that what else the machine does falls on
all of them alike. A ratio is the median over rounds of ours divided by the peer's time in the same round, with its
quartiles. The floor is the time that the layer's multiply-adds, times three for forward and backward, take at the
fastest float32 matrix product found in the same run.
"""

import argparse
import statistics

import torch

from .behaviour import print_behaviour
from .inference import print_inference
from .language_models import print_language_models
from .peers import (
    STACK,
    WORKS,
    KerasStep,
    Work,
    chunkwise_step,
    definition_step,
    engram_step,
    multiply_adds,
    torch_step,
)
from .timing import fastest_product, peak_memory, ratio, rounds_of

SECTIONS = ("training", "behaviour", "inference", "language_models")


def print_training(args: argparse.Namespace) -> None:
    """Print the table of training steps."""
    product = fastest_product()
    print(f"fastest float32 matrix product: {2 * product / 1e9:.0f} GFLOP/s")
    print(f"{'work':6}{'peer':32}{'ms':>9}  {'engram / peer':22}{'MiB at the peak':>16}")
    for name in args.works:
        time_training(name, WORKS[name], product, args)


def time_training(name: str, work: Work, product: float, args: argparse.Namespace) -> None:
    """Print the rows of one work."""
    makers = {
        "engram": (engram_step, work),
        STACK: (torch_step, work, STACK),
        "LSTM, same width": (torch_step, work, "LSTM"),
        "GRU, same width": (torch_step, work, "GRU"),
    }
    if args.forms:
        makers |= {"engram, PyTorch alone": (chunkwise_step, work), "definition": (definition_step, work)}
    steps = {peer: make(*arguments) for peer, (make, *arguments) in makers.items()}
    steps["engram, gated"] = engram_step(work, integrator="gated")
    if args.keras_python:
        steps["Keras ENN"] = KerasStep(args.keras_python, work)
    times = rounds_of(steps, args.rounds)
    for peer, seconds in times.items():
        memory = peak_memory(*makers[peer]) if peer in makers else None
        compared = ratio(times["engram"], seconds)
        shown = "" if memory is None else f"{memory:.0f}"
        print(f"{name:6}{peer:32}{1e3 * statistics.median(seconds):9.1f}  {compared!s:22}{shown:>16}", flush=True)
    floor = multiply_adds(work) / product
    share = floor / statistics.median(times["engram"])
    print(f"{name:6}{'floor':32}{1e3 * floor:9.1f}  {1 / share:<22.2f}{'':>16}", flush=True)
    if args.keras_python:
        steps["Keras ENN"].close()


def main() -> None:
    """Print the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS, help="what to print")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS), help="which works to time")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every comparison (default: %(default)s)")
    parser.add_argument("--forms", action="store_true", help="time the other forms of our layer, too (slow)")
    parser.add_argument("--keras_python", help="a Python with tensorflow and tensorflow-engram, to time the original")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; allowed: 2 or more, since quartiles need two.")

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if "training" in args.sections:
        print_training(args)
    if "behaviour" in args.sections:
        print_behaviour(args.rounds)
    if "inference" in args.sections:
        print_inference(args.rounds)
    if "language_models" in args.sections:
        print_language_models(args.rounds)


if __name__ == "__main__":
    main()
