"""Every config in train/configs is one that its command understands."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from train import image_classification, language_model
from train.comparison import read_comparison

CONFIGS = Path("train/configs")


def named(paths):
    return {"argvalues": sorted(paths), "ids": lambda path: path.stem}


def command_in(config):
    """The first command in the comment of a config."""
    return re.search(r"^# +(?:python|accelerate launch .*?) -m train\.(\w+) (\S+)$", config.read_text(), re.MULTILINE)


def make(arguments):
    """The model of a run, without weights."""
    model_args, data_args, _ = arguments
    with torch.device("meta"):
        if isinstance(data_args, language_model.DataArguments):
            model_args = language_model.with_window(model_args, data_args.block_size)
            fields = {"embedding_size": 1} if model_args.raw_token_ids else {}
            return language_model.make_model(model_args, "language", vocab_size=data_args.vocab_size, **fields)
        return image_classification.make_image_model(model_args, data_args, ["a", "b"])


@pytest.mark.parametrize("config", **named(CONFIGS.glob("*.yaml")))
def test_a_recipes_config_makes_a_model(config):
    recipe, path = command_in(config).groups()
    assert path == str(config)
    parse = {"language_model": language_model, "image_classification": image_classification}[recipe].parse
    arguments = parse([path])
    assert arguments[2].output_dir == f"runs/{config.stem}"
    assert make(arguments).num_parameters() > 0
    # Options that the comment proposes.
    for options in re.findall(r"^# .*?((?: --\w+ \w+)+)$", config.read_text(), re.MULTILINE):
        parse([path, *options.split()])


@pytest.mark.slow
@pytest.mark.parametrize("config", **named(CONFIGS.glob("compare/*.yaml")))
def test_a_comparison_is_on_equal_terms(config):
    recipe, path = command_in(config).groups()
    assert (recipe, path) == ("compare", str(config))
    comparison = read_comparison(path)
    recipe = {"language_model": language_model, "image_classification": image_classification}[comparison.recipe]
    runs = {
        name: recipe.parse(comparison.command_line(name, 1, comparison.folder(name, 1))) for name in comparison.models
    }
    counts = [
        make(arguments).num_parameters(exclude_embeddings=not arguments[0].count_embeddings)
        for arguments in runs.values()
        if arguments[0].parameters is not None
    ]
    if counts:  # but for one file, which repeats the sizes of another work and says so
        assert max(counts) - min(counts) <= 0.04 * min(counts)
    else:
        assert "sizes are his, not equal" in config.read_text()
    assert len({str(arguments[1]) for arguments in runs.values()}) == 1
    schedules = {(args.learning_rate, args.num_train_epochs, args.train_batch_size) for _, _, args in runs.values()}
    assert len(schedules) == 1


@pytest.mark.parametrize("config", **named(CONFIGS.glob("accelerate/*.yaml")))
def test_accelerate_reads_its_configs(config):
    assert command_in(config)
    assert load_config_from_file(str(config)).num_processes == 2
