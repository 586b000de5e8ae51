"""Models of the original Keras package (tensorflow-engram) as models of this one, without TensorFlow.

    python -m hf_engram.keras_import mnist.keras mnist/
    python -m hf_engram.keras_import mnist.weights.h5 mnist/ --hebbian_lr 0.1
    python -m hf_engram.keras_import network.keras network/ --model_class EnnModel

The file is a whole model (`model.save("x.keras")`) or its weights alone (`model.save_weights("x.weights.h5")`), as
Keras 3 writes them, of `EngramClassifier`, `EngramRegressor` or `EngramNetwork` with one output per sequence, or of
`keras.layers.RNN` around an `EngramCell`. Anything else is refused by name. The folder opens with `from_pretrained`;
for images it also holds an image processor.

Of the original's networks neither file holds `sparsity_strength` (0.1 unless given), and weights alone hold no settings
at all: give those that were not the defaults. The original draws noise and a random start at inference too; an imported
model, like every model here, in training mode only.
"""

import argparse
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from . import EnnConfig, EnnForImageClassification, EnnForSequenceClassification, EnnImageProcessor, EnnModel
from .configuration_enn import IMAGE_SEQUENCES, TRACE_SCOPES
from .modeling_enn import EnnPreTrainedModel

try:
    import h5py
except ImportError as error:
    raise ImportError("hf_engram.keras_import needs h5py: pip install h5py.") from error

MODEL_CLASSES = {c.__name__: c for c in (EnnForImageClassification, EnnForSequenceClassification, EnnModel)}
# Arrays of a cell, below its group in the HDF5 file, and our names for them, below `layers.0.cell`.
CELL_ARRAYS = {
    "input_encoder/vars/0": "encoder.weight",
    "input_encoder/vars/1": "encoder.bias",
    "layer_norm1/vars/0": "encoder_norm.weight",
    "layer_norm1/vars/1": "encoder_norm.bias",
    "vars/0": "memory_bank",
    "hidden_integrator/vars/0": "integrator.weight",
    "hidden_integrator/vars/1": "integrator.bias",
    "output_dense/vars/0": "output.weight",
    "output_dense/vars/1": "output.bias",
    "layer_norm2/vars/0": "output_norm.weight",
    "layer_norm2/vars/1": "output_norm.bias",
}
NORM_ARRAYS = {place for place in CELL_ARRAYS if place.startswith("layer_norm")}
CELL_MARK = "hidden_integrator/vars/0"
UNREAD_CELL_ARRAY = "vars/1"  # "initial_hebbian_trace", which the original never reads either
# Ends of the places of a head's arrays, and our names for them. We have no head with an output per step.
HEAD_ARRAYS = {
    "attention/attention_dense/vars/0": "pooling.score.weight",
    "attention/attention_dense/vars/1": "pooling.score.bias",
    "layers/dense/vars/0": "classifier.weight",
    "layers/dense/vars/1": "classifier.bias",
    "layers/time_distributed/layer/vars/0": "step_classifier.weight",
    "layers/time_distributed/layer/vars/1": "step_classifier.bias",
}
HEAD_LAYERS = ("Dropout", "Dense", "TimeDistributed")
ACTIVATIONS = (None, "linear", "softmax", "sigmoid")
# Settings of a cell in the words of Keras and in ours.
SETTINGS = {
    "hebbian_lr": "hebbian_lr",
    "scale_factor": "trace_scale",
    "temperature": "recall_temperature",
    "sparsity_strength": "sparsity_strength",
}


EXPECTED = (
    "Expected: one Engram, EngramNetwork or RNN around an EngramCell, with one output per sequence, then dropout and "
    "one dense layer, or neither."
)


class KerasFile(NamedTuple):
    """What a file holds."""

    path: str
    arrays: dict[str, Tensor]  # by their place in the HDF5 file, without the optimizer's
    layers: list[dict[str, Any]] | None  # Keras' own description of each layer; `None` for weights alone


def load_keras(
    path: str | os.PathLike,
    model_class: type[EnnPreTrainedModel] = EnnForImageClassification,
    **config: Any,
) -> EnnPreTrainedModel:
    """Read a model of the original package; it comes in evaluation mode and in the dtype of the file.

    Args:
        path: a `.keras` or `.weights.h5` file.
        model_class: `EnnForImageClassification`, `EnnForSequenceClassification` (reads features, `inputs_embeds`), or
            `EnnModel`, which leaves a head unread. Logits are what the file's softmax or sigmoid acts on.
        config: fields of [`EnnConfig`] that the file does not hold. The others are those of [`EnnConfig.paper`].
            Images are read by rows unless `image_sequence` says otherwise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has none of the known layouts, or contradicts a field; the message says what was found and
            what is expected.
        `huggingface_hub.errors.StrictDataclassError`: a field is out of range, or does not fit the file's sizes.
    """
    if model_class not in MODEL_CLASSES.values():
        raise ValueError(f"model_class is {model_class!r}; allowed: {', '.join(MODEL_CLASSES)}.")
    with_head = model_class is not EnnModel
    file = read_keras_file(path)
    places = find_arrays(file, with_head)
    found = find_config(file, places, with_head)
    if model_class is EnnForImageClassification:
        found |= find_image(file, found["embedding_size"], config)
    for name in found.keys() & config.keys():
        if found[name] != config[name]:
            raise ValueError(f"{file.path!r}: {name} is {found[name]!r} in the file; {config[name]!r} was given.")

    model = model_class(EnnConfig.paper(**{**found, **config}))
    weights = {}
    for name, weight in model.state_dict().items():
        place = places[name.removeprefix("model.").removeprefix("layers.0.cell.")]
        array = file.arrays[place]
        is_kernel = array.ndim == 2 and name.endswith(".weight")
        weights[name] = array.T if is_kernel else array
        if weights[name].shape != weight.shape:
            expected = tuple(weight.shape)[::-1] if is_kernel else tuple(weight.shape)
            raise ValueError(f"{file.path!r}: {place} has shape {tuple(array.shape)}; expected: {expected}.")
    model.to(file.arrays[places["memory_bank"]].dtype).load_state_dict(weights)
    return model.eval()


def read_keras_file(path: str | os.PathLike) -> KerasFile:
    """Read the arrays and the layers' descriptions; nothing that the file says is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Keras 3 did not write it.
    """
    path = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    try:
        if not zipfile.is_zipfile(path):
            return KerasFile(path, _read_arrays(path, path), None)
        with zipfile.ZipFile(path) as archive:
            model = json.loads(archive.read("config.json"))
            arrays = _read_arrays(io.BytesIO(archive.read("model.weights.h5")), path)
            nested = model["class_name"] in ("Sequential", "Functional")
            return KerasFile(path, arrays, model["config"]["layers"] if nested else [model])
    except (OSError, KeyError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path!r} is not a .keras or .weights.h5 file of Keras 3: {error}.") from error


def _read_arrays(source: str | io.BytesIO, path: str) -> dict[str, Tensor]:
    arrays = {}

    def read(place: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or place.startswith("optimizer/"):
            return
        if item.dtype not in ("float16", "float32", "float64") or item.external:
            raise ValueError(f"{path!r}: {place} is {item.dtype}; expected: floating-point numbers inside the file.")
        arrays[place] = torch.from_numpy(item[()])

    with h5py.File(source) as file:
        if "layer_names" in file.attrs or "model_config" in file.attrs:
            raise ValueError(
                f"{path!r} is in Keras' legacy HDF5 format; expected: .keras or .weights.h5. Keras converts it: open "
                'it there and save it with model.save("x.keras").'
            )
        file.visititems(read)
    return arrays


def find_arrays(file: KerasFile, with_head: bool) -> dict[str, str]:
    """Place in the file of every array, by our names below `layers.0.cell` and those of the head.

    Raises:
        ValueError: not exactly one engram cell; an array of unknown meaning; with a head, not exactly one dense layer.
    """
    cells = [place.removesuffix(CELL_MARK) for place in file.arrays if place.endswith(CELL_MARK)]
    if len(cells) != 1:
        arrays = ", ".join(file.arrays) or "none"
        raise ValueError(f"{file.path!r} holds {len(cells)} engram cells; expected: 1. Its arrays: {arrays}.")
    [cell] = cells
    wanted = CELL_ARRAYS.keys() - ({} if any(cell + place in file.arrays for place in NORM_ARRAYS) else NORM_ARRAYS)
    missing = sorted(cell + place for place in wanted if cell + place not in file.arrays)
    if missing:
        raise ValueError(f"{file.path!r} lacks arrays of its engram cell: {', '.join(missing)}.")
    places = {CELL_ARRAYS[place]: cell + place for place in wanted}

    others = file.arrays.keys() - set(places.values()) - {cell + UNREAD_CELL_ARRAY}
    for place in sorted(others):
        name = next((name for end, name in HEAD_ARRAYS.items() if f"/{place}".endswith(f"/{end}")), None)
        if name is None or name in places:
            raise ValueError(f"{file.path!r} holds an array that we have no place for: {place}. {EXPECTED}")
        places[name] = place
    if with_head and not {"classifier.weight", "classifier.bias"} <= places.keys():
        raise ValueError(
            f"{file.path!r} has no head that we know (arrays beside the cell: {', '.join(sorted(others)) or 'none'}); "
            "expected: one dense layer, of one output per sequence. EnnModel reads the cell alone."
        )
    return places


def find_config(file: KerasFile, places: dict[str, str], with_head: bool) -> dict[str, Any]:
    """Fields of the config that the file holds.

    Raises:
        ValueError: layers that we do not know, or in another order or use than expected.
    """
    for place in (places["memory_bank"], places["encoder.weight"]):
        if file.arrays[place].ndim != 2:
            raise ValueError(f"{file.path!r}: {place} has shape {tuple(file.arrays[place].shape)}; expected: two axes.")
    slots, hidden = file.arrays[places["memory_bank"]].shape
    found: dict[str, Any] = {
        "vocab_size": None,
        "hidden_size": hidden,
        "memory_size": slots,
        "embedding_size": file.arrays[places["encoder.weight"]].shape[0],
        "use_layer_norm": "encoder_norm.weight" in places,
    }
    if with_head:
        found["num_labels"] = len(file.arrays[places["classifier.bias"]])
        found["pooling"] = "attention" if "pooling.score.weight" in places else "last"
    if file.layers is None:
        return found

    engram, *head = [layer for layer in file.layers if layer["class_name"] != "InputLayer"]
    outer = engram["config"]
    inner = outer.get("cell", {"class_name": engram["class_name"], "config": outer})
    unknown = [layer["class_name"] for layer in head if layer["class_name"] not in HEAD_LAYERS]
    if inner["class_name"] not in ("Engram", "EngramNetwork", "EngramCell") or unknown or outer.get("go_backwards"):
        names = ", ".join(layer["class_name"] for layer in file.layers)
        raise ValueError(f"{file.path!r} is a model of the layers {names}. {EXPECTED}")
    found |= {ours: inner["config"][theirs] for theirs, ours in SETTINGS.items() if theirs in inner["config"]}
    if with_head:
        if outer["return_sequences"] and not outer.get("use_attention"):
            raise ValueError(f"{file.path!r} has an output per step. {EXPECTED} EnnModel reads the cell alone.")
        activations = [layer["config"]["activation"] for layer in head if layer["class_name"] == "Dense"]
        activations.append(outer.get("output_activation"))
        if not {*activations} <= {*ACTIVATIONS}:
            raise ValueError(f"{file.path!r}: the head's activation is {activations}; allowed: {ACTIVATIONS}.")
        # Dropouts in a row act as one.
        rates = [outer.get("dropout_rate", 0.0), *(layer["config"].get("rate", 0.0) for layer in head)]
        found["classifier_dropout"] = round(1 - math.prod(1 - rate for rate in rates), 9)
    return found


def find_image(file: KerasFile, width: int, config: dict[str, Any]) -> dict[str, Any]:
    """Fields that say how images become steps `width` wide.

    Raises:
        ValueError: the file's input shape is not that of such images.
    """
    sequence = config.get("image_sequence", "row")
    steps = None if file.layers is None else _input_steps(file.layers)
    found: dict[str, Any] = {"image_sequence": sequence}
    if sequence == "row":
        found["num_channels"] = config.get("num_channels", width // steps if steps and width % steps == 0 else 1)
        found["image_size"] = width // found["num_channels"]
    elif sequence == "pixel":
        found["num_channels"] = width
        if steps:
            found["image_size"] = math.isqrt(steps)
    image = EnnConfig(**{"embedding_size": width, **config, **found})
    size = image.image_size
    if steps not in (None, image.image_steps):
        raise ValueError(
            f"{file.path!r} reads sequences of {steps} steps, {width} wide: not images {size} by {size} with "
            f"image_sequence={sequence!r}. Give image_sequence ({', '.join(IMAGE_SEQUENCES)}), image_size and "
            "num_channels as they were; or EnnForSequenceClassification reads sequences of any length."
        )
    return found


def _input_steps(layers: list[dict[str, Any]]) -> int | None:
    shapes = [
        layer["config"].get("batch_shape") or layer.get("build_config", {}).get("input_shape") for layer in layers
    ]
    return shapes[0][1] if shapes[0] else None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_engram.keras_import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a .keras or .weights.h5 file")
    parser.add_argument("folder", type=Path, help="where to write the model; a new or empty folder")
    parser.add_argument(
        "--model_class",
        choices=MODEL_CLASSES,
        default="EnnForImageClassification",
        help="EnnModel leaves a head unread (default: %(default)s)",
    )
    fields = parser.add_argument_group("what the file does not hold", "(fields of EnnConfig)")
    fields.add_argument(
        "--image_sequence", choices=IMAGE_SEQUENCES, help="what one step reads of an image (default: row)"
    )
    fields.add_argument(
        "--image_size", type=int, help="height and width of the images (default: as the input shape says)"
    )
    fields.add_argument("--num_channels", type=int, help="channels of the images (default: as the input shape says)")
    fields.add_argument("--patch_size", type=int, help="height and width of a patch, with --image_sequence patch")
    fields.add_argument("--hebbian_lr", type=float, help="plasticity (default: as in the file, else 0.05)")
    fields.add_argument(
        "--sparsity_strength", type=float, help="sparsity of recall (default: as in the file, else 0.1)"
    )
    fields.add_argument(
        "--trace_scope",
        choices=TRACE_SCOPES,
        help="batch: rows of a batch share their trace, as published (the default)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """The command."""
    options = vars(parse_arguments())
    file, folder, model_class = options.pop("file"), options.pop("folder"), MODEL_CLASSES[options.pop("model_class")]
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{str(folder)!r} exists and is not an empty folder.")
        model = load_keras(file, model_class, **{name: value for name, value in options.items() if value is not None})
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SystemExit(f"error: {error}") from error
    model.save_pretrained(folder)
    if model_class is EnnForImageClassification:
        config = model.config
        size = {"height": config.image_size, "width": config.image_size}
        EnnImageProcessor(num_channels=config.num_channels, size=size).save_pretrained(folder)
    print(f"{folder}: {model_class.__name__} of {model.num_parameters():,} parameters, from {file}")


if __name__ == "__main__":
    main()
