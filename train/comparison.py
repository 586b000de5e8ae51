"""What a comparison is: the file that `train.compare` reads, and the command lines of the runs that it asks for."""

import importlib
import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from .arguments import require

RECIPES = ("image_classification", "language_model")
LOWER_IS_BETTER, HIGHER_IS_BETTER = ("loss", "perplexity"), ("accuracy",)
OPTIONAL_ENTRIES = {"options", "learning_rates", "search_options"}
SEARCH_FOLDER = "learning-rate-"


class Refused(ValueError):
    """A run that cannot be part of a comparison."""


def recipe_module(recipe: str) -> ModuleType:
    """The module of one of `RECIPES`: its `parse`, `build_trainer` and `run`."""
    return importlib.import_module(f"{__package__}.{recipe}")


def require_validation_data(data_args: Any) -> None:
    """Refuse to choose anything by the validation data where these may be the test split.

    Args:
        data_args: the recipe's options of its data.

    Raises:
        Refused: `validation_fraction` is 0.
    """
    if data_args.validation_fraction == 0:
        raise Refused(
            "validation_fraction is 0, so that the test split may validate; allowed: more than 0 where the validation "
            "data choose."
        )


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
        search_options: options of the runs that search the grid, which replace all others.
        search_seed: of the runs that search the grid: the file's first, whatever seeds are chosen later.
        typed: options of all runs that replace those of the file, its models included.
        learning_rates_of: output_dir of another comparison, whose searches give the rates.
        finished_only: make no runs.
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
    search_seed: int = field(init=False)
    typed: dict[str, list[str]] = field(init=False, default_factory=dict)
    learning_rates_of: str | None = field(init=False, default=None)
    finished_only: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        require(self, "recipe", self.recipe in RECIPES, f"one of {RECIPES}")
        if not self.models or not self.seeds:
            raise ValueError(f"models is {self.models!r}, seeds is {self.seeds!r}: give at least one of each.")
        require(self, "metric", self.metric.startswith("test_"), "a name that begins with 'test_'")
        known = any(word in self.metric for word in LOWER_IS_BETTER + HIGHER_IS_BETTER)
        better = f"a name with one of {LOWER_IS_BETTER}, of which less is better, or {HIGHER_IS_BETTER}"
        require(self, "metric", known, better)
        self.search_seed = self.seeds[0]

    def choose(self, models: list[str]) -> None:
        """Keep only some models."""
        unknown = sorted(set(models) - set(self.models))
        if unknown:
            raise ValueError(f"models has {unknown}; allowed: {sorted(self.models)}.")
        self.models = {name: self.models[name] for name in models}

    def replace_options(self, typed: dict[str, list[str]]) -> None:
        """Take options for all runs in place of the file's."""
        fixed = {"seed": "--seeds"} | ({"learning_rate": "the file's learning_rates"} if self.learning_rates else {})
        for name in sorted(fixed.keys() & typed):
            raise ValueError(f"{name} is {' '.join(typed[name])}; allowed: only what {fixed[name]} gives every run.")
        self.typed = typed

    def folder(self, model: str, seed: int) -> Path:
        """Where a run goes."""
        return Path(self.output_dir, model, f"seed-{seed}")

    def search_folder(self, model: str, learning_rate: float) -> Path:
        """Where a run goes that tries a learning rate."""
        return Path(self.output_dir, model, f"{SEARCH_FOLDER}{learning_rate:g}")

    @property
    def validation_metric(self) -> str:
        """The metric on the validation data."""
        return "validation_" + self.metric.removeprefix("test_")

    def command_line(self, model: str, seed: int, folder: Path, **options: Any) -> list[str]:
        """The arguments of a run.

        Args:
            model: its name.
            seed: of weights, order and dropout.
            folder: where it goes.
            **options: further options of this run.
        """
        # Typed options come twice: for their place among the others, which a run's record holds, and to win.
        own = {**self.options, **self.typed, **self.models[model], **self.typed}
        options = {**own, **options, "seed": seed, "output_dir": folder}
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
    known = {entry.name for entry in fields(Comparison) if entry.init}
    if not isinstance(entries, dict) or set(entries) - known or known - OPTIONAL_ENTRIES - set(entries):
        raise ValueError(
            f"{path} has the entries {sorted(entries)}; allowed: {sorted(known)} "
            f"({', '.join(sorted(OPTIONAL_ENTRIES))} may lack)."
        )
    return Comparison(**{**entries, "models": {name: values or {} for name, values in entries["models"].items()}})


def options_of(arguments: list[str]) -> dict[str, list[str]]:
    """`--name value ...` as a dictionary, for the recipe to check; of a name given twice the last, as in argparse."""
    options: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            values = options[argument.removeprefix("--")] = []
        elif options:
            values.append(argument)
        else:
            raise ValueError(f"unrecognized argument: {argument}")
    return options
