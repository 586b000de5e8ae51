"""What a comparison found: numbers, tests across seeds, a table, and curves."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

# And how many tokens, at least, the model had read before a token: its loss, and how many tokens there were of these.
LOSS_FROM, TOKENS_FROM = "test_restarted_loss_from_", "test_restarted_tokens_from_"
Results = dict[str, dict[int, dict[str, Any]]]  # for every model and seed, what the run's all_results.json holds


def pairwise_tests(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Welch's t-test for every pair of models, the seeds being the replicates.

    Args:
        values: for every model, its metric with every seed.

    Returns:
        for every pair `models`, `difference` of the means (first minus second), `p` and `p_holm`, the smallest level at
        which Holm's step-down procedure over all pairs that have a `p` rejects; NaN with fewer than two seeds.
    """
    tests: list[dict[str, Any]] = []
    for first, second in itertools.combinations(values, 2):
        a, b = values[first], values[second]
        difference = float(np.mean(a) - np.mean(b))
        tests.append({"models": [first, second], "difference": difference, "p": welch(a, b), "p_holm": np.nan})
    adjusted, tested = 0.0, [test for test in tests if np.isfinite(test["p"])]
    for rank, test in enumerate(sorted(tested, key=lambda test: test["p"])):
        test["p_holm"] = adjusted = max(adjusted, min(1.0, (len(tested) - rank) * test["p"]))
    return tests


def welch(first: list[float], second: list[float]) -> float:
    """The p-value of Welch's t-test; 1 where all values are the same, NaN with fewer than two on a side."""
    if min(len(first), len(second)) < 2:
        return np.nan
    if len({*first, *second}) == 1:
        return 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # seeds may well agree to the last image
        return float(ttest_ind(first, second, equal_var=False).pvalue)


def summarize(
    metric: str,
    config: str,
    results: Results,
    searched: dict[str, dict[float, float]],
    learning_rates: dict[str, float],
) -> dict[str, Any]:
    """The results as they are saved: for every model its values and their mean and deviation, and the tests.

    Args:
        metric: the number that is compared.
        config: of all runs.
        results: of the runs.
        searched: for every model that searched the grid and every learning rate, its score on the validation data.
        learning_rates: the best of them.

    Models of text also have their tokens per second in training, and the loss of a token by how many were read before
    it, from an empty memory on: at least so many, and fewer than the next number.
    """
    values = {name: [run[metric] for run in runs.values()] for name, runs in results.items()}
    models = {
        name: {
            "mean": float(np.mean(values[name])),
            "std": float(np.std(values[name], ddof=1)) if len(runs) > 1 else np.nan,
            "values": dict(zip(map(str, runs), values[name], strict=True)),
            "parameters": next(iter(runs.values()))["parameters"],
            "state_bytes": next(iter(runs.values()))["state_bytes"],
            "seconds": mean_of(runs, "train_seconds"),
        }
        for name, runs in results.items()
    }
    for name, runs in results.items():
        first = next(iter(runs.values()))
        if "train_tokens_per_second" in first:
            models[name]["tokens_per_second"] = mean_of(runs, "train_tokens_per_second")
        places = sorted(int(metric.removeprefix(LOSS_FROM)) for metric in first if metric.startswith(LOSS_FROM))
        if places:
            models[name]["loss_by_tokens_before"] = {place: mean_of(runs, f"{LOSS_FROM}{place}") for place in places}
            models[name]["tokens_by_tokens_before"] = {place: first[f"{TOKENS_FROM}{place}"] for place in places}
    searches = {
        name: {"scores": {f"{rate:g}": score for rate, score in scores.items()}, "best": learning_rates[name]}
        for name, scores in searched.items()
    }
    return {
        "metric": metric,
        "config": config,
        "models": models,
        "tests": pairwise_tests(values),
        "learning_rate_searches": searches,
    }


def mean_of(runs: dict[int, dict[str, Any]], metric: str) -> float:
    """A metric's mean over the seeds."""
    return float(np.mean([run[metric] for run in runs.values()]))


def table(summary: dict[str, Any]) -> str:
    """The results as Markdown."""
    metric = summary["metric"].replace("_", " ")
    lines = [
        f"| model | parameters | state, bytes | {metric}, mean ± std | by seed | seconds of a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in summary["models"].items():
        by_seed = ", ".join(f"{seed}: {number(value)}" for seed, value in model["values"].items())
        mean = number(model["mean"])
        mean += "" if np.isnan(model["std"]) else f" ± {number(model['std'], of_size=model['mean'])}"
        lines.append(
            f"| {name} | {model['parameters']:,} | {model['state_bytes']:,} | {mean} | {by_seed} | "
            f"{model['seconds']:,.0f} |"
        )
    lines += ["", "| pair | difference of means | p (Welch) | p (Holm) |", "| --- | --- | --- | --- |"]
    for test in summary["tests"]:
        pair = " - ".join(test["models"])
        p, p_holm = ("" if np.isnan(test[name]) else f"{test[name]:.3g}" for name in ("p", "p_holm"))
        lines.append(f"| {pair} | {test['difference']:+.4g} | {p} | {p_holm} |")
    read = {name: model for name, model in summary["models"].items() if "loss_by_tokens_before" in model}
    if read:
        counts = next(iter(read.values()))["tokens_by_tokens_before"]
        lines += [
            "",
            "| test loss of a token, by how many were read before it, from an empty memory on | "
            + " | ".join(f"from {place} ({count:,} tokens)" for place, count in counts.items())
            + " | tokens/s in training |",
            "| --- |" + " --- |" * (len(counts) + 1),
        ]
        for name, model in read.items():
            losses = " | ".join(f"{loss:.3f}" for loss in model["loss_by_tokens_before"].values())
            lines.append(f"| {name} | {losses} | {model['tokens_per_second']:,.0f} |")
    searches = summary["learning_rate_searches"]
    if searches:
        rates = sorted({rate for search in searches.values() for rate in search["scores"]}, key=float)
        validation = metric.replace("test", "validation", 1)
        lines += [
            "",
            f"| {validation} of a search run | {' | '.join(rates)} | best |",
            "| --- |" + " --- |" * (len(rates) + 1),
        ]
        for name, search in searches.items():
            scores = " | ".join(number(search["scores"][rate]) if rate in search["scores"] else "" for rate in rates)
            lines.append(f"| {name} | {scores} | {search['best']:g} |")
    return "\n".join(lines)


def number(value: float, of_size: float | None = None) -> str:
    """Shares to four places, perplexities to one, and what goes with a number `of_size` as that one."""
    size = value if of_size is None else of_size
    return f"{value:.4f}" if abs(size) < 10 or np.isnan(size) else f"{value:.1f}"


def draw(metric: str, runs: dict[str, list[Path]], path: Path) -> None:
    """Save the curves of the metric on the validation data, one line per model and a thin one per seed.

    Args:
        metric: the number that is compared.
        runs: for every model, the folders of its runs.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    name = "eval_" + metric.removeprefix("test_")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, (model, folders) in enumerate(runs.items()):
        curves = [curve(folder, name) for folder in folders]
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
