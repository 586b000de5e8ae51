"""Models spread over devices and offloaded to disk by accelerate."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from helpers import ARCHITECTURES, MODEL_CLASSES, TINY_IMAGES, same, tiny_inputs, tiny_model, tokens
from transformers import AutoModelForCausalLM

from hf_engram import EnnForImageClassification
from hf_engram.traces import record

STACK = {"num_hidden_layers": 3, "residual": True}
ON_DISK = {
    "model.embed_tokens": "cpu",
    "lm_head": "cpu",
    "model.norm": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
}


@pytest.mark.parametrize("device_map", ["auto", "cpu", ON_DISK], ids=["auto", "cpu", "disk"])
@pytest.mark.parametrize("integrator", ["recurrent", "gated", "gru"])
def test_device_map_gives_the_same_outputs(tmp_path, device_map, integrator):
    model, ids = tiny_model(**STACK, integrator=integrator), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    on_meta = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert bool(on_meta) == (device_map == ON_DISK)
    same(loaded(ids).logits, model(ids).logits)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}):
        same(loaded.generate(ids, max_new_tokens=6, **options), model.generate(ids, max_new_tokens=6, **options))
    assert on_meta == [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_everything_offloaded(model_class):
    model = tiny_model(model_class, pooling="attention")
    inputs = tiny_inputs(model)
    expected = model(**inputs)[0]
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    same(offloaded(**inputs)[0], expected)


def test_images_with_places_offloaded():
    model = tiny_model(EnnForImageClassification, position_embedding_size=4, **TINY_IMAGES)
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    same(cpu_offload(copy.deepcopy(model), torch.device("cpu"))(**inputs).logits, expected)


@pytest.mark.parametrize("architecture", ["stacked", "mixer", "hybrid"])
def test_offloaded_models_are_recorded(architecture):
    model, ids = tiny_model(**ARCHITECTURES[architecture]), tokens(1, 7)
    [expected] = record(model, ids)
    [found] = record(cpu_offload(copy.deepcopy(model), torch.device("cpu")), ids)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.to_pandas().equals(other.to_pandas())
        same(layer.recalled, other.recalled)


def test_automatic_map_never_splits_a_layer(tmp_path):
    model, ids = tiny_model(**STACK), tokens(2, 9)
    expected = model(ids).logits
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - 3 * layer
    device_map = infer_auto_device_map(
        model, {"cpu": rest + 3 * layer - 1, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert {*device_map.values()} == {"cpu", "disk"}
    assert not [name for name in device_map if ".layers." in name and name.count(".") > 2]
    dispatched = dispatch_model(model, device_map, offload_dir=tmp_path, skip_keys=model._skip_keys_device_placement)
    same(dispatched(ids).logits, expected)
