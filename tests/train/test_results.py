"""The README's tables of comparisons say what the runs that are kept in docs/results found."""

import json
from pathlib import Path

import pytest
import yaml

from train.compare import OPTIONS_FILE, read_comparison
from train.comparison_report import number, summarize

KEPT = sorted(folder for folder in Path("docs/results").iterdir() if folder.is_dir())
ROWS = [
    [cell.strip(" *") for cell in line.split("|")[1:-1]]
    for line in Path("README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
]
named = pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)


def comparison_of(folder):
    return read_comparison(f"train/configs/compare/{folder.name}.yaml")


def kept_runs(folder):
    """For every model and seed, what the run's all_results.json holds."""
    results = {}
    for path in sorted(folder.glob("*/seed-*/all_results.json")):
        seed = int(path.parent.name.removeprefix("seed-"))
        results.setdefault(path.parent.parent.name, {})[seed] = json.loads(path.read_text())
    return results


@named
def test_the_readme_says_what_the_kept_runs_found(folder):
    comparison = comparison_of(folder)
    summary = summarize(comparison.metric, comparison.config, kept_runs(folder), {}, {})
    assert summary["models"]
    for name, model in summary["models"].items():
        by_seed = ", ".join(number(value) for value in model["values"].values())
        said = {f"{model['parameters']:,}", f"{model['state_bytes']:,}", by_seed}
        assert any(said <= set(row) for row in ROWS), (name, said)


@named
def test_a_kept_run_is_one_of_the_comparison(folder):
    comparison = comparison_of(folder)
    config = yaml.safe_load(Path(comparison.config).read_text(encoding="utf-8"))
    for path in folder.glob(f"*/seed-*/{OPTIONS_FILE}"):
        model, seed = path.parent.parent.name, int(path.parent.name.removeprefix("seed-"))
        run = json.loads(path.read_text())
        assert run["config"] == config
        options = dict(zip(*[iter(run["options"])] * 2, strict=True))
        # Beside the comparison's own options, a run may have been told where its data are.
        comparison.options = {name: options[f"--{name}"] for name in ("dataset_name", "dataset_config")}
        rate = float(options["--learning_rate"])
        assert rate in comparison.learning_rates
        assert comparison.command_line(model, seed, path.parent, learning_rate=rate)[1:] == run["options"]
