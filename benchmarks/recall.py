"""Measures what a memory is for: `python -m benchmarks.recall`. Answers that only the sequence itself can tell.

mqar       multi-query associative recall: pairs of a key and its value, then keys at random steps among noise
long_gap   the same pairs, a long gap of noise, then all keys
copying    random symbols, and the same once more
few_shot   three classes of images that were never trained on, from one to five labelled images of each

Every model is trained on short sequences and then asked in longer ones (up to 16 times as long) and with more pairs
than it was trained on. All models have the same number of parameters, schedule, batches and questions. In every task
each takes its own best learning rate: the one with which, with the first seed, most answers are right when training
ends, or all are soonest. All try the same grid, and go on beyond it where its first or last rate is the best. Training
ends early when all answers are right. Engram models that have no attention are asked three times: with the trace

on         as in training: every step writes
off        no step writes; what is right then comes from the bank, the hidden state or a mixer's convolution
frozen     from the first question on, the trace neither decays nor is written

Nothing but the trace and the hidden state changes within a sequence: what is learnt there is learnt without gradient.

    python -m benchmarks.recall --tasks mqar copying --models mixer enn gru --steps 8000
    python -m benchmarks.recall --tasks few_shot --seeds 1 2 3
    python -m benchmarks.recall --tasks few_shot --dataset_name path/to/a/folder

A run that has finished is read from output_dir/task/model/learning-rate-R/seed-N.json and not repeated: the same
command goes on where it was cut short. It prints results.md and leaves it, results.json and a plot of every task in
output_dir.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from train.learning_rates import search

from .recall_images import few_shot_task
from .recall_report import draw, report
from .recall_runs import MODELS, SOLVED, Settings, run
from .recall_tasks import Task, token_tasks

FEW_SHOT = "few_shot"
TASKS = (*token_tasks(), FEW_SHOT)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
Runs = dict[str, dict[str, list[dict[str, Any]]]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1], help="of weights and training sequences (default: 1)"
    )
    parser.add_argument("--steps", type=int, default=4000, help="most training steps of a run (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=60_000, help="of every model (default: %(default)s)")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=LEARNING_RATES,
        help=f"to choose from, each the highest of its run (default: {' '.join(map('{:g}'.format, LEARNING_RATES))})",
    )
    parser.add_argument(
        "--dataset_name",
        default="ylecun/mnist",
        help="few_shot: images with classes, on the Hub or in a local folder; its last three classes are held out "
        "(default: %(default)s)",
    )
    parser.add_argument("--output_dir", default="runs/recall", help="runs and results (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"steps is {args.steps}; allowed: a positive integer.")
    if min(args.learning_rates) <= 0:
        parser.error(f"learning_rates is {args.learning_rates}; allowed: positive numbers.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run what has not finished yet, print and save the results."""
    args = parse(argv)
    tasks = make_tasks(args.tasks, args.dataset_name)
    results = run_all(tasks, args)
    text = "\n\n".join(report(name, tasks[name], runs) for name, runs in results.items())
    folder = Path(args.output_dir)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "results.md").write_text(text + "\n")
    for name, runs in results.items():
        draw(tasks[name], runs, folder / f"{name}.png")
    print(
        f"\n{text}\n\nSaved as results.json, results.md and {', '.join(f'{name}.png' for name in results)} in {folder}."
    )


def make_tasks(names: list[str], dataset_name: str) -> dict[str, Task]:
    """Tasks by name; the images are read only if they are needed."""
    tokens = token_tasks()
    return {name: few_shot_task(dataset_name) if name == FEW_SHOT else tokens[name] for name in names}


def run_all(tasks: dict[str, Task], args: argparse.Namespace) -> Runs:
    """What the runs with the best learning rates returned; seed by seed, so that all models are there early."""
    results: Runs = {task: {model: [] for model in args.models} for task in tasks}
    for seed, task, model in itertools.product(args.seeds, tasks, args.models):
        runs = results[task][model]
        make = partial(finished_run, task, tasks[task], model, seed, args)
        runs.append(make(runs[0]["settings"]["learning_rate"]) if runs else best_run(make, args.learning_rates))
    return results


def best_run(make: Callable[[float], dict[str, Any]], learning_rates: Sequence[float]) -> dict[str, Any]:
    """What `make` returned for the best learning rate, and `tried`: how training ended with each of them."""

    def best(found: dict[float, dict[str, Any]]) -> float:
        return max(found, key=lambda rate: (min(found[rate]["training_accuracy"], SOLVED), -found[rate]["steps"]))

    found = search(learning_rates, make, best)
    tried = {f"{rate:g}": {name: run[name] for name in ("training_accuracy", "steps")} for rate, run in found.items()}
    return {**found[best(found)], "tried": tried}


def finished_run(
    name: str, task: Task, model: str, seed: int, args: argparse.Namespace, learning_rate: float
) -> dict[str, Any]:
    """What a run returned: read from its file, or made now and written there."""
    settings = Settings(args.steps, args.parameters, learning_rate)
    shared = dataclasses.asdict(settings) | ({"dataset_name": args.dataset_name} if name == FEW_SHOT else {})
    path = Path(args.output_dir, name, model, f"learning-rate-{learning_rate:g}", f"seed-{seed}.json")
    if path.exists():
        result = json.loads(path.read_text())
        if result["settings"] != shared:
            raise SystemExit(
                f"{path} holds a run with other settings, {result['settings']}; now they are {shared}: choose another "
                "--output_dir, or delete it."
            )
        return result
    title = f"{name}, {model}, learning rate {learning_rate:g}, seed {seed}"
    result = {"settings": shared, "seed": seed, **run(task, model, seed, settings, title)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
