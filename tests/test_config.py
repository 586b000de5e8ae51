"""EnnConfig: strict about its values, and the same after a trip to disk."""

import json
import math

import pytest
from helpers import TINY_IMAGES, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification

WRONG_TYPES = {
    "hidden_size": [8.0, "8", None, True],
    "vocab_size": ["all", 2.5],
    "num_hidden_layers": [None, 1.0],
    "residual": [1, "yes"],
    "hebbian_lr": ["0.1", None],
    "layer_norm_eps": ["1e-6", None],
    "longest_timescale": ["100"],
    "layer_scale_init_value": ["0.02"],
    "trace_clip": ["0.1"],
    "trace_scope": [None, 1],
    "pooling": [None],
    "image_sequence": [1],
    "layer_types": ["engram", [1]],
    "pixel_permutation_seed": [0.5],
    "tie_word_embeddings": ["no"],
}
WRONG_VALUES = {
    "vocab_size": [0, -1],
    "hidden_size": [0],
    "embedding_size": [0],
    "num_hidden_layers": [0],
    "integrator_size": [0],
    "longest_timescale": [1.5, -4, math.inf, math.nan],
    "memory_size": [0],
    "layer_scale_init_value": [0.02],  # nothing is added to a residual stream here
    "layer_norm_eps": [0.0, math.nan],
    "initializer_range": [-0.1, math.inf],
    "hidden_dropout": [1.0, -0.1],
    "embedding_dropout": [1],
    "classifier_dropout": [math.nan],
    "hebbian_lr": [-0.1, 1.1, math.nan],
    "trace_scale": [math.nan, math.inf],
    "trace_clip": [0, -1.0, math.nan],
    "trace_scope": ["row"],
    "trace_noise": [-1.0, math.inf],
    "initial_state_std": [-1.0, math.inf],
    "recall_temperature": [0.0, -1.0, math.inf],
    "sparsity_strength": [-0.1, math.inf],
    "recall_entropy_weight": [-0.1, math.inf],
    "pooling": ["max"],
    "layer_types": [["lstm"], ["engram", "engram"], []],
    "bos_token_id": [40, -1],
    "eos_token_id": [40, [1, 40]],
    "pad_token_id": [40, -1],
}
WRONG_IMAGE_VALUES = {
    "image_sequence": ["column"],
    "image_size": [0],
    "num_channels": [0],
    "patch_size": [3, 0],
    "embedding_size": [7],
}
ABOUT_THE_FILE = ("_name_or_path", "transformers_version", "architectures")


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(WRONG_TYPES))
def test_wrong_type_names_the_field(name, value):
    with pytest.raises(StrictDataclassError, match=f"{name}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_wrong_value_names_field_value_and_what_is_allowed(name, value):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**{name: value})
    assert f"`{name}` is {value!r}; allowed: " in str(error.value)


@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan])
def test_scale_of_residual_layers_is_above_0(value):
    with pytest.raises(StrictDataclassError, match=r"`layer_scale_init_value` is .*; allowed: a finite number above 0"):
        tiny_config(residual=True, layer_scale_init_value=value)


@pytest.mark.parametrize(("name", "value"), cases(WRONG_IMAGE_VALUES))
def test_wrong_image_value_names_field_value_and_what_is_allowed(name, value):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**{**TINY_IMAGES, "image_sequence": "patch", name: value})
    assert f"`{name}` is {value!r}; allowed: " in str(error.value)


def test_value_made_wrong_later_is_caught_on_save(tmp_path):
    config = tiny_config()
    config.hebbian_lr = 2.0
    with pytest.raises(StrictDataclassError, match="hebbian_lr"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("value", [0, 1])
def test_whole_numbers_are_taken_where_floats_are_meant(value):
    assert tiny_config(hebbian_lr=value, trace_scale=value, sparsity_strength=value).hebbian_lr == value


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vocab_size": None, "embedding_size": 7},
        {"num_hidden_layers": 3, "residual": True, "integrator_size": 5},
        {"integrator": "gated", "longest_timescale": 100, "residual": True, "layer_scale_init_value": 0.02},
        {"trace_clip": 0.1, "trace_scope": "batch", "pooling": "attention"},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0},
        {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "problem_type": "multi_label_classification"},
        TINY_IMAGES,
        {**TINY_IMAGES, "image_sequence": "pixel", "pixel_permutation_seed": 3},
    ],
    ids=str,
)
def test_config_is_the_same_after_a_trip_to_disk(tmp_path, fields):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (EnnConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, EnnConfig)
        assert as_saved(loaded) == as_saved(config)
    assert as_saved(EnnConfig.from_dict(config.to_dict())) == as_saved(config)


def as_saved(config):
    return {name: value for name, value in config.to_dict().items() if name not in ABOUT_THE_FILE}


def test_saved_config_says_what_differs_from_the_defaults(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "enn"
    assert saved["hebbian_lr"] == 0.3
    assert "trace_clip" not in saved or saved["trace_clip"] is None


def test_sizes_follow_from_each_other():
    config = EnnConfig(hidden_size=10, num_hidden_layers=2)
    assert (config.embedding_size, config.integrator_size, config.layer_types) == (10, 30, ["engram", "engram"])


@pytest.mark.parametrize(("image_sequence", "embedding_size"), [("row", 24), ("pixel", 3), ("patch", 48)])
def test_image_config_has_no_vocabulary_and_the_width_of_a_step(image_sequence, embedding_size):
    config = tiny_config(**{**TINY_IMAGES, "image_sequence": image_sequence})
    assert (config.vocab_size, config.embedding_size) == (None, embedding_size)


def test_config_of_the_paper():
    config = EnnConfig.paper(vocab_size=50)
    published = {
        "vocab_size": 50,
        "num_hidden_layers": 1,
        "residual": False,
        "hebbian_lr": 0.05,
        "trace_scale": 0.5,
        "trace_clip": 0.1,
        "trace_scope": "batch",
        "trace_noise": 0.001,
        "initial_state_std": 0.01,
        "classifier_dropout": 0.3,
    }
    assert {name: getattr(config, name) for name in published} == published
    assert config.effective_temperature == 0.75
    assert EnnConfig.paper(trace_clip=None).trace_clip is None


def test_heads_refuse_configs_they_cannot_use():
    with pytest.raises(ValueError, match="vocab_size"):
        EnnForCausalLM(tiny_config(vocab_size=None))
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*embedding_size \(7\).*hidden_size \(16\)"):
        EnnForCausalLM(tiny_config(embedding_size=7))
    with pytest.raises(ValueError, match=r"image_sequence.*row.*pixel.*patch"):
        EnnForImageClassification(tiny_config())


def test_first_parameter_may_not_be_positional():
    with pytest.raises(ValueError, match="keyword arguments"):
        EnnConfig(40)
