import math

import pytest
import torch
from helpers import close, same, state, tokens
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_engram import EnnForCausalLM, EnnForImageClassification
from train.baselines import BASELINES, BaselineConfig, BaselineForCausalLM, BaselineForImageClassification
from train.models import ARCHITECTURES, ImageModelArguments, LanguageModelArguments, make_model
from train.trainer import load_state, save_state, state_bytes

IMAGES = {"image_sequence": "row", "image_size": 8, "num_labels": 4}
TINY = {"vocab_size": 40, "hidden_size": 16, "initializer_range": 0.5}


def baseline(architecture, **kwargs):
    torch.manual_seed(0)
    config = BaselineConfig(**{**TINY, "architecture": architecture, **kwargs})
    return BaselineForCausalLM(config).double().eval()


def positions(*rows):
    return torch.tensor([[step for document in row for step in range(document)] for row in rows])


@pytest.mark.parametrize("architecture", BASELINES)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_text_read_in_parts_is_the_whole_text(architecture, layers):
    model = baseline(architecture, num_hidden_layers=layers)
    text = tokens(3, 14)
    whole = model(text).logits
    for cut in (1, 6, 13):
        first = model(text[:, :cut], use_cache=True)
        second = model(text[:, cut:], past_key_values=first.past_key_values)
        close(torch.cat([first.logits, second.logits], 1), whole)


@pytest.mark.parametrize("architecture", BASELINES)
def test_documents_do_not_see_each_other(architecture):
    model = baseline(architecture)
    text = tokens(2, 12)
    packed = model(text, position_ids=positions([12], [3, 5, 4])).logits
    close(packed[0], model(text[:1]).logits[0])
    for first, last in ((0, 3), (3, 8), (8, 12)):
        close(packed[1, first:last], model(text[1:, first:last]).logits[0])
    past = model(text[:, :5], position_ids=positions([5], [3, 2]), use_cache=True).past_key_values
    rest = positions([12], [3, 5, 4])[:, 5:]
    close(model(text[:, 5:], position_ids=rest, past_key_values=past).logits, packed[:, 5:])


@pytest.mark.parametrize("architecture", BASELINES)
def test_padding_changes_nothing(architecture):
    model = baseline(architecture)
    text = tokens(1, 9)
    alone = model(text, use_cache=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]])
    padded = torch.full((1, 13), 2).masked_scatter(mask.bool(), text)
    output = model(padded, attention_mask=mask, use_cache=True)
    close(output.logits[mask.bool()], alone.logits[0])
    close(state(output.past_key_values), state(alone.past_key_values))
    left = torch.cat([torch.full((1, 3), 2), text], 1)
    close(model(left, attention_mask=(left != 2).long()).logits[:, 3:], alone.logits)


@pytest.mark.parametrize("architecture", BASELINES)
def test_generate_with_and_without_state(architecture):
    model = baseline(architecture)
    prompt = tokens(2, 6)
    options = {"max_new_tokens": 6, "do_sample": False}
    same(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("architecture", ["lstm", "mixer", "hybrid", "transformer"])
def test_a_saved_state_goes_on(architecture, tmp_path):
    args = LanguageModelArguments(architecture=architecture, hidden_size=16, num_attention_heads=2, sliding_window=64)
    model = make_model(args, "language", vocab_size=40).eval()
    text = tokens(2, 10)
    past = model(text[:, :6], use_cache=True).past_key_values
    save_state(past, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors", model.config, torch.device("cpu"))
    same(model(text[:, 6:], past_key_values=loaded).logits, model(text[:, 6:], past_key_values=past).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", ["language", "images"])
def test_an_architecture_differs_from_the_enn_in_its_layers_alone(architecture, task):
    args = {"language": LanguageModelArguments, "images": ImageModelArguments}[task]
    fields = {"vocab_size": 40} if task == "language" else IMAGES

    def others(name):
        model = make_model(args(architecture=name, residual=True, hidden_size=16, sliding_window=64), task, **fields)
        return {name: w.shape for name, w in model.named_parameters() if ".layers." not in name}, type(model)

    (ours, _), (enn, enn_class) = others(architecture), others("enn")
    assert ours == enn
    assert enn_class in (EnnForCausalLM, EnnForImageClassification)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_learns(architecture):
    torch.manual_seed(0)
    args = ImageModelArguments(architecture=architecture, hidden_size=12, num_hidden_layers=2, residual=True)
    model = make_model(args, "images", **IMAGES)
    model(pixel_values=torch.rand(4, 1, 8, 8), labels=torch.arange(4)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("architecture", "integrator"), [*((name, "recurrent") for name in ARCHITECTURES), ("enn", "gru")]
)
@pytest.mark.parametrize("parameters", [30_000, 210_826])
def test_the_width_is_solved_for_a_number_of_parameters(architecture, integrator, parameters):
    options = {"architecture": architecture, "integrator": integrator, "hidden_size": 48, "parameters": parameters}
    images = make_model(ImageModelArguments(**options), "images", **IMAGES)
    text_args = LanguageModelArguments(**options, sliding_window=64)
    text = make_model(text_args, "language", vocab_size=300)
    for model in (images, text):
        assert abs(model.num_parameters() - parameters) <= 0.02 * parameters


def test_a_number_of_parameters_out_of_reach_is_refused():
    args = ImageModelArguments(hidden_size=48, parameters=3000)
    with pytest.raises(
        ValueError, match=r"parameters is 3,000: the closest model, with .* has .*; allowed: within 2 %"
    ):
        make_model(args, "images", **IMAGES)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture is 'mamba'; allowed: one of"):
        ImageModelArguments(architecture="mamba")


@pytest.mark.parametrize("architecture", BASELINES)
def test_a_baseline_loads_through_the_auto_classes(architecture, tmp_path):
    model = baseline(architecture)
    model.save_pretrained(tmp_path / "text")
    text = tokens(1, 5)
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "text")(text).logits, model(text).logits)
    images = BaselineForImageClassification(BaselineConfig(architecture=architecture, hidden_size=12, **IMAGES)).eval()
    images.save_pretrained(tmp_path / "images")
    pixels = torch.rand(2, 1, 8, 8)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "images")
    close(loaded(pixel_values=pixels).logits, images(pixel_values=pixels).logits, tolerance=1e-6)


def test_a_baseline_has_no_memory_to_change():
    model = baseline("gru")
    some = torch.arange(64) > 0
    for change in ({"slot_mask": some}, {"write_mask": some[None, :4]}, {"plastic": False}):
        with pytest.raises(ValueError, match="A baseline has no memory"):
            model(tokens(1, 4), **change)


def test_an_lstm_begins_with_an_open_forget_gate():
    weights = baseline("lstm").model.layers[0].cell.rnn
    assert weights.bias_ih_l0.view(4, 16).sum(1).tolist() == [0, 16, 0, 0]
    same(weights.bias_hh_l0, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("architecture", "integrator"), [("enn", "gated"), ("enn", "gru"), ("gru", "recurrent"), ("lstm", "recurrent")]
)
def test_gated_cells_start_at_the_same_time_scales(architecture, integrator):
    arguments = LanguageModelArguments(
        architecture=architecture, hidden_size=16, num_hidden_layers=1, integrator=integrator, longest_timescale=50
    )
    weights = make_model(arguments, "language", vocab_size=40).model.layers[0].cell
    if integrator == "gated":
        kept = -weights.gate.bias
    elif integrator == "gru":
        kept = weights.integrator.bias.view(3, 16)[1]
    else:
        gates = weights.rnn.bias_ih_l0.view(-1, 16)
        kept = gates[1]
        if architecture == "lstm":
            same(gates[0], -kept)
    timescales = 1 / (1 - torch.sigmoid(kept.double()))
    close(timescales, torch.logspace(math.log10(2), math.log10(50), 16, dtype=torch.float64), 1e-4)


@pytest.mark.parametrize(("architecture", "bytes_of_a_row"), [("gru", 16 * 8), ("lstm", 2 * 16 * 8)])
def test_state_is_counted_per_row(architecture, bytes_of_a_row):
    past = baseline(architecture)(tokens(3, 5), use_cache=True).past_key_values
    assert state_bytes(past) == bytes_of_a_row
