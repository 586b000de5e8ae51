"""Compare models on equal terms: the same data, schedule, number of parameters and seeds, and a test across seeds.

    python -m train.compare train/configs/compare/mnist_rows.yaml
    python -m train.compare train/configs/compare/mnist_rows.yaml --models gated gru --seeds 1 2 --num_train_epochs 2

The file names a recipe and its config, and for every model the options in which it differs. Options that this command
does not know go to every run, in place of what the file says. A file may give a grid of learning rates: every model
then makes one run at each of them, as short as the file says, further ones where the best is at an end of the grid, and
goes on with the rate that did best on the validation data. --learning_rates_of takes the rates that another comparison
has found in this way, for example one of smaller models.

Runs that have finished are not repeated, and one that was cut short goes on from its last checkpoint, so the same
command can be given until all is done; with --finished_only it takes the runs that are there and makes none. It prints,
and saves in output_dir, the mean and standard deviation over seeds, every value, the time, and for every pair of models
a Welch t-test in which the seeds are the replicates, with Holm's correction; and it draws the curves.
"""

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .checkpoints import whole_checkpoints
from .comparison import (
    LOWER_IS_BETTER,
    SEARCH_FOLDER,
    Comparison,
    Refused,
    options_of,
    read_comparison,
    recipe_module,
    require_validation_data,
)
from .comparison_report import Results, draw, summarize, table
from .learning_rates import search
from .runs import command_line

OPTIONS_FILE, RESULTS_FILE = "options.json", "all_results.json"


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


def finished_runs(comparison: Comparison) -> Results:
    """What has finished of the chosen models and seeds.

    Returns:
        as `run_all`, without the models of which nothing has finished.

    Raises:
        Refused: there is nothing.
    """
    results: Results = {}
    for model, seed in itertools.product(comparison.models, comparison.seeds):
        path = comparison.folder(model, seed) / RESULTS_FILE
        if path.exists():
            results.setdefault(model, {})[seed] = read_metrics(path, comparison.metric)
    if not results:
        raise Refused(f"output_dir is {comparison.output_dir!r}, where no run of these models and seeds has finished.")
    return results


def finished_searches(comparison: Comparison, output_dir: str) -> dict[str, dict[float, float]]:
    """As `search_learning_rates`, of what has finished in a folder, without the models of which nothing has."""
    metric, searched = comparison.validation_metric, {}
    for model in comparison.models:
        tried = {
            float(path.parent.name.removeprefix(SEARCH_FOLDER)): read_metrics(path, metric)[metric]
            for path in Path(output_dir, model).glob(f"{SEARCH_FOLDER}*/{RESULTS_FILE}")
        }
        if tried:
            searched[model] = dict(sorted(tried.items()))
    return searched


def learning_rates_of(comparison: Comparison, output_dir: str) -> dict[str, float]:
    """The best rates of another comparison.

    Raises:
        Refused: it has searched none for one of the models.
    """
    searched = finished_searches(comparison, output_dir)
    lacking = sorted(comparison.models.keys() - searched)
    if lacking:
        raise Refused(
            f"learning_rates_of is {output_dir!r}, where none have been searched for {', '.join(lacking)}; allowed: "
            f"the output_dir of a comparison that has, or --models with some of {sorted(searched)}."
        )
    return best_learning_rates(comparison, searched)


def search_learning_rates(comparison: Comparison) -> dict[str, dict[float, float]]:
    """For every model and learning rate, the metric on the validation data in a run with the file's first seed."""
    best = partial(best_learning_rate, comparison.metric)
    return {
        model: search(comparison.learning_rates, partial(search_run, comparison, model), best)
        for model in (comparison.models if comparison.learning_rates else ())
    }


def search_run(comparison: Comparison, model: str, rate: float) -> float:
    """The metric on the validation data in the run of a model that tries a learning rate."""
    print(f"\n{model}, learning rate {rate:g}", flush=True)
    folder, metric = comparison.search_folder(model, rate), comparison.validation_metric
    own = {name: comparison.typed.get(name, value) for name, value in comparison.search_options.items()}
    options = {**own, "learning_rate": rate}
    argv = comparison.command_line(model, comparison.search_seed, folder, **options)
    require_validation_data(recipe_module(comparison.recipe).parse(argv)[1])
    return run_one(comparison.recipe, folder, argv, metric)[metric]


def best_learning_rates(comparison: Comparison, searched: dict[str, dict[float, float]]) -> dict[str, float]:
    """For every model the best of the rates that were tried."""
    return {model: best_learning_rate(comparison.metric, scores) for model, scores in searched.items()}


def best_learning_rate(metric: str, scores: dict[float, float]) -> float:
    """The rate with the best score: the highest, or of losses and perplexities the lowest; never a NaN if it can be."""
    sign = -1 if any(word in metric for word in LOWER_IS_BETTER) else 1
    return max(scores, key=lambda rate: -np.inf if np.isnan(scores[rate]) else sign * scores[rate])


def run_one(recipe: str, folder: Path, argv: list[str], metric: str) -> dict[str, Any]:
    """Make a run, go on with it, or read what it left.

    Args:
        recipe: one of `RECIPES`.
        folder: where it goes.
        argv: its arguments.
        metric: what it has to report.

    Raises:
        Refused: the folder holds a run with other options or another config, or the run does not report the metric.
    """
    recorded, config = folder / OPTIONS_FILE, yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    asked = {"config": config, "options": argv[1:]}
    if recorded.exists() and json.loads(recorded.read_text()) != asked:
        raise Refused(
            f"{folder} holds a run with other options ({recorded}), or {argv[0]} has changed since: choose another "
            f"output_dir, or delete it. The options now: {' '.join(argv)}"
        )
    result = folder / RESULTS_FILE
    if result.exists():
        print("Has finished.", flush=True)
    else:
        resume = ["--resume_from_checkpoint", "true"] if whole_checkpoints(folder) else []
        module = recipe_module(recipe)
        arguments = module.parse([*argv, *resume])  # before the folder says that there is such a run
        folder.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(asked, indent=1))
        module.run(*arguments, command=command_line(recipe, argv))
    return read_metrics(result, metric)


def read_metrics(path: Path, metric: str) -> dict[str, Any]:
    """What a run has reported.

    Raises:
        Refused: not the metric.
    """
    metrics = json.loads(path.read_text())
    if metric not in metrics:
        raise Refused(f"metric is {metric!r}; allowed: one of {sorted(metrics)}.")
    return metrics


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run everything, and print and save the results."""
    if comparison.finished_only:
        results, searched = finished_runs(comparison), finished_searches(comparison, comparison.output_dir)
    elif comparison.learning_rates_of:
        results, searched = run_all(comparison, learning_rates_of(comparison, comparison.learning_rates_of)), {}
    else:
        searched = search_learning_rates(comparison)
        results = run_all(comparison, best_learning_rates(comparison, searched))
    best = best_learning_rates(comparison, searched)
    summary = summarize(comparison.metric, comparison.config, results, searched, best)
    folder = Path(comparison.output_dir)
    (folder / "comparison.json").write_text(json.dumps(summary, indent=1))
    (folder / "comparison.md").write_text(table(summary) + "\n")
    runs = {model: [comparison.folder(model, seed) for seed in seeds] for model, seeds in results.items()}
    draw(comparison.metric, runs, folder / "comparison.png")
    print(f"\n{table(summary)}\n\nSaved as comparison.json, .md and .png in {folder}.")
    return summary


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        usage="%(prog)s comparison.yaml [--models ...] [--seeds ...] [--output_dir ...] [options of the recipe]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("comparison", help="YAML file, such as train/configs/compare/mnist_rows.yaml")
    parser.add_argument("--models", nargs="+", help="some of the file's models (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="replace the file's seeds, but for the search's, the first"
    )
    parser.add_argument("--output_dir", help="replace the file's output_dir")
    parser.add_argument(
        "--learning_rates_of", help="output_dir of another comparison: take the rates that it found, and search none"
    )
    parser.add_argument("--finished_only", action="store_true", help="make no runs: report those that are there")
    return parser


def parse(argv: list[str] | None = None) -> Comparison:
    """Read the command line and the file it names."""
    parser = make_parser()
    args, others = parser.parse_known_args(argv)
    try:
        comparison = read_comparison(args.comparison)
        if args.models:
            comparison.choose(args.models)
        comparison.seeds = args.seeds or comparison.seeds
        comparison.output_dir = args.output_dir or comparison.output_dir
        comparison.finished_only, comparison.learning_rates_of = args.finished_only, args.learning_rates_of
        if comparison.finished_only and others:
            raise ValueError(f"finished_only is True; allowed: without options of the recipe ({' '.join(others)}).")
        comparison.replace_options(options_of(others))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return comparison


def main(argv: list[str] | None = None) -> None:
    """Compare what the command line asks for."""
    try:
        compare(parse(argv))
    except Refused as error:
        make_parser().error(str(error))


if __name__ == "__main__":
    main()
