"""Padding, wherever it stands, changes nothing."""

import pytest
import torch
from helpers import ARCHITECTURES, close, gradients, same, state, tiny_model, tokens

from hf_engram import EnnModel

BATCH_SIZES = pytest.mark.parametrize("batch", [1, 3])
LAYOUTS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "interior": [[1, 1, 0, 0, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1]],
    "everywhere": [[0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("repeats", [1, 10], ids=["short", "long"])
@BATCH_SIZES
def test_padded_equals_unpadded(layout, architecture, repeats, batch):
    model = tiny_model(**architecture)
    attention_mask = torch.tensor(layout)[:batch].repeat(1, repeats)
    input_ids = tokens(*attention_mask.shape)
    padded = model(input_ids, attention_mask=attention_mask)
    for row, valid in enumerate(attention_mask.bool()):
        alone = model(input_ids[row : row + 1, valid])
        close(padded.logits[row, valid], alone.logits[0])
        close(state(padded.past_key_values, [row]), state(alone.past_key_values))


@BATCH_SIZES
def test_what_stands_at_padding_does_not_matter(batch):
    model, input_ids = tiny_model(), tokens(batch, 9)
    attention_mask = torch.tensor(LAYOUTS["interior"])[:batch]
    other_padding = input_ids.where(attention_mask > 0, 7)
    outputs, others = (model(ids, attention_mask=attention_mask) for ids in (input_ids, other_padding))
    same(others.logits, outputs.logits)
    same(state(others.past_key_values), state(outputs.past_key_values))


@pytest.mark.parametrize("layout", ["left", "right", "interior"])
@pytest.mark.parametrize("architecture", ["stacked", "clipped", "gated", "gru", "mixer", "hybrid"])
@pytest.mark.parametrize("scan", ["auto", "chunkwise", "definition"])
def test_features_at_padding_may_be_anything(layout, architecture, scan, monkeypatch):
    monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
    model = tiny_model(EnnModel, **ARCHITECTURES[architecture])
    attention_mask = torch.tensor(LAYOUTS[layout])
    features = torch.randn(3, 9, 16, dtype=torch.float64)
    padding = ~attention_mask.bool()[..., None]
    outputs, others = (
        model(inputs_embeds=features.masked_fill(padding, value), attention_mask=attention_mask)
        for value in (0.0, float("nan"))
    )
    same(others.last_hidden_state[attention_mask > 0], outputs.last_hidden_state[attention_mask > 0])
    same(state(others.past_key_values), state(outputs.past_key_values))


def test_gradients_do_not_see_padding():
    attention_mask = torch.tensor(LAYOUTS["everywhere"])[1:2]
    input_ids, valid = tokens(1, 9), attention_mask[0].bool()
    model = tiny_model(num_hidden_layers=2, residual=True)
    labels = input_ids.where(attention_mask > 0, -100)
    logits = model(input_ids, attention_mask=attention_mask).logits[:, valid]
    model.loss_function(logits=logits, labels=labels[:, valid], vocab_size=40).backward()
    padded = gradients(model)
    model.zero_grad()
    model(input_ids[:, valid], labels=input_ids[:, valid]).loss.backward()
    close(padded, gradients(model))


def test_padding_gets_no_gradient():
    model = tiny_model(EnnModel)
    attention_mask = torch.tensor(LAYOUTS["interior"])
    features = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    outputs = model(inputs_embeds=features, attention_mask=attention_mask)
    outputs.last_hidden_state[..., :8].sum().backward()
    same(features.grad.any(-1), attention_mask.bool())


def test_row_of_nothing_but_padding_keeps_its_state():
    model, prompt = tiny_model(), tokens(2, 6)
    past_key_values = model(prompt).past_key_values
    before = state(past_key_values)
    attention_mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    after = state(model(tokens(2, 3), attention_mask=attention_mask, past_key_values=past_key_values).past_key_values)
    for old, new in zip(before, after, strict=True):
        same(new[0], old[0])
        assert (new[1] != old[1]).any()


def test_mask_may_cover_the_past_too():
    model, input_ids = tiny_model(), tokens(3, 9)
    attention_mask = torch.tensor(LAYOUTS["everywhere"])
    expected = model(input_ids, attention_mask=attention_mask).logits[:, 4:]
    for start in (0, 4):
        past_key_values = model(input_ids[:, :4], attention_mask=attention_mask[:, :4]).past_key_values
        outputs = model(input_ids[:, 4:], attention_mask=attention_mask[:, start:], past_key_values=past_key_values)
        close(outputs.logits, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.float64], ids=str)
def test_mask_may_have_any_dtype(dtype):
    model, input_ids = tiny_model(), tokens(3, 9)
    attention_mask = torch.tensor(LAYOUTS["left"])
    same(
        model(input_ids, attention_mask=attention_mask.to(dtype)).logits,
        model(input_ids, attention_mask=attention_mask).logits,
    )


@pytest.mark.parametrize("shape", [(3, 8), (9,), (3, 1, 9, 9), (2, 9), (1, 9)], ids=str)
def test_mask_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="attention_mask has shape"):
        tiny_model()(tokens(3, 9), attention_mask=torch.zeros(shape, dtype=torch.long))
