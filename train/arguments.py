"""The command line of a recipe: a YAML file with options, and options that replace its values."""

import dataclasses
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with defaults, below the recipe's own text as it stands."""


def parse_arguments(recipe: str, text: str, groups: tuple[type, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Read the command line of `python -m train.<recipe>`.

    Args:
        recipe: name of the recipe's module.
        text: what `--help` says first.
        groups: dataclasses whose fields are the options.
        argv: the arguments; `None` takes those of this process.

    Returns:
        one instance of every group.
    """
    parser = HfArgumentParser(
        groups,
        prog=f"python -m train.{recipe}",
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=text,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file with options")
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    try:
        if config is not None:
            parser.set_defaults(**read_options(config, groups))
        *arguments, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return tuple(arguments)


def read_options(path: str, groups: tuple[type, ...]) -> dict[str, Any]:
    """The options in a YAML file; numbers as text, so that the parser checks them like those typed by hand.

    Raises:
        ValueError: the file holds something else than known options.
    """
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds {options!r}; allowed: lines of `option: value`.")
    known = {option.name for group in groups for option in dataclasses.fields(group)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has the unknown options {unknown}; --help lists the known ones.")
    return {name: str(value) if type(value) in (int, float) else value for name, value in options.items()}
