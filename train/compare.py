"""Compare models on equal terms: the same data, schedule, number of parameters and seeds, and a test across seeds.

    python -m train.compare train/configs/compare/mnist_rows.yaml
    python -m train.compare train/configs/compare/mnist_rows.yaml --models gated gru --seeds 1 2 --num_train_epochs 2

The file names a recipe and its config, and for every model the options in which it differs. Options that this command
does not know go to every run. Runs that have finished are not repeated, and one that was cut short goes on from its
last checkpoint, so the same command can be given until all is done. It prints, and saves in output_dir, the mean and
standard deviation over seeds, every value, the time, and for every pair of models a Welch t-test in which the seeds are
the replicates, with Holm's correction; and it draws the curves.
"""

import argparse
import importlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import ttest_ind

from .checkpoints import whole_checkpoints
from .runs import command_line

RECIPES = ("image_classification", "language_model")
OPTIONS_FILE = "options.json"
Results = dict[str, dict[int, dict[str, Any]]]


@dataclass
class Comparison:
    """What a file for this command says.

    Attributes:
        recipe: module of `train` that runs a model.
        config: the recipe's YAML file, the same for all models.
        models: for every name, the options in which this model differs.
        seeds: of weights, order and dropout.
        metric: the number that is compared, one of those in a run's all_results.json.
        output_dir: where the runs and the results go.
        options: options of all runs that replace those of the config.
    """

    recipe: str
    config: str
    models: dict[str, dict[str, Any]]
    seeds: list[int]
    metric: str
    output_dir: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe is {self.recipe!r}; allowed: one of {RECIPES}.")
        if not self.models or not self.seeds:
            raise ValueError(f"models is {self.models!r}, seeds is {self.seeds!r}: give at least one of each.")

    def choose(self, models: list[str]) -> None:
        """Keep only some models."""
        unknown = sorted(set(models) - set(self.models))
        if unknown:
            raise ValueError(f"models has {unknown}; allowed: {sorted(self.models)}.")
        self.models = {name: self.models[name] for name in models}

    def folder(self, model: str, seed: int) -> Path:
        """Where a run goes."""
        return Path(self.output_dir, model, f"seed-{seed}")

    def command_line(self, model: str, seed: int) -> list[str]:
        """The arguments of a run."""
        options = {**self.options, **self.models[model], "seed": seed, "output_dir": self.folder(model, seed)}
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
    if not isinstance(entries, dict) or set(entries) - known or known - {"options"} - set(entries):
        raise ValueError(f"{path} has the entries {sorted(entries)}; allowed: {sorted(known)} ('options' may lack).")
    return Comparison(**{**entries, "models": {name: values or {} for name, values in entries["models"].items()}})


def run_all(comparison: Comparison) -> Results:
    """Run what has not finished yet, seed by seed, so that all models are there early.

    Returns:
        for every model and seed, what the run's all_results.json holds.
    """
    results: Results = {model: {} for model in comparison.models}
    runs = list(itertools.product(comparison.seeds, comparison.models))
    for number, (seed, model) in enumerate(runs, 1):
        print(f"\n{number}/{len(runs)}: {model}, seed {seed}", flush=True)
        results[model][seed] = run_one(comparison, model, seed)
    return results


def run_one(comparison: Comparison, model: str, seed: int) -> dict[str, Any]:
    """Run one model with one seed, go on with it, or read what it left.

    Raises:
        ValueError: the folder holds a run with other options, or the run does not report the metric.
    """
    folder, argv = comparison.folder(model, seed), comparison.command_line(model, seed)
    recorded = folder / OPTIONS_FILE
    if recorded.exists() and json.loads(recorded.read_text()) != argv:
        raise ValueError(
            f"{folder} holds a run with other options ({recorded}): choose another output_dir, or delete it. "
            f"The options now: {' '.join(argv)}"
        )
    result = folder / "all_results.json"
    if result.exists():
        print("Has finished.", flush=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(argv, indent=1))
        resume = ["--resume_from_checkpoint", "true"] if whole_checkpoints(folder) else []
        recipe = importlib.import_module(f"{__package__}.{comparison.recipe}")
        recipe.run(*recipe.parse([*argv, *resume]), command=command_line(comparison.recipe, argv))
    metrics = json.loads(result.read_text())
    if comparison.metric not in metrics:
        raise ValueError(f"metric is {comparison.metric!r}; allowed: one of {sorted(metrics)}.")
    return metrics


def pairwise_tests(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Welch's t-test for every pair of models, the seeds being the replicates.

    Args:
        values: for every model, its metric with every seed.

    Returns:
        for every pair `models`, `difference` of the means (first minus second), `p` and `p_holm`, the smallest level at
        which Holm's step-down procedure over all pairs rejects; NaN with fewer than two seeds.
    """
    tests: list[dict[str, Any]] = []
    for first, second in itertools.combinations(values, 2):
        a, b = values[first], values[second]
        p = ttest_ind(a, b, equal_var=False).pvalue if min(len(a), len(b)) > 1 else np.nan
        tests.append({"models": [first, second], "difference": float(np.mean(a) - np.mean(b)), "p": float(p)})
    adjusted = 0.0
    for rank, test in enumerate(sorted(tests, key=lambda test: test["p"])):
        adjusted = max(adjusted, min(1.0, (len(tests) - rank) * test["p"]))
        test["p_holm"] = adjusted if np.isfinite(test["p"]) else np.nan
    return tests


def summarize(comparison: Comparison, results: Results) -> dict[str, Any]:
    """The results as they are saved: for every model its values and their mean and deviation, and the tests."""
    values = {name: [run[comparison.metric] for run in runs.values()] for name, runs in results.items()}
    models = {
        name: {
            "mean": float(np.mean(values[name])),
            "std": float(np.std(values[name], ddof=1)) if len(runs) > 1 else np.nan,
            "values": dict(zip(map(str, runs), values[name], strict=True)),
            "parameters": next(iter(runs.values()))["parameters"],
            "state_bytes": next(iter(runs.values()))["state_bytes"],
            "seconds": float(np.mean([run["train_seconds"] for run in runs.values()])),
        }
        for name, runs in results.items()
    }
    return {"metric": comparison.metric, "config": comparison.config, "models": models, "tests": pairwise_tests(values)}


def table(summary: dict[str, Any]) -> str:
    """The results as Markdown."""
    metric = summary["metric"].replace("_", " ")
    lines = [
        f"| model | parameters | state, bytes | {metric}, mean ± std | by seed | seconds of a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in summary["models"].items():
        by_seed = ", ".join(f"{seed}: {number(value)}" for seed, value in model["values"].items())
        lines.append(
            f"| {name} | {model['parameters']:,} | {model['state_bytes']:,} | {number(model['mean'])} ± "
            f"{number(model['std'])} | {by_seed} | {model['seconds']:,.0f} |"
        )
    lines += ["", "| pair | difference of means | p (Welch) | p (Holm) |", "| --- | --- | --- | --- |"]
    for test in summary["tests"]:
        pair = " - ".join(test["models"])
        lines.append(f"| {pair} | {test['difference']:+.4g} | {test['p']:.3g} | {test['p_holm']:.3g} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Shares to four places, perplexities to one."""
    return f"{value:.4f}" if abs(value) < 10 or np.isnan(value) else f"{value:.1f}"


def draw(comparison: Comparison, path: Path) -> None:
    """Save the curves of the metric on the validation data, one line per model and a thin one per seed."""
    from matplotlib.figure import Figure

    name = "eval_" + comparison.metric.partition("_")[2]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, model in enumerate(comparison.models):
        curves = [curve(comparison.folder(model, seed), name) for seed in comparison.seeds]
        for points in curves:
            axis.plot(*zip(*points.items(), strict=True), color=f"C{index}", alpha=0.35, linewidth=0.8)
        # A run that was interrupted has evaluations that the others lack.
        shared = [epoch for epoch in curves[0] if all(epoch in points for points in curves)]
        means = [np.mean([points[epoch] for points in curves]) for epoch in shared]
        axis.plot(shared, means, color=f"C{index}", label=model)
    axis.set(xlabel="epoch", ylabel=name.replace("_", " "))
    axis.legend()
    figure.savefig(path, dpi=120)


def curve(folder: Path, name: str) -> dict[float, float]:
    """For every epoch at which a run logged a metric, its value."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["epoch"]: entry[name] for entry in history if name in entry}


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run everything, and print and save the results."""
    summary = summarize(comparison, run_all(comparison))
    folder = Path(comparison.output_dir)
    (folder / "comparison.json").write_text(json.dumps(summary, indent=1))
    (folder / "comparison.md").write_text(table(summary) + "\n")
    draw(comparison, folder / "comparison.png")
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
