"""Documents packed into one row (`position_ids` that restart at 0) do not see each other."""

import pytest
import torch
from helpers import architectures, close, gradients, same, state, tiny_model, tokens
from transformers import DataCollatorWithFlattening, DynamicCache

from hf_engram import EnnModel

LENGTHS = {"short": (5, 1, 7), "long": (50, 64, 1, 30)}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@architectures
@lengths
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_documents_equal_documents_alone(architecture, lengths, batch):
    model, input_ids = tiny_model(**architecture), tokens(batch, sum(lengths))
    packed = model(input_ids, position_ids=positions(lengths))
    alone = [model(document) for document in input_ids.split(lengths, 1)]
    close(packed.logits, torch.cat([outputs.logits for outputs in alone], 1))
    close(state(packed.past_key_values), state(alone[-1].past_key_values))


@architectures
@lengths
def test_changing_a_document_leaves_the_next_bit_equal(architecture, lengths):
    model, input_ids = tiny_model(**architecture), tokens(2, sum(lengths))
    first = lengths[0]
    changed = torch.cat([tokens(2, first), input_ids[:, first:]], 1)
    outputs, others = (model(ids, position_ids=positions(lengths)) for ids in (input_ids, changed))
    same(others.logits[:, first:], outputs.logits[:, first:])
    same(state(others.past_key_values), state(outputs.past_key_values))
    assert (others.logits[:, :first] != outputs.logits[:, :first]).any()


@lengths
def test_gradients_stop_at_the_border(lengths):
    model = tiny_model(EnnModel, num_hidden_layers=2)
    features = torch.randn(1, sum(lengths), 16, dtype=torch.float64, requires_grad=True)
    outputs = model(inputs_embeds=features, position_ids=positions(lengths))
    outputs.last_hidden_state[:, -lengths[-1] :, :8].sum().backward()
    reached = features.grad[0].any(-1)
    assert not reached[: -lengths[-1]].any()
    assert reached[-lengths[-1] :].all()


def test_packed_gradients_are_the_sum_over_documents():
    model, lengths = tiny_model(num_hidden_layers=2), (5, 1, 7)
    input_ids = tokens(1, sum(lengths))
    model(input_ids, position_ids=positions(lengths)).logits.square().sum().backward()
    packed = gradients(model)
    model.zero_grad()
    for document in input_ids.split(lengths, 1):
        model(document).logits.square().sum().backward()
    close(packed, gradients(model), tolerance=1e-8)


def test_each_row_may_have_its_own_documents():
    model, input_ids = tiny_model(), tokens(2, 12)
    rows = ((5, 7), (12,))
    position_ids = torch.cat([positions(lengths) for lengths in rows])
    packed = model(input_ids, position_ids=position_ids).logits
    for row, lengths in enumerate(rows):
        close(packed[row : row + 1], model(input_ids[row : row + 1], position_ids=positions(lengths)).logits)


def test_padding_between_documents():
    model, input_ids = tiny_model(), tokens(1, 10)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 1, 2, 3]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    packed = model(input_ids, position_ids=position_ids, attention_mask=attention_mask).logits
    close(packed[:, :4], model(input_ids[:, :4]).logits)
    close(packed[:, 6:], model(input_ids[:, 6:]).logits)


def test_position_zero_at_left_padding_does_not_clear_the_state():
    model, prompt, new = tiny_model(), tokens(1, 6), tokens(1, 3)
    past_key_values = model(prompt).past_key_values
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), new], 1)
    logits = model(
        padded,
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 6, 7, 8]]),
        past_key_values=past_key_values,
    ).logits
    close(logits[:, 2:], model(torch.cat([prompt, new], 1)).logits[:, 6:])


def test_position_zero_clears_the_state_at_hand():
    model, new = tiny_model(), tokens(2, 3)
    for position_ids, fresh in ((torch.arange(3)[None], True), (torch.arange(6, 9)[None], False)):
        past_key_values = model(tokens(2, 6)).past_key_values
        logits = model(new, position_ids=position_ids, past_key_values=past_key_values).logits
        assert torch.allclose(logits, model(new).logits) is fresh


def test_flattening_collator_trains_documents_apart():
    documents = [tokens(1, length)[0].tolist() for length in (6, 3, 8)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    model = tiny_model()
    alone = [model(torch.tensor([document]), labels=torch.tensor([document])).loss for document in documents]
    expected = sum(loss * (len(document) - 1) for loss, document in zip(alone, documents, strict=True)) / (5 + 2 + 7)
    close(model(**batch).loss, expected)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (5,)], ids=str)
def test_position_ids_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="position_ids has shape"):
        tiny_model()(tokens(2, 5), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("told", [{"return_seq_idx": True}, {"return_flash_attn_kwargs": True}], ids=str)
def test_documents_that_are_told_in_other_ways_alone_are_refused(told):
    model, documents = tiny_model(), [{"input_ids": list(range(1, length))} for length in (5, 8)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **told)(documents)
    same(model(**batch).logits, model(batch["input_ids"], position_ids=batch["position_ids"]).logits)
    del batch["position_ids"]
    with pytest.raises(ValueError, match=r"\w+ is given without position_ids"):
        model(**batch)


@pytest.mark.parametrize("given", [DynamicCache(), (), 3], ids=["without_layers", "tuple", "number"])
def test_a_token_memory_refuses_what_is_no_state_of_its_model(given):
    model = tiny_model(token_memory_size=6)
    with pytest.raises(ValueError, match=r"past_key_values .* is not the state of this model"):
        model(tokens(1, 4), position_ids=torch.arange(4)[None], past_key_values=given)


def test_packed_documents_begin_on_an_empty_cache():
    model = tiny_model(
        layer_types=["full_attention", "engram"], num_hidden_layers=2, num_attention_heads=2, token_memory_size=6
    )
    input_ids, position_ids = tokens(1, 8), positions((3, 5))
    found = model(input_ids, position_ids=position_ids, past_key_values=DynamicCache(config=model.config))
    close(found.logits, model(input_ids, position_ids=position_ids, use_cache=False).logits)


def test_a_later_document_leaves_the_first_its_random_start():
    model, input_ids = tiny_model(initial_state_std=0.5).train(), tokens(1, 6)
    starts = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]]
    logits = []
    for start in starts:
        torch.manual_seed(1)
        logits.append(model(input_ids, position_ids=torch.tensor([start])).logits)
    close(logits[1][:, :4], logits[0][:, :4])
    assert (logits[0] - model.eval()(input_ids).logits).abs().max() > 1e-3
