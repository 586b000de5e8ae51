"""Compare models on equal terms: the same data, schedule, number of parameters and seeds, and a test across seeds.

    python -m train.compare train/configs/compare/mnist_rows.yaml
    python -m train.compare train/configs/compare/mnist_rows.yaml --models gated gru --seeds 1 2 --num_train_epochs 2

The file names a recipe and its config, and for every model the options in which it differs. Options that this command
does not know go to every run. A file may give a grid of learning rates: every model then makes one run at each of them,
as short as the file says, further ones where the best is at an end of the grid, and goes on with the rate that did best
on the validation data.

Runs that have finished are not repeated, and one that was cut short goes on from its last checkpoint, so the same
command can be given until all is done. It prints, and saves in output_dir, the mean and standard deviation over seeds,
every value, the time, and for every pair of models a Welch t-test in which the seeds are the replicates, with Holm's
correction; and it draws the curves.
"""

import argparse
import importlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .checkpoints import whole_checkpoints
from .comparison_report import Results, draw, summarize, table
from .runs import command_line

RECIPES = ("image_classification", "language_model")
OPTIONS_FILE = "options.json"
OPTIONAL_ENTRIES = {"options", "learning_rates", "search_options"}
MOST_RATES_BEYOND = 3


@dataclass
class Comparison:
    """What a file for this command says.

    Attributes:
        recipe: module of `train` that runs a model.
        config: the recipe's YAML file, the same for all models.
        models: for every name, the options in which this model differs.
        seeds: of weights, order and dropout.
        metric: the number that is compared, `test_...`, one of those in a run's all_results.json.
        output_dir: where the runs and the results go.
        options: options of all runs that replace those of the config.
        learning_rates: a grid out of which, or beyond which, every model gets the best for itself; empty: the rate of
            the options.
        search_options: options of the runs that search the grid, beside those of all runs.
    """

    recipe: str
    config: str
    models: dict[str, dict[str, Any]]
    seeds: list[int]
    metric: str
    output_dir: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    search_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe is {self.recipe!r}; allowed: one of {RECIPES}.")
        if not self.models or not self.seeds:
            raise ValueError(f"models is {self.models!r}, seeds is {self.seeds!r}: give at least one of each.")
        if not self.metric.startswith("test_"):
            raise ValueError(f"metric is {self.metric!r}; allowed: a name that begins with 'test_'.")

    def choose(self, models: list[str]) -> None:
        """Keep only some models."""
        unknown = sorted(set(models) - set(self.models))
        if unknown:
            raise ValueError(f"models has {unknown}; allowed: {sorted(self.models)}.")
        self.models = {name: self.models[name] for name in models}

    def folder(self, model: str, seed: int) -> Path:
        """Where a run goes."""
        return Path(self.output_dir, model, f"seed-{seed}")

    def search_folder(self, model: str, learning_rate: float) -> Path:
        """Where a run goes that tries a learning rate."""
        return Path(self.output_dir, model, f"learning-rate-{learning_rate:g}")

    def command_line(self, model: str, seed: int, folder: Path, **options: Any) -> list[str]:
        """The arguments of a run.

        Args:
            model: its name.
            seed: of weights, order and dropout.
            folder: where it goes.
            **options: further options of this run.
        """
        options = {**self.options, **self.models[model], **options, "seed": seed, "output_dir": folder}
        given = {name: value for name, value in options.items() if value is not None}
        return [self.config, *itertools.chain(*([f"--{name}", *texts(value)] for name, value in given.items()))]


def texts(value: Any) -> list[str]:
    """An option's value as it is typed."""
    return [str(x) for x in value] if isinstance(value, list) else [str(value)]


def read_comparison(path: str) -> Comparison:
    """Read the file.

    Raises:
        ValueError: it holds unknown or lacks necessary entries.
    """
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    known = set(Comparison.__dataclass_fields__)
    if not isinstance(entries, dict) or set(entries) - known or known - OPTIONAL_ENTRIES - set(entries):
        raise ValueError(
            f"{path} has the entries {sorted(entries)}; allowed: {sorted(known)} "
            f"({', '.join(sorted(OPTIONAL_ENTRIES))} may lack)."
        )
    return Comparison(**{**entries, "models": {name: values or {} for name, values in entries["models"].items()}})


def run_all(comparison: Comparison, learning_rates: dict[str, float]) -> Results:
    """Run what has not finished yet, seed by seed, so that all models are there early.

    Args:
        comparison: what to run.
        learning_rates: by model; those that lack have the rate of their options.

    Returns:
        for every model and seed, what the run's all_results.json holds.
    """
    results: Results = {model: {} for model in comparison.models}
    runs = list(itertools.product(comparison.seeds, comparison.models))
    for number, (seed, model) in enumerate(runs, 1):
        print(f"\n{number}/{len(runs)}: {model}, seed {seed}", flush=True)
        folder = comparison.folder(model, seed)
        rate = {"learning_rate": learning_rates[model]} if model in learning_rates else {}
        argv = comparison.command_line(model, seed, folder, **rate)
        results[model][seed] = run_one(comparison.recipe, folder, argv, comparison.metric)
    return results


def search_learning_rates(comparison: Comparison) -> dict[str, dict[float, float]]:
    """For every model and learning rate, the metric on the validation data in a run with the first seed.

    A model whose best rate is the lowest or the highest of the grid goes on beyond it, in steps as wide, until a rate
    is worse, at most `MOST_RATES_BEYOND` times.
    """
    scores: dict[str, dict[float, float]] = {model: {} for model in comparison.models if comparison.learning_rates}
    for model, tried in scores.items():
        for rate in comparison.learning_rates:
            tried[rate] = search_run(comparison, model, rate)
        for _ in range(MOST_RATES_BEYOND):
            rate = rate_beyond(tried, best_learning_rate(comparison.metric, tried))
            if rate is None:
                break
            tried[rate] = search_run(comparison, model, rate)
    return {model: dict(sorted(tried.items())) for model, tried in scores.items()}


def search_run(comparison: Comparison, model: str, rate: float) -> float:
    """The metric on the validation data in the run of a model that tries a learning rate."""
    print(f"\n{model}, learning rate {rate:g}", flush=True)
    folder, metric = comparison.search_folder(model, rate), "validation_" + comparison.metric.removeprefix("test_")
    options = {**comparison.search_options, "learning_rate": rate}
    argv = comparison.command_line(model, comparison.seeds[0], folder, **options)
    return run_one(comparison.recipe, folder, argv, metric)[metric]


def rate_beyond(rates: Iterable[float], best: float) -> float | None:
    """The rate next to try if the best of those tried is the lowest or the highest of several, else `None`."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return float(f"{best * best / neighbour:g}")


def best_learning_rate(metric: str, scores: dict[float, float]) -> float:
    """The rate with the best score: the highest, or of losses and perplexities the lowest; never a NaN if it can be."""
    sign = -1 if metric.endswith(("loss", "perplexity")) else 1
    return max(scores, key=lambda rate: -np.inf if np.isnan(scores[rate]) else sign * scores[rate])


def run_one(recipe: str, folder: Path, argv: list[str], metric: str) -> dict[str, Any]:
    """Make a run, go on with it, or read what it left.

    Args:
        recipe: one of `RECIPES`.
        folder: where it goes.
        argv: its arguments.
        metric: what it has to report.

    Raises:
        ValueError: the folder holds a run with other options or another config, or the run does not report the metric.
    """
    recorded, config = folder / OPTIONS_FILE, yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    asked = {"config": config, "options": argv[1:]}
    if recorded.exists() and json.loads(recorded.read_text()) != asked:
        raise ValueError(
            f"{folder} holds a run with other options ({recorded}), or {argv[0]} has changed since: choose another "
            f"output_dir, or delete it. The options now: {' '.join(argv)}"
        )
    result = folder / "all_results.json"
    if result.exists():
        print("Has finished.", flush=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(asked, indent=1))
        resume = ["--resume_from_checkpoint", "true"] if whole_checkpoints(folder) else []
        module = importlib.import_module(f"{__package__}.{recipe}")
        module.run(*module.parse([*argv, *resume]), command=command_line(recipe, argv))
    metrics = json.loads(result.read_text())
    if metric not in metrics:
        raise ValueError(f"metric is {metric!r}; allowed: one of {sorted(metrics)}.")
    return metrics


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run everything, and print and save the results."""
    searched = search_learning_rates(comparison)
    learning_rates = {model: best_learning_rate(comparison.metric, scores) for model, scores in searched.items()}
    results = run_all(comparison, learning_rates)
    summary = summarize(comparison.metric, comparison.config, results, searched, learning_rates)
    folder = Path(comparison.output_dir)
    (folder / "comparison.json").write_text(json.dumps(summary, indent=1))
    (folder / "comparison.md").write_text(table(summary) + "\n")
    runs = {model: [comparison.folder(model, seed) for seed in comparison.seeds] for model in comparison.models}
    draw(comparison.metric, runs, folder / "comparison.png")
    print(f"\n{table(summary)}\n\nSaved as comparison.json, .md and .png in {folder}.")
    return summary


def parse(argv: list[str] | None = None) -> Comparison:
    """Read the command line and the file it names."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        usage="%(prog)s comparison.yaml [--models ...] [--seeds ...] [--output_dir ...] [options of the recipe]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("comparison", help="YAML file, such as train/configs/compare/mnist_rows.yaml")
    parser.add_argument("--models", nargs="+", help="some of the file's models (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="replace the file's seeds")
    parser.add_argument("--output_dir", help="replace the file's output_dir")
    args, others = parser.parse_known_args(argv)
    try:
        comparison = read_comparison(args.comparison)
        if args.models:
            comparison.choose(args.models)
        comparison.seeds = args.seeds or comparison.seeds
        comparison.output_dir = args.output_dir or comparison.output_dir
        comparison.options |= options_of(others)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return comparison


def options_of(arguments: list[str]) -> dict[str, list[str]]:
    """`--name value ...` as a dictionary, for the recipe to check."""
    options: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            values = options.setdefault(argument.removeprefix("--"), [])
        elif options:
            values.append(argument)
        else:
            raise ValueError(f"unrecognized argument: {argument}")
    return options


if __name__ == "__main__":
    compare(parse())
