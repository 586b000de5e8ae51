"""The README's tables of comparisons say what the runs that are kept in docs/results found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import table_cells

from train import compare
from train.compare import OPTIONS_FILE
from train.comparison_report import number, summarize
from train.learning_rates import rate_beyond

COMPARISONS = Path("train/configs/compare")
OTHER_RUNS = {"recall"}  # of benchmarks.recall: tests/test_recall_results.py
KEPT = sorted(path for path in Path("docs/results").iterdir() if path.is_dir() and path.name not in OTHER_RUNS)
# Comparisons by the file of another: what was typed, but for where the data are.
ONE_SEED = ["--models", "paper", "engram_gru", "mixer", "hybrid", "transformer", "gru", "lstm", "--seeds", "1"]
SHORTER = ["--max_steps", "1221", "--learning_rates_of", "docs/results/wikitext103"]
VARIANTS = {"wikitext2": ["wikitext103.yaml", *ONE_SEED, "--dataset_config", "wikitext-2-raw-v1", *SHORTER]}
README = Path("README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())
ROWS = [table_cells(line) for line in README.splitlines() if line.startswith("|")]


def command_of(folder):
    """What was typed for the runs that a folder holds: the comparison's file, then options."""
    file, *options = VARIANTS.get(folder.name, [f"{folder.name}.yaml"])
    return [str(COMPARISONS / file), *options]


def comparison_of(folder):
    return compare.parse(command_of(folder))


def of_folders(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


kept = of_folders(KEPT)
kept_searches = of_folders([folder for folder in KEPT if comparison_of(folder).learning_rates])


def kept_runs(folder):
    """For every model and seed, what the run's all_results.json holds."""
    results = {}
    for path in sorted(folder.glob("*/seed-*/all_results.json")):
        seed = int(path.parent.name.removeprefix("seed-"))
        results.setdefault(path.parent.parent.name, {})[seed] = json.loads(path.read_text())
    return results


def options_of(folder):
    """What a run was asked, by name."""
    return dict(zip(*[iter(json.loads((folder / OPTIONS_FILE).read_text())["options"])] * 2, strict=True))


def summary_of(folder):
    """What the kept runs of a comparison found."""
    comparison = comparison_of(folder)
    return summarize(comparison.metric, comparison.config, kept_runs(folder), {}, {})


def beside(summary, name, other):
    """A mean as a share of another, with the p-value where both have several seeds, as README writes them."""
    ratio = summary["models"][name]["mean"] / summary["models"][other]["mean"]
    (p,) = (test["p_holm"] for test in summary["tests"] if set(test["models"]) == {name, other})
    return f"{ratio:.2f}" if np.isnan(p) else f"{ratio:.2f} (p = {p:.1g})"


@kept
def test_the_readme_says_what_the_kept_runs_found(folder):
    comparison, summary = comparison_of(folder), summary_of(folder)
    assert summary["models"]
    for name, model in summary["models"].items():
        by_seed = ", ".join(number(value) for value in model["values"].values())
        said = {f"{model['parameters']:,}", f"{model['state_bytes']:,}", f"{model['seconds']:,.0f}", by_seed}
        if len(model["values"]) > 1:
            said.add(f"{number(model['mean'])} ± {number(model['std'], of_size=model['mean'])}")
        if comparison.recipe == "language_model" and "lstm" in summary["models"].keys() - {name}:
            said.add(beside(summary, name, "lstm"))
        assert any(said <= set(row) for row in ROWS), (name, said)
        by_place = {f"{loss:.3f}" for loss in model.get("loss_by_tokens_before", {}).values()}
        assert any(by_place <= set(row) for row in ROWS), (name, by_place)
    made, wanted = sum(len(runs) for runs in kept_runs(folder).values()), len(comparison.models) * len(comparison.seeds)
    assert made == wanted or f"{made} of {wanted} runs" in PROSE


def test_the_readme_says_how_models_of_text_compare():
    summary = summary_of(Path("docs/results/wikitext103"))
    ratio, _, p = beside(summary, "mixer", "transformer").partition(" ")
    assert f"at {ratio} times the Transformer's {p};" in PROSE
    first, _, _ = beside(summary, "mixer_token_memory", "lstm_token_memory").partition(" ")
    second, _, _ = beside(summary, "engram_gru_token_memory", "lstm_token_memory").partition(" ")
    assert f"With the memory equal, the mixer is at {first} times the LSTM's and the cell at {second} (" in PROSE
    ratio, _, _ = beside(summary, "engram_gru", "paper").partition(" ")
    assert f"which a GRU and sharper recall take to {ratio} times its perplexity" in PROSE


@kept
def test_the_table_beside_the_kept_runs_is_what_the_command_prints(folder, tmp_path, capsys):
    copied = shutil.copytree(folder, tmp_path / folder.name)
    file = command_of(folder)[0]
    compare.main([file, "--output_dir", str(copied), "--finished_only"])
    assert (folder / "comparison.md").read_text() in capsys.readouterr().out
    assert (folder / "comparison.png").is_file()


@kept
def test_a_kept_run_is_one_of_the_comparison(folder):
    comparison = comparison_of(folder)
    config = yaml.safe_load(Path(comparison.config).read_text(encoding="utf-8"))
    own_options, runs = comparison.options, list(folder.glob(f"*/*/{OPTIONS_FILE}"))
    assert runs
    for path in runs:
        model, (kind, _, number) = path.parent.parent.name, path.parent.name.rpartition("-")
        run = json.loads(path.read_text())
        assert run["config"] == config
        options = options_of(path.parent)
        # Beside the comparison's own options, a run may have been told where its data are.
        where = {name: options.get(f"--{name}") for name in ("dataset_name", "dataset_config")}
        comparison.options = own_options | {name: value for name, value in where.items() if value is not None}
        rate = {"learning_rate": float(options["--learning_rate"])} if comparison.learning_rates else {}
        if kind == "seed":
            seed, search = int(number), {}
        else:  # one of the runs that find the rate
            assert rate["learning_rate"] == float(number)
            seed, search = comparison.seeds[0], comparison.search_options
        assert comparison.command_line(model, seed, path.parent, **search, **rate)[1:] == run["options"]


@kept_searches
def test_kept_runs_have_the_best_rate_of_those_that_were_tried(folder):
    searches = Path(comparison_of(folder).learning_rates_of or folder)
    for model, runs in kept_runs(folder).items():
        losses = {
            float(path.parent.name.removeprefix("learning-rate-")): json.loads(path.read_text())["validation_loss"]
            for path in searches.glob(f"{model}/learning-rate-*/all_results.json")
        }
        best = min(losses, key=losses.get)
        assert set(losses) >= set(comparison_of(folder).learning_rates)
        assert rate_beyond(losses, best) is None
        for seed in runs:
            assert float(options_of(folder / model / f"seed-{seed}")["--learning_rate"]) == best


def test_the_readme_says_what_the_shipped_checkpoint_reaches():
    card = Path("model_cards/enn-wikitext103-mixer")
    results = json.loads((card / "all_results.json").read_text())
    (said,) = (text for name, text in (row[:2] for row in ROWS) if name == "quality, text")
    assert f"**{number(results['test_word_perplexity'])}**" in said
    assert f"{results['parameters']:,} parameters" in said
    # Trained with what the preset says.
    preset = yaml.safe_load(Path("train/configs/wikitext103_mixer.yaml").read_text(encoding="utf-8"))
    arguments = json.loads((card / "run.json").read_text())["arguments"]
    told = arguments.keys() & preset.keys()
    assert {"detokenized", "max_steps", "learning_rate"} <= told
    assert {name: arguments[name] for name in told} == {name: preset[name] for name in told}
