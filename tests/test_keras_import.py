"""Files that the original Keras package wrote become models with the outputs that it recorded."""

import importlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import close, same
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from benchmarks.reference import WEIGHT_NAMES, relative_error
from hf_engram import EnnForImageClassification, EnnForSequenceClassification, EnnModel
from hf_engram.keras_import import CELL_ARRAYS, load_keras, main

FOLDER = Path(__file__).parent / "fixtures" / "keras"
NEW, OLD = FOLDER / "keras_3.15.1", FOLDER / "keras_3.10.0"
TOLERANCE = 2e-6
# What the files do not hold of the models that were saved.
SPARSE = {"sparsity_strength": 0.3}
PLASTIC = {"hebbian_lr": 0.2}
HEADS = {
    "classifier": (NEW / "classifier.keras", {}),
    "classifier_of_an_older_keras": (OLD / "classifier.keras", {}),
    "classifier_weights": (NEW / "classifier.weights.h5", PLASTIC),
    "attention": (NEW / "attention.keras", SPARSE),
    "attention_of_an_older_keras": (OLD / "attention.keras", SPARSE),
    "functional_model": (NEW / "wrapped.keras", {}),
    "cell_in_an_rnn": (NEW / "cell.keras", {}),
    "regressor": (NEW / "regressor.keras", {}),
}


def recorded(path):
    arrays = load_file(path.parent / "outputs.safetensors")
    return arrays["inputs"], arrays[path.name]


@pytest.mark.parametrize("model_class", [EnnForImageClassification, EnnForSequenceClassification])
@pytest.mark.parametrize(("path", "settings"), HEADS.values(), ids=HEADS)
def test_head_gives_the_recorded_outputs(path, settings, model_class):
    inputs, expected = recorded(path)
    model = load_keras(path, model_class, **settings)
    images = model_class is EnnForImageClassification
    logits = model(pixel_values=inputs[:, None]).logits if images else model(inputs_embeds=inputs).logits
    outputs = logits.softmax(-1) if path.name.startswith("classifier") else logits
    assert relative_error(outputs.detach(), expected) < TOLERANCE


def test_backbone_gives_the_recorded_outputs():
    inputs, expected = recorded(NEW / "network.weights.h5")
    model = load_keras(NEW / "network.weights.h5", EnnModel)
    assert relative_error(model(inputs_embeds=inputs).last_hidden_state.detach(), expected) < TOLERANCE


def test_backbone_of_a_file_with_a_head():
    inputs, _ = recorded(NEW / "classifier.keras")
    backbone, whole = (load_keras(NEW / "classifier.keras", c) for c in (EnnModel, EnnForSequenceClassification))
    same(backbone(inputs_embeds=inputs).last_hidden_state, whole.model(inputs_embeds=inputs).last_hidden_state)
    assert load_keras(NEW / "step_regressor.keras", EnnModel)(inputs_embeds=inputs).last_hidden_state.shape == (3, 6, 8)


def test_settings_of_the_file_are_kept():
    config = load_keras(NEW / "cell.keras", EnnModel).config
    settings = (config.hebbian_lr, config.trace_scale, config.recall_temperature, config.sparsity_strength)
    assert settings == (0.3, 1.5, 0.4, 0.2)
    assert (config.use_layer_norm, config.trace_clip, config.trace_scope) == (False, 0.1, "batch")
    config = load_keras(NEW / "wrapped.keras", EnnForSequenceClassification).config
    assert (config.pooling, config.num_labels) == ("attention", 3)
    assert config.classifier_dropout == pytest.approx(0.6)  # of 0.5 and 0.2 in a row


def test_trace_per_sequence_makes_rows_independent():
    inputs, _ = recorded(NEW / "classifier.keras")
    model = load_keras(NEW / "classifier.keras", trace_scope="sequence")
    close(model(inputs[:1, None]).logits, model(inputs[:, None]).logits[:1], tolerance=1e-6)


def rewritten(source, target, change):
    """A copy of a `.weights.h5` file, with `change` applied to the open file."""
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        change(file)
    return target


def replace(file, place, array):
    del file[place]
    file[place] = array


@pytest.mark.data
def test_recorded_classifier_in_the_layout_of_keras(tmp_path):
    with safe_open(Path(os.environ["HF_ENGRAM_REFERENCE"]) / "classifier_mnist_rows_b4.safetensors", "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ours_to_keras = {"encoder": "input_encoder", "encoder_norm": "layer_norm1", "output_norm": "layer_norm2"}
    ours_to_keras |= {"integrator": "hidden_integrator", "output": "output_dense"}

    def fill(file):
        cell = "layers/engram/engram_cell"
        for place, ours in CELL_ARRAYS.items():
            layer, _, kind = ours.partition(".")
            gains = {"weight": "gamma", "bias": "beta"} if layer.endswith("norm") else {"weight": "kernel"}
            recorded_name = f"{ours_to_keras[layer]}.{gains.get(kind, kind)}" if kind else ours
            assert recorded_name in WEIGHT_NAMES
            replace(file, f"{cell}/{place}", arrays[recorded_name])
        replace(file, f"{cell}/vars/1", np.zeros((64, 128), np.float32))
        replace(file, "layers/dense/vars/0", arrays["head.kernel"])
        replace(file, "layers/dense/vars/1", arrays["head.bias"])

    path = rewritten(NEW / "classifier.weights.h5", tmp_path / "mnist.weights.h5", fill)
    model = load_keras(path)
    assert model.num_parameters() == 210_826
    images = torch.from_numpy(arrays["inputs"])[:, None]
    for dtype, prefix, tolerance in ((torch.float32, "", 2e-5), (torch.float64, "f64.", 1e-10)):
        output = model.to(dtype)(images.to(dtype), use_cache=True)
        state = output.past_key_values.layers[0].state
        for name, ours in (("logits", output.logits), ("final_hidden", state.hidden), ("final_trace", state.trace[0])):
            assert relative_error(ours.detach(), torch.from_numpy(arrays[prefix + name])) < tolerance


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_model_has_the_dtype_of_the_file(tmp_path, dtype):
    def cast(file):
        places = []
        file.visititems(lambda place, item: places.append(place) if isinstance(item, h5py.Dataset) else None)
        for place in places:
            replace(file, place, file[place][()].astype(dtype))

    path = rewritten(NEW / "network.weights.h5", tmp_path / "network.weights.h5", cast)
    assert load_keras(path, EnnModel).dtype == getattr(torch, dtype)


def with_config(source, target, change_layers, change_arrays=lambda file: None):
    """A copy of a `.keras` file, with its layers and arrays changed."""
    with zipfile.ZipFile(source) as archive:
        model, arrays = json.loads(archive.read("config.json")), io.BytesIO(archive.read("model.weights.h5"))
    change_layers(model["config"]["layers"])
    with h5py.File(arrays, "r+") as file:
        change_arrays(file)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", arrays.getvalue())
    return target


def second_cell(file):
    file.copy("layers/engram/engram_cell", "layers/engram_1/engram_cell")


LAYOUTS = {
    "more_cells": (second_cell, "holds 2 engram cells; expected: 1. Its arrays: layers/dense/vars/0"),
    "another_head": (lambda file: file.copy("layers/dense", "layers/dense_1"), "no place for: layers/dense_1/vars/0"),
    "an_embedding": (lambda file: file.copy("layers/dense", "layers/embedding"), "layers/embedding/vars/0"),
    "no_head": (lambda file: file.pop("layers/dense"), "no head that we know .* expected: one dense layer"),
    "no_bank": (lambda file: file.pop("layers/engram/engram_cell/vars/0"), "lacks .* layers/engram/engram_cell/vars/0"),
    "half_a_norm": (lambda file: file.pop("layers/engram/engram_cell/layer_norm2"), "lacks .*layer_norm2/vars/0"),
    "wrong_shape": (
        lambda file: replace(file, "layers/dense/vars/0", np.zeros((9, 3), np.float32)),
        r"layers/dense/vars/0 has shape \(9, 3\); expected: \(8, 3\)",
    ),
    "flat_bank": (
        lambda file: replace(file, "layers/engram/engram_cell/vars/0", np.zeros(40, np.float32)),
        r"layers/engram/engram_cell/vars/0 has shape \(40,\); expected: two axes",
    ),
    "integers": (
        lambda file: replace(file, "layers/dense/vars/1", np.zeros(3, np.int8)),
        "layers/dense/vars/1 is int8; expected: floating-point",
    ),
}


@pytest.mark.parametrize(("change", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_unknown_layout_is_refused_by_name(tmp_path, change, message):
    path = rewritten(NEW / "classifier.weights.h5", tmp_path / "changed.weights.h5", change)
    with pytest.raises(ValueError, match=message):
        load_keras(path)


def insert(layer):
    return lambda layers: layers.insert(1, layer)


def change_field(index, name, value):
    return lambda layers: layers[index]["config"].update({name: value})


MODELS = {
    "a_layer_before": (
        "classifier",
        insert({"class_name": "Masking", "config": {}}),
        "is a model of the layers InputLayer, Masking, Engram, Dropout, Dense. Expected: one Engram",
    ),
    "a_layer_after": ("cell", lambda layers: layers.append({"class_name": "ReLU", "config": {}}), "RNN, Dense, ReLU"),
    "another_cell": ("cell", lambda layers: layers[1]["config"]["cell"].update(class_name="GRUCell"), "Expected: one"),
    "backwards": ("cell", change_field(1, "go_backwards", True), "Expected: one"),
    "output_per_step": ("wrapped", change_field(1, "use_attention", False), "output per step"),
    "activation": ("classifier", change_field(3, "activation", "relu"), "activation .*'relu'.*; allowed: .*'softmax'"),
}


@pytest.mark.parametrize(("source", "change", "message"), MODELS.values(), ids=MODELS)
def test_unknown_model_is_refused_by_name(tmp_path, source, change, message):
    path = with_config(NEW / f"{source}.keras", tmp_path / "changed.keras", change)
    with pytest.raises(ValueError, match=message):
        load_keras(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (NEW / "lstm.keras", "holds 0 engram cells; expected: 1. Its arrays: .*layers/lstm/cell/vars/0"),
        (NEW / "legacy.h5", "legacy HDF5 format; expected: .keras or .weights.h5"),
        (NEW / "step_regressor.keras", "layers/time_distributed/layer/vars/0.* EnnModel reads the cell alone"),
        (NEW / "network.weights.h5", "arrays beside the cell: none.* expected: one dense layer"),
        (FOLDER / "README.md", "not a .keras or .weights.h5 file of Keras 3"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_file_is_refused_by_name(path, message):
    with pytest.raises(ValueError, match=message):
        load_keras(path)


def test_damaged_or_missing_file(tmp_path):
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes((NEW / "classifier.keras").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"damaged.keras.* is not a .keras"):
        load_keras(damaged)
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"not a .keras .*model.weights.h5"):
        load_keras(damaged)
    with pytest.raises(FileNotFoundError, match=r"no_such\.keras"):
        load_keras(tmp_path / "no_such.keras")


def test_field_that_contradicts_the_file():
    with pytest.raises(ValueError, match=r"hebbian_lr is 0.2 in the file; 0.1 was given"):
        load_keras(NEW / "classifier.keras", hebbian_lr=0.1)
    with pytest.raises(ValueError, match=r"model_class .* allowed: EnnForImageClassification"):
        load_keras(NEW / "classifier.keras", AutoModel)


def reading(tmp_path, steps, width):
    """The classifier for inputs of another shape."""
    kernel = torch.rand(width, 8).numpy()
    return with_config(
        NEW / "classifier.keras",
        tmp_path / "images.keras",
        change_field(0, "batch_shape", [None, steps, width]),
        lambda file: replace(file, "layers/engram/engram_cell/input_encoder/vars/0", kernel),
    )


PATCHES = {"image_sequence": "patch", "image_size": 12, "patch_size": 4}
IMAGES = {
    "rows": ((6, 6), {}, ("row", 6, 1)),
    "rows_of_colours": ((4, 12), {}, ("row", 4, 3)),
    "any_number_of_rows": ((None, 28), {}, ("row", 28, 1)),
    "pixels": ((25, 3), {"image_sequence": "pixel"}, ("pixel", 5, 3)),
    "patches": ((9, 16), PATCHES, ("patch", 12, 1)),
}


@pytest.mark.parametrize(("shape", "fields", "expected"), IMAGES.values(), ids=IMAGES)
def test_images_are_read_as_the_input_shape_says(tmp_path, shape, fields, expected):
    model = load_keras(reading(tmp_path, *shape), **fields)
    config = model.config
    assert (config.image_sequence, config.image_size, config.num_channels) == expected
    assert model(torch.rand(2, config.num_channels, config.image_size, config.image_size)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((10, 28), {}, "reads sequences of 10 steps, 28 wide: not images 28 by 28 with image_sequence='row'"),
        ((26, 1), {"image_sequence": "pixel"}, "of 26 steps, 1 wide: not images 5 by 5"),
        ((4, 16), PATCHES, "not images 12 by 12 with image_sequence='patch'"),
        ((36, 6), {"image_sequence": "pixel", "num_channels": 1}, "num_channels is 6 in the file; 1 was given"),
    ],
)
def test_sequences_that_are_no_such_images_are_refused(tmp_path, shape, fields, message):
    with pytest.raises(ValueError, match=message):
        load_keras(reading(tmp_path, *shape), **fields)


def test_without_h5py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "hf_engram.keras_import")
    with pytest.raises(ImportError, match="pip install h5py"):
        importlib.import_module("hf_engram.keras_import")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["keras_import", *map(str, arguments)])
    main()


def test_command_writes_a_folder_that_opens_anywhere(tmp_path, monkeypatch, capsys):
    inputs, expected = recorded(NEW / "classifier.weights.h5")
    folder = tmp_path / "model"
    command(monkeypatch, NEW / "classifier.weights.h5", folder, "--hebbian_lr", "0.2")
    assert "EnnForImageClassification of" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert relative_error(model(inputs[:, None]).logits.softmax(-1).detach(), expected) < TOLERANCE
    pixels = (inputs[0].numpy() * 255).round().astype("uint8")
    scores = pipeline("image-classification", str(folder), device="cpu")(Image.fromarray(pixels))
    probabilities = model(torch.from_numpy(pixels)[None, None] / 255).logits.softmax(-1)[0]
    assert [s["score"] for s in scores] == pytest.approx(sorted(probabilities.tolist(), reverse=True), rel=1e-4)


def test_command_for_a_backbone(tmp_path, monkeypatch):
    command(monkeypatch, NEW / "network.weights.h5", tmp_path / "model", "--model_class", "EnnModel")
    inputs, expected = recorded(NEW / "network.weights.h5")
    outputs = AutoModel.from_pretrained(tmp_path / "model")(inputs_embeds=inputs).last_hidden_state
    assert relative_error(outputs.detach(), expected) < TOLERANCE


def test_command_says_what_is_wrong_and_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit, match=r"exists and is not an empty folder\."):
        command(monkeypatch, NEW / "classifier.keras", tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*lstm\.keras' holds 0 engram cells"):
        command(monkeypatch, NEW / "lstm.keras", tmp_path / "new")
    with pytest.raises(SystemExit, match=r"(?s)error: .*`sparsity_strength` is -1\.0; allowed"):
        command(monkeypatch, NEW / "classifier.keras", tmp_path / "new", "--sparsity_strength", "-1")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
