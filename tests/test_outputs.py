"""What the models return, and what they accept, is what users of transformers expect."""

import inspect

import pytest
import torch
from helpers import ARCHITECTURES, MODEL_CLASSES, close, same, tiny_inputs, tiny_model, tokens
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hf_engram import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnModel

model_classes = pytest.mark.parametrize("model_class", MODEL_CLASSES)
ALL = {"output_hidden_states": True, "output_recall": True, "output_traces": True}


def labels_for(model, inputs):
    return inputs["input_ids"] if isinstance(model, EnnForCausalLM) else torch.tensor([0, 1, 0])


@model_classes
@pytest.mark.parametrize("architecture", ["bare", "stacked", "residual"])
def test_hidden_states_recall_and_traces_on_request(model_class, architecture):
    model = tiny_model(model_class, **ARCHITECTURES[architecture])
    inputs, layers = tiny_inputs(model), model.config.num_hidden_layers
    plain, outputs = model(**inputs), model(**inputs, **ALL)
    steps = outputs.recall[0].shape[1]
    assert not {"hidden_states", "recall", "traces"} & plain.keys()
    first_width = 16 if model.config.residual or model.config.image_sequence is None else 24
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, steps, first_width), *[(3, steps, 16)] * layers]
    assert [tuple(recall.shape) for recall in outputs.recall] == [(3, steps, 8)] * layers
    assert [tuple(trace.shape) for trace in outputs.traces] == [(3, 8, 16)] * layers
    last = model.base_model(**base_inputs(model, inputs)).last_hidden_state
    same(outputs.hidden_states[-1], last)
    close([recall.sum(-1) for recall in outputs.recall], [torch.ones(3, steps).double()] * layers)
    same(list(outputs.traces), [layer.state.trace for layer in outputs.past_key_values.layers])


def test_a_residual_layer_adds_its_normalised_cell_scaled():
    model, input_ids = tiny_model(EnnModel, residual=True, layer_scale_init_value=0.02), tokens(2, 9)
    [layer] = model.layers
    embeddings = model.embed_tokens(input_ids)
    cell, *_ = layer.cell(layer.input_norm(embeddings))
    same(layer.layer_scale, torch.full((16,), 0.02).double())
    layer.layer_scale.data.normal_()
    expected = model.norm(embeddings + layer.layer_scale * cell)
    close(model(input_ids).last_hidden_state, expected)


def base_inputs(model, inputs):
    """The inputs of the backbone under `model`."""
    if "pixel_values" not in inputs:
        return inputs
    rows = inputs["pixel_values"].permute(0, 2, 3, 1).flatten(2)
    return {"inputs_embeds": rows}


@model_classes
def test_recording_changes_nothing(model_class):
    model = tiny_model(model_class, num_hidden_layers=2)
    inputs = tiny_inputs(model)
    plain, recorded = model(**inputs), model(**inputs, **ALL)
    same(
        {name: recorded[name] for name in plain if name != "past_key_values"},
        {name: value for name, value in plain.items() if name != "past_key_values"},
    )


@pytest.mark.parametrize(("selected", "kept"), [(1, [1]), (-1, [2]), ([0, 2], [0, 2])], ids=str)
def test_some_hidden_states_may_be_selected(selected, kept):
    model, inputs = tiny_model(EnnModel, num_hidden_layers=2), {"input_ids": tokens(2, 5)}
    every = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=selected).hidden_states
    same([h for h in some if h is not None], [every[index] for index in kept])


@pytest.mark.parametrize("field", ALL)
def test_recording_can_be_asked_for_in_the_config(field):
    model = tiny_model(EnnModel, num_hidden_layers=2)
    setattr(model.config, field, True)
    assert field.removeprefix("output_") in model(tokens(2, 5))


@model_classes
@pytest.mark.parametrize("with_labels", [False, True])
def test_tuple_holds_the_values_of_the_dict_in_the_order_of_transformers(model_class, with_labels):
    model = tiny_model(model_class, recall_entropy_weight=0.1)
    inputs = tiny_inputs(model)
    if with_labels and model_class is not EnnModel:
        inputs["labels"] = labels_for(model, inputs)
    named = model(**inputs, **ALL)
    first = (
        ["last_hidden_state"] if model_class is EnnModel else ["loss", "logits"] if "labels" in inputs else ["logits"]
    )
    assert list(named)[: len(first) + 1] == [*first, "past_key_values"]
    values = model(**inputs, **ALL, return_dict=False)
    assert isinstance(values, tuple)
    for value, name in zip(values, named, strict=True):
        if name != "past_key_values":
            same(value, named[name])


def test_outputs_are_those_of_transformers():
    assert isinstance(tiny_model(EnnModel)(tokens(1, 3)), BaseModelOutputWithPast)
    assert isinstance(tiny_model()(tokens(1, 3)), CausalLMOutputWithPast)


@model_classes
def test_config_can_ask_for_tuples(model_class):
    model = tiny_model(model_class)
    inputs = tiny_inputs(model)
    expected = model(**inputs)[0]
    model.config.return_dict = False
    outputs = model(**inputs)
    assert isinstance(outputs, tuple)
    same(outputs[0], expected)


@model_classes
def test_forward_takes_its_main_input_first(model_class):
    main_input = tiny_model(model_class).main_input_name
    assert main_input == ("pixel_values" if model_class is EnnForImageClassification else "input_ids")
    assert list(inspect.signature(model_class.forward).parameters)[1] == main_input


@model_classes
def test_forward_is_deterministic(model_class):
    model = tiny_model(model_class)
    inputs = tiny_inputs(model)
    same(model(**inputs)[0], model(**inputs)[0])


@model_classes
def test_number_of_parameters(model_class):
    model = tiny_model(model_class)
    width = 24 if model_class is EnnForImageClassification else 16
    cell = (width + 1) * 16 + 8 * 16 + (48 + 1) * 48 + (48 + 1) * 16 + 4 * 16
    embeddings = 0 if model_class is EnnForImageClassification else 40 * 16
    head = 0 if model_class in (EnnModel, EnnForCausalLM) else (16 + 1) * 2
    assert model.num_parameters() == cell + embeddings + head


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [50, 30])
def test_vocabulary_can_be_resized(tmp_path, model_class, tied, size):
    model = tiny_model(model_class, dtype=torch.float32, tie_word_embeddings=tied)
    input_ids = tokens(2, 6).clamp_max(29)
    expected = model(input_ids)[0]
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == size
    known = slice(min(size, 40) if model_class is EnnForCausalLM else None)
    same(model(input_ids)[0][..., known], expected[..., known])
    model.save_pretrained(tmp_path)
    same(model_class.from_pretrained(tmp_path)(input_ids)[0], model(input_ids)[0])


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
def test_embeddings_can_be_exchanged(model_class):
    model, input_ids = tiny_model(model_class), tokens(2, 6)
    before = model(input_ids)[0]
    other = torch.nn.Embedding(40, 16).double()
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert (model(input_ids)[0] != before).any()


def test_head_can_be_exchanged():
    model = tiny_model(tie_word_embeddings=False)
    head = torch.nn.Linear(16, 40, bias=False).double()
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    same(model(tokens(1, 3)).logits.shape, torch.Size([1, 3, 40]))


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
@pytest.mark.parametrize("tokens_padded", [True, False])
def test_features_in_place_of_tokens(model_class, tokens_padded):
    model, input_ids = tiny_model(model_class, embedding_size=16), tokens(2, 6)
    mask = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])} if tokens_padded else {}
    features = model.get_input_embeddings()(input_ids)
    same(model(inputs_embeds=features, **mask)[0], model(input_ids, **mask)[0])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=["one", "three", "indices"])
def test_some_logits_may_be_kept(keep):
    model, input_ids = tiny_model(), tokens(2, 6)
    whole = model(input_ids).logits
    kept = model(input_ids, logits_to_keep=keep).logits
    close(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
@pytest.mark.parametrize("given", ["neither", "both"])
def test_exactly_one_of_tokens_and_features(model_class, given):
    model = tiny_model(model_class)
    both = {"input_ids": tokens(1, 3), "inputs_embeds": torch.randn(1, 3, 16, dtype=torch.float64)}
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model(**(both if given == "both" else {}))


WRONG_INPUTS = {
    "features_2d": {"inputs_embeds": torch.zeros(3, 16).double()},
    "features_too_wide": {"inputs_embeds": torch.zeros(1, 3, 17).double()},
    "features_of_integers": {"inputs_embeds": torch.zeros(1, 3, 16).long()},
    "features_in_another_precision": {"inputs_embeds": torch.zeros(1, 3, 16).half()},
    "features_without_steps": {"inputs_embeds": torch.zeros(1, 0, 16).double()},
    "tokens_1d": {"input_ids": torch.zeros(3).long()},
    "tokens_3d": {"input_ids": torch.zeros(1, 3, 2).long()},
    "tokens_that_are_floats": {"input_ids": torch.zeros(1, 3)},
    "tokens_without_steps": {"input_ids": torch.zeros(1, 0).long()},
}


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
@pytest.mark.parametrize("inputs", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_input_is_named_with_what_is_allowed(model_class, inputs):
    [name] = inputs
    with pytest.raises(ValueError, match=rf"{name}.*expected|no steps"):
        tiny_model(model_class)(**inputs)


def test_model_of_features_refuses_tokens():
    with pytest.raises(ValueError, match="vocab_size is None"):
        tiny_model(EnnModel, vocab_size=None)(tokens(1, 3))
