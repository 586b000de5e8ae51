"""Search for the constants of an ENN's memory that train best, with optuna.

    python -m train.search image_classification train/configs/mnist_rows.yaml --trials 20 --num_train_epochs 2
    python -m train.search language_model train/configs/wikitext2.yaml --space hebbian_lr memory_size

Takes a recipe and its options. Every trial trains a model with constants of its own from the space, and the loss on
the validation data decides; a trial that is behind the median of the others is given up, but early stopping is left
out. Trials are kept in output_dir/search.db: the same command goes on with what is left to do, and another --trials
with more of them. At the end output_dir/best.yaml holds the best constants, as options of the recipe.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml

from .arguments import require
from .comparison import RECIPES, recipe_module, require_validation_data

SPACE: dict[str, Callable[[optuna.Trial], Any]] = {
    "hebbian_lr": lambda trial: trial.suggest_float("hebbian_lr", 0.005, 0.5, log=True),
    "trace_scale": lambda trial: trial.suggest_float("trace_scale", 0.1, 4.0, log=True),
    "recall_temperature": lambda trial: trial.suggest_float("recall_temperature", 0.05, 2.0, log=True),
    "memory_size": lambda trial: trial.suggest_categorical("memory_size", [16, 32, 64, 128]),
}
DEFAULT_SPACE = ["hebbian_lr", "recall_temperature", "memory_size"]
STUDY = "search"


def search(recipe_name: str, space: list[str], trials: int, options: list[str]) -> dict[str, Any]:
    """Run the trials that are left to do.

    Args:
        recipe_name: one of `RECIPES`.
        space: names in `SPACE`.
        trials: number of trials, those of earlier calls included.
        options: the recipe's command line.

    Returns:
        the best constants.
    """
    recipe = recipe_module(recipe_name)
    of_trials = ["--save_strategy", "no", "--load_best_model_at_end", "false", "--early_stopping_patience", "None"]
    model_args, data_args, training_args = recipe.parse([*options, *of_trials])
    require(model_args, "architecture", model_args.architecture == "enn", "'enn', whose memory is searched")
    require_validation_data(data_args)
    trainer, _ = recipe.build_trainer(model_args, data_args, training_args)
    trainer.model_init = lambda trial: trainer.make_model(
        model_args if trial is None else dataclasses.replace(model_args, **{name: SPACE[name](trial) for name in space})
    )
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder / 'search.db'}"
    study = optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True, direction="minimize")
    remember(study, {"recipe": recipe_name, "space": sorted(space), "options": options, "config": config_of(options)})
    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    done = len(study.get_trials(states=over))
    print(f"{done} of {trials} trials are done.", flush=True)
    if done < trials:
        trainer.hyperparameter_search(
            hp_space=lambda trial: {},
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=trials - done,
            direction="minimize",
            backend="optuna",
            study_name=STUDY,
            storage=storage,
            load_if_exists=True,
        )
    best = optuna.load_study(study_name=STUDY, storage=storage).best_trial
    (folder / "best.yaml").write_text(yaml.safe_dump(best.params))
    print(f"Best of {trials}: {best.params}, with a validation loss of {best.value:.4f}. Saved in {folder}/best.yaml.")
    return best.params


def config_of(options: list[str]) -> Any:
    """What the YAML file on a recipe's command line says; `None` without one."""
    if not options or options[0].startswith("--"):
        return None
    return yaml.safe_load(Path(options[0]).read_text(encoding="utf-8"))


def remember(study: optuna.Study, asked: dict[str, Any]) -> None:
    """Note what a new study was asked.

    Raises:
        ValueError: the study has trials of something else, which these could not be compared with.
    """
    for name, value in asked.items():
        if not study.trials:
            study.set_user_attr(name, value)
        elif study.user_attrs.get(name) != value:
            raise ValueError(
                f"{name} is {value}, but output_dir holds trials with {study.user_attrs.get(name)}: choose another "
                "output_dir, or delete its search.db."
            )


def main(argv: list[str] | None = None) -> None:
    """Read the command line and search."""
    parser = argparse.ArgumentParser(
        prog="python -m train.search",
        usage="%(prog)s recipe [config.yaml] [--trials N] [--space ...] [--option value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", choices=RECIPES, help="the recipe that trains")
    parser.add_argument("--trials", type=int, default=20, help="number of trials (default: %(default)s)")
    parser.add_argument(
        "--space", nargs="+", choices=list(SPACE), default=DEFAULT_SPACE, help="constants to search for"
    )
    args, options = parser.parse_known_args(argv)
    try:
        search(args.recipe, args.space, args.trials, options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
