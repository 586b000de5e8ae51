"""The command line of a recipe: a YAML file with options, and options that replace its values."""

import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

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
    options = {action.dest: action for action in reversed(parser._actions)}  # --x, not the --no_x that follows it
    del options["config"], options["help"]
    for group in groups:
        for name, kind in get_type_hints(group).items():
            if NoneType in get_args(kind) and name in options and options[name].nargs is None:
                options[name].type = or_none(options[name].type)
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    try:
        if config is not None:
            parser.set_defaults(**read_options(config, options))
        *arguments, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return tuple(arguments)


def or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """What an option reads with `convert`, or `None` where that is what was typed."""

    def read(text: str) -> Any:
        return None if text == "None" else convert(text)

    read.__name__ = getattr(convert, "__name__", str(convert))  # which argparse names when it refuses a text
    return read


def read_options(path: str, options: dict[str, Action]) -> dict[str, Any]:
    """The options in a YAML file; numbers as text, so that the parser checks them like those typed by hand.

    Args:
        path: of the file.
        options: the known ones, by name.

    Raises:
        ValueError: the file holds something else than known options, or truth values for what is none.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r}; allowed: lines of `option: value`.")
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ValueError(f"{path} has the unknown options {unknown}; --help lists the known ones.")
    for name, value in values.items():
        if isinstance(value, bool) and options[name].nargs != "?":  # which options of truth values have
            raise ValueError(f"{name} is {value} in {path}, as YAML reads yes and no; allowed: a text, in quotes.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        lists = options[name].nargs == "+" and value is not None and not isinstance(value, list)
        values[name] = [options[name].type(value)] if lists else value
    return values


def require(options: Any, name: str, holds: bool, allowed: str) -> None:
    """Refuse an option's value.

    Args:
        options: what holds the option.
        name: the option.
        holds: whether its value is allowed.
        allowed: the values that are.

    Raises:
        ValueError: it is not.
    """
    if not holds:
        raise ValueError(f"{name} is {getattr(options, name)!r}; allowed: {allowed}.")
