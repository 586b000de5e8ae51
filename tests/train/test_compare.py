import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_ind

from train import image_classification
from train.compare import best_learning_rate, compare, main, parse
from train.comparison import options_of
from train.comparison_report import number, pairwise_tests, summarize, table
from train.learning_rates import rate_beyond, search

MODELS = {"enn": None, "gru": {"architecture": "gru"}, "lstm": {"architecture": "lstm"}}


def comparison_file(folder, **entries):
    path = folder / "comparison.yaml"
    values = {
        "recipe": "image_classification",
        "config": "train/configs/debug_images.yaml",
        "metric": "test_accuracy",
        "output_dir": str(folder / "results"),
        "seeds": [1, 2],
        "options": {"parameters": 7036},
        "models": MODELS,
        **entries,
    }
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return str(path)


SHORT = ["--num_train_epochs", "2", "--save_strategy", "epoch", "--disable_tqdm", "true"]


def test_models_are_compared_on_equal_terms(tmp_path, capsys):
    summary = compare(parse([comparison_file(tmp_path), *SHORT]))
    folder = tmp_path / "results"
    assert summary == json.loads((folder / "comparison.json").read_text())
    assert (folder / "comparison.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert (folder / "comparison.md").read_text() in printed

    for name, model in summary["models"].items():
        runs = [json.loads((folder / name / f"seed-{seed}" / "all_results.json").read_text()) for seed in (1, 2)]
        assert model["values"] == {"1": runs[0]["test_accuracy"], "2": runs[1]["test_accuracy"]}
        assert model["mean"] == pytest.approx(np.mean([run["test_accuracy"] for run in runs]))
        assert model["std"] == pytest.approx(np.std([run["test_accuracy"] for run in runs], ddof=1))
        assert abs(model["parameters"] - 7036) <= 0.02 * 7036
        assert f"{model['mean']:.4f}" in printed
    assert [test["models"] for test in summary["tests"]] == [["enn", "gru"], ["enn", "lstm"], ["gru", "lstm"]]


def test_finished_runs_are_not_repeated_and_a_cut_one_goes_on(tmp_path, capsys, monkeypatch):
    path = comparison_file(tmp_path, models={"gru": {"architecture": "gru"}}, seeds=[1, 2, 3])
    first = parse([path, "--seeds", "1", *SHORT])
    values = compare(first)["models"]["gru"]["values"]

    # The run of seed 2 is cut short after its first epoch.
    comparison = parse([path, *SHORT])
    cut = comparison.command_line("gru", 2, comparison.folder("gru", 2))
    trainer, _ = image_classification.build_trainer(*image_classification.parse([*cut, "--max_steps", "9"]))
    trainer.train()
    done = []
    run = image_classification.run

    def counted(*arguments, command):
        assert command.startswith("python -m train.image_classification train/configs/debug_images.yaml ")
        done.append((arguments[2].seed, arguments[2].resume_from_checkpoint))
        return run(*arguments, command=command)

    monkeypatch.setattr(image_classification, "run", counted)
    capsys.readouterr()
    summary = compare(parse([path, *SHORT]))
    assert done == [(2, "true"), (3, None)]
    printed = capsys.readouterr().out
    assert "gru, seed 1\nHas finished." in printed
    assert "Going on from" in printed
    assert summary["models"]["gru"]["values"]["1"] == values["1"]


@pytest.mark.slow
def test_every_model_runs_at_the_learning_rate_that_was_best_for_it(tmp_path, capsys):
    search = {"learning_rates": [1e-5, 1e-3], "search_options": {"max_steps": 4}}
    path = comparison_file(tmp_path, models={"enn": None, "gru": {"architecture": "gru"}}, metric="test_loss", **search)
    searches = compare(parse([path, *SHORT]))["learning_rate_searches"]
    printed = capsys.readouterr().out
    assert set(searches) == {"enn", "gru"}
    columns = sorted({rate for search in searches.values() for rate in search["scores"]}, key=float)
    for name, search in searches.items():
        folder = tmp_path / "results" / name
        tried = {
            path.parent.name.removeprefix("learning-rate-"): json.loads(path.read_text())["validation_loss"]
            for path in folder.glob("learning-rate-*/all_results.json")
        }
        assert search["scores"] == tried
        # Beyond the grid, whose best rate is the highest: ten times too high a rate must be worse in the end.
        rates = list(tried)
        assert {"1e-05", "0.001", "0.1"} <= set(rates) <= {"1e-05", "0.001", "0.1", "10", "1000"}
        best = min(rates, key=tried.get)
        assert best not in ("1e-05", max(rates, key=float))
        assert search["best"] == float(best)
        row = " | ".join(number(tried[rate]) if rate in tried else "" for rate in columns)
        assert f"| {name} | {row} | " in printed
        for seed in ("1", "2"):
            history = json.loads((folder / f"seed-{seed}" / "trainer_state.json").read_text())["log_history"]
            assert max(entry.get("learning_rate", 0) for entry in history) == pytest.approx(search["best"], rel=0.2)


def test_a_search_goes_on_beyond_the_end_of_a_grid():
    grid = [6e-3, 1.5e-3, 3e-3]
    assert rate_beyond(grid, 1.5e-3) == 7.5e-4
    assert rate_beyond(grid, 6e-3) == 1.2e-2
    assert rate_beyond(grid, 3e-3) is None
    assert rate_beyond([3e-3], 3e-3) is None


@pytest.mark.parametrize(
    ("optimum", "rates"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3]),
        (5e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
        (3e-4, [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),  # three beyond are the most
    ],
)
def test_a_search_ends_where_a_rate_is_worse(optimum, rates):
    def distance(rate):
        return abs(np.log(rate / optimum))

    found = search([1e-3, 4e-3, 2e-3], distance, best=lambda scores: min(scores, key=scores.get))
    assert found == {rate: distance(rate) for rate in rates}
    assert list(found) == rates


def test_a_loss_by_place_is_better_when_lower():
    assert best_learning_rate("test_restarted_loss_from_256", {0.1: 5.0, 0.01: 4.0}) == 0.01


def test_typed_options_replace_those_of_the_file_and_of_its_models(tmp_path):
    own = {"gru": {"architecture": "gru", "hidden_dropout": 0.3}}
    path = comparison_file(tmp_path, models=own, options={"hidden_dropout": 0.2, "num_train_epochs": 3})
    comparison = parse([path, "--hidden_dropout", "0.1", "--image_mean", "0.5"])
    argv = comparison.command_line("gru", 1, comparison.folder("gru", 1))
    typed = image_classification.parse(argv)
    assert (typed[0].hidden_dropout, typed[0].architecture, typed[2].num_train_epochs) == (0.1, "gru", 3)
    assert argv.count("--hidden_dropout") == 1


def test_typed_options_replace_those_of_a_search(tmp_path):
    search = {"learning_rates": [1e-2, 1e-4], "search_options": {"max_steps": 40}}
    path = comparison_file(tmp_path, models={"gru": {"architecture": "gru"}}, **search)
    compare(parse([path, *SHORT, "--seeds", "1", "--max_steps", "2"]))
    states = list((tmp_path / "results").glob("gru/*/trainer_state.json"))
    assert len(states) >= 3
    assert {json.loads(state.read_text())["max_steps"] for state in states} == {2}


@pytest.mark.slow
def test_seeds_can_be_run_one_by_one_after_one_search(tmp_path, capsys):
    gru = {"gru": {"architecture": "gru"}}
    search = {"learning_rates": [1e-2, 1e-4], "search_options": {"max_steps": 4}}
    path = comparison_file(tmp_path, models=gru, **search)
    compare(parse([path, *SHORT, "--seeds", "2"]))
    compare(parse([path, *SHORT, "--seeds", "1"]))
    assert capsys.readouterr().out.count("Has finished.") >= 2
    both = compare(parse([path, "--finished_only"]))
    assert set(both["models"]["gru"]["values"]) == {"1", "2"}
    assert {"0.01", "0.0001"} <= set(both["learning_rate_searches"]["gru"]["scores"])


def test_finished_runs_are_reported_without_making_others(tmp_path, monkeypatch, capsys):
    path = comparison_file(tmp_path)
    with pytest.raises(SystemExit):
        main([path, "--finished_only"])
    assert re.search(r"output_dir is '.*', where no run of these models and seeds", capsys.readouterr().err)
    compare(parse([path, *SHORT, "--models", "gru"]))
    compare(parse([path, *SHORT, "--models", "lstm", "--seeds", "2"]))
    monkeypatch.setattr(image_classification, "run", None)
    summary = compare(parse([path, "--finished_only"]))
    assert {name: list(model["values"]) for name, model in summary["models"].items()} == {
        "gru": ["1", "2"],
        "lstm": ["2"],
    }


def test_a_search_is_reported_before_its_runs(tmp_path, capsys):
    path = comparison_file(tmp_path, learning_rates=[1e-2, 1e-4], seeds=[1])
    compare(parse([path, *SHORT, "--models", "gru"]))
    kept = tmp_path / "results" / "gru"
    shutil.copytree(kept, tmp_path / "results" / "lstm", ignore=shutil.ignore_patterns("seed-*"))
    capsys.readouterr()
    summary = compare(parse([path, "--finished_only"]))
    assert set(summary["models"]) == {"gru"}
    assert summary["learning_rate_searches"]["lstm"] == summary["learning_rate_searches"]["gru"]
    assert capsys.readouterr().out.count("| lstm |") == 1


def test_the_rates_of_another_comparison_are_taken_without_a_search(tmp_path, capsys):
    path = comparison_file(tmp_path, learning_rates=[1e-2, 1e-4], seeds=[1], models={"gru": {"architecture": "gru"}})
    best = compare(parse([path, *SHORT]))["learning_rate_searches"]["gru"]["best"]
    larger = ["--output_dir", str(tmp_path / "larger"), "--parameters", "20000"]
    summary = compare(parse([path, *SHORT, *larger, "--learning_rates_of", str(tmp_path / "results")]))
    assert summary["models"]["gru"]["parameters"] == pytest.approx(20000, rel=0.02)
    assert summary["learning_rate_searches"] == {}
    (options,) = (tmp_path / "larger" / "gru").glob("*/options.json")
    asked = json.loads(options.read_text())["options"]
    assert float(asked[asked.index("--learning_rate") + 1]) == best

    path = comparison_file(tmp_path, learning_rates=[1e-2, 1e-4], seeds=[1])
    with pytest.raises(SystemExit):
        main([path, *SHORT, *larger, "--learning_rates_of", str(tmp_path / "results")])
    message = r"learning_rates_of is '.*results', where none have been searched for enn, lstm; allowed: .*\['gru'\]"
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_report_of_finished_runs_takes_no_options_of_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([comparison_file(tmp_path), "--finished_only", "--num_train_epochs", "99"])
    assert "finished_only is True; allowed: without options of the recipe" in capsys.readouterr().err


def test_a_mistyped_option_leaves_the_folder_free(tmp_path):
    path = comparison_file(tmp_path, models={"gru": {"architecture": "gru"}}, seeds=[1])
    with pytest.raises(SystemExit):
        compare(parse([path, *SHORT, "--hiden_dropout", "0.1"]))
    compare(parse([path, *SHORT, "--hidden_dropout", "0.1"]))


def test_the_test_images_never_choose_the_rate(tmp_path, capsys):
    path = comparison_file(tmp_path, learning_rates=[0.1, 0.01], options={"validation_fraction": 0})
    with pytest.raises(SystemExit):
        main([path, *SHORT])
    assert "validation_fraction is 0" in capsys.readouterr().err


def test_a_run_that_diverged_is_never_the_best():
    assert best_learning_rate("test_loss", {0.1: float("nan"), 0.01: 3.0, 0.001: 4.0}) == 0.01
    assert best_learning_rate("test_accuracy", {0.1: float("nan"), 0.01: 0.3, 0.001: 0.4}) == 0.001


def test_a_folder_with_other_options_is_refused(tmp_path):
    path = comparison_file(tmp_path, models={"gru": {"architecture": "gru"}}, seeds=[1])
    compare(parse([path, *SHORT]))
    with pytest.raises(ValueError, match=r"holds a run with other options .*: choose another output_dir, or delete it"):
        compare(parse([path, *SHORT, "--learning_rate", "1e-4"]))


def test_a_folder_made_with_another_config_is_refused(tmp_path):
    config = tmp_path / "config.yaml"
    entries = yaml.safe_load(Path("train/configs/debug_images.yaml").read_text())
    config.write_text(yaml.safe_dump(entries))
    path = comparison_file(tmp_path, config=str(config), models={"gru": {"architecture": "gru"}}, seeds=[1])
    compare(parse([path, *SHORT]))
    config.write_text("# A comment changes nothing.\n" + yaml.safe_dump(entries))
    compare(parse([path, *SHORT]))
    config.write_text(yaml.safe_dump({**entries, "learning_rate": 1e-4}))
    with pytest.raises(ValueError, match=r"holds a run with other options"):
        compare(parse([path, *SHORT]))


def test_an_unknown_metric_is_refused(tmp_path):
    path = comparison_file(tmp_path, models={"gru": {"architecture": "gru"}}, seeds=[1], metric="test_f1_accuracy")
    with pytest.raises(ValueError, match=r"metric is 'test_f1_accuracy'; allowed: one of \['epoch', .*'test_accuracy'"):
        compare(parse([path, *SHORT]))


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        ({"recipe": "speech"}, [], "recipe is 'speech'; allowed: one of"),
        ({"metric": None}, [], "allowed: .*'metric'"),
        ({"colour": "red"}, [], "has the entries .*'colour'"),
        ({"metric": "accuracy"}, [], "metric is 'accuracy'; allowed: a name that begins with 'test_'"),
        ({"metric": "test_f1"}, [], r"metric is 'test_f1'; allowed: a name with one of \('loss', 'perplexity'\)"),
        ({}, ["--seed", "9"], "seed is 9; allowed: only what --seeds gives every run"),
        (
            {"learning_rates": [0.1, 0.01]},
            ["--learning_rate", "1"],
            "learning_rate is 1; allowed: only what the file's learning_rates gives every run",
        ),
        ({"seeds": []}, [], r"seeds is \[\]: give at least one of each"),
        ({}, ["--models", "mamba"], r"models has \['mamba'\]; allowed: \['enn', 'gru', 'lstm'\]"),
    ],
)
def test_a_wrong_comparison_is_refused(entries, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse([comparison_file(tmp_path, **entries), *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_seeds_are_the_replicates_of_the_tests():
    values = {"a": [0.95, 0.96, 0.955], "b": [0.97, 0.975, 0.972], "c": [0.954, 0.957, 0.95]}
    tests = {tuple(test["models"]): test for test in pairwise_tests(values)}
    for (first, second), test in tests.items():
        assert test["p"] == pytest.approx(ttest_ind(values[first], values[second], equal_var=False).pvalue)
        assert test["difference"] == pytest.approx(np.mean(values[first]) - np.mean(values[second]))
    # Holm: the smallest p times 3, the next times 2, the largest as it is, never falling.
    ordered = sorted(tests.values(), key=lambda test: test["p"])
    p = [test["p"] for test in ordered]
    expected = np.maximum.accumulate(np.minimum(1, [3 * p[0], 2 * p[1], p[2]]))
    assert [test["p_holm"] for test in ordered] == pytest.approx(expected.tolist())


def test_the_table_tells_losses_by_what_was_read_before_and_the_speed():
    def run(loss):
        found = {"test_loss": loss, "parameters": 1000, "state_bytes": 8, "train_seconds": 2}
        by_place = {place: {"loss": loss + 1 / (place + 1), "tokens": 1234 + place} for place in (0, 64)}
        return (
            found
            | {"train_tokens_per_second": 1500 * loss}
            | {
                f"test_restarted_{kind}_from_{place}": value
                for place, values in by_place.items()
                for kind, value in values.items()
            }
        )

    results = {"gru": {1: run(4.0), 2: run(5.0)}, "lstm": {1: run(6.0)}}
    printed = table(summarize("test_loss", "config.yaml", results, {}, {}))
    assert "| from 0 (1,234 tokens) | from 64 (1,298 tokens) | tokens/s in training |" in printed
    assert "| gru | 5.500 | 4.515 | 6,750 |" in printed
    assert "| lstm | 7.000 | 6.015 | 9,000 |" in printed


def test_one_seed_gives_no_p_value():
    assert all(np.isnan(test["p"]) and np.isnan(test["p_holm"]) for test in pairwise_tests({"a": [0.9], "b": [0.8]}))


@pytest.mark.filterwarnings("error")
def test_pairs_without_a_p_value_leave_the_others_as_they_are():
    values = {"a": [0.9, 0.9], "b": [0.9, 0.9], "c": [0.5, 0.501], "d": [0.7]}
    tests = {"".join(test["models"]): test for test in pairwise_tests(values)}
    assert (tests["ab"]["p"], tests["ab"]["p_holm"]) == (1, 1)
    assert tests["ac"]["p"] == tests["bc"]["p"] < 0.001
    assert tests["ac"]["p_holm"] == tests["bc"]["p_holm"] == 3 * tests["ac"]["p"]  # of three pairs
    assert all(np.isnan(tests[pair]["p_holm"]) for pair in ("ad", "bd", "cd"))


def test_of_an_option_given_twice_the_last_counts():
    options = ["--max_steps", "5", "--seed_note", "a", "b", "--max_steps", "2"]
    assert options_of(options) == {"max_steps": ["2"], "seed_note": ["a", "b"]}
