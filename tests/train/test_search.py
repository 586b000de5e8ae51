import re

import optuna
import pytest
import yaml

from train import image_classification
from train.search import main

IMAGES = [
    "image_classification",
    "train/configs/debug_images.yaml",
    "--num_train_epochs",
    "1",
    "--disable_tqdm",
    "true",
]
TEXT = ["language_model", "train/configs/debug.yaml", "--max_steps", "6", "--eval_steps", "3", "--disable_tqdm", "true"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [IMAGES, TEXT], ids=["images", "text"])
def test_a_search_tries_its_space_goes_on_and_leaves_options_of_the_recipe(recipe, tmp_path, capsys):
    options = [*recipe, "--output_dir", str(tmp_path)]
    main([*options, "--trials", "2"])
    main([*options, "--trials", "3"])
    assert "2 of 3 trials are done" in capsys.readouterr().out
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert len(study.trials) == 3
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert best == study.best_params
    assert set(best) == {"hebbian_lr", "recall_temperature", "memory_size"}
    assert study.best_value == min(trial.value for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    if recipe is IMAGES:
        typed = [text for name, value in best.items() for text in (f"--{name}", str(value))]
        assert image_classification.parse([recipe[1], *typed])[0].memory_size == best["memory_size"]


def test_constants_reach_the_model(tmp_path, monkeypatch):
    made = []
    make = image_classification.make_model

    def noted(args, *rest, **fields):
        made.append(args.trace_scale)
        return make(args, *rest, **fields)

    monkeypatch.setattr(image_classification, "make_model", noted)
    main([*IMAGES, "--output_dir", str(tmp_path), "--trials", "2", "--space", "trace_scale"])
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert made[-2:] == [trial.params["trace_scale"] for trial in study.trials]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*IMAGES, "--architecture", "gru"], "architecture is 'gru'; allowed: 'enn', whose memory is searched"),
        ([*IMAGES, "--space", "colour"], "invalid choice: 'colour'"),
        ([*IMAGES, "--validation_fraction", "0"], "validation_fraction is 0, so that the test split may validate"),
        (["speech"], "invalid choice: 'speech'"),
    ],
)
def test_a_wrong_search_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert re.search(message, capsys.readouterr().err)


def test_trials_of_something_else_are_not_mixed_in(tmp_path, capsys):
    options = [*IMAGES, "--output_dir", str(tmp_path)]
    main([*options, "--trials", "1", "--space", "hebbian_lr"])
    for others, message in (
        ([*options, "--space", "memory_size"], r"space is \['memory_size'\], but output_dir holds .* \['hebbian_lr'\]"),
        ([*options, "--space", "hebbian_lr", "--learning_rate", "1"], "options is .* but output_dir holds trials with"),
    ):
        with pytest.raises(SystemExit):
            main(others)
        assert re.search(message, capsys.readouterr().err)


def test_a_config_with_early_stopping_can_be_searched(tmp_path):
    small = ["--dataset_name", "tests/fixtures/shapes", "--image_size", "8", "--num_train_epochs", "1"]
    paper = ["image_classification", "train/configs/paper_mnist_rows.yaml", *small, "--disable_tqdm", "true"]
    main([*paper, "--output_dir", str(tmp_path), "--trials", "1", "--space", "hebbian_lr"])
    assert set(yaml.safe_load((tmp_path / "best.yaml").read_text())) == {"hebbian_lr"}
