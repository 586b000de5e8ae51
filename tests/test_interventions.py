"""Erasing writes, freezing plasticity, switching slots off: `write_mask`, `plastic`, `slot_mask`."""

import pytest
import torch
from helpers import TINY, architectures, close, same, state, tiny_model, tokens, traces_in

from hf_engram import EnnModel

SLOTS = TINY["memory_size"]


def all_but(length, *indices):
    mask = torch.ones(length, dtype=torch.bool)
    mask[list(indices)] = False
    return mask


def test_an_erased_token_leaves_nothing_in_the_trace_but_the_decay_of_its_step():
    model = tiny_model()
    before = model(tokens(2, 5), use_cache=True).past_key_values
    start = state(before)[1].clone()
    erased = model(tokens(2, 1), past_key_values=before, use_cache=True, write_mask=torch.tensor([[False]]))
    close(state(erased.past_key_values)[1], (1 - TINY["hebbian_lr"]) * start)


@architectures
def test_erasing_changes_nothing_up_to_the_erased_token_and_something_after_it(architecture):
    model, input_ids = tiny_model(**architecture), tokens(2, 20)
    plain = model(input_ids, output_recall=True)
    erased = model(input_ids, write_mask=all_but(20, 7)[None], output_recall=True)
    # A cell recalls before it writes, a mixer after.
    unchanged = 7 if "engram_mixer" in model.config.layer_types else 8
    for before, after in zip(plain.recall, erased.recall, strict=True):
        close(before[:, :unchanged], after[:, :unchanged])
    assert (plain.logits[:, 8:] - erased.logits[:, 8:]).abs().max() > 1e-3


@architectures
def test_all_ways_of_reading_agree_on_what_is_erased(architecture, monkeypatch):
    model, input_ids, mask = tiny_model(**architecture), tokens(2, 70), torch.rand(2, 70) > 0.3
    whole = model(input_ids, write_mask=mask, use_cache=True)
    first = model(input_ids[:, :33], write_mask=mask[:, :33], use_cache=True)
    rest = model(input_ids[:, 33:], write_mask=mask[:, 33:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, rest.logits], 1), whole.logits)
    monkeypatch.setenv("HF_ENGRAM_SCAN", "definition")
    close(model(input_ids, write_mask=mask).logits, whole.logits)


def test_one_row_erased_leaves_the_others_bit_equal():
    model, input_ids = tiny_model(), tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 4] = False
    plain, erased = model(input_ids).logits, model(input_ids, write_mask=mask).logits
    same(erased[[0, 2]], plain[[0, 2]])
    assert not torch.equal(erased[1], plain[1])


def test_generate_erases_tokens_of_the_prompt():
    model, prompt, mask = tiny_model(), tokens(1, 10), all_but(10, 2, 3)[None]
    logits = model(prompt, write_mask=mask, use_cache=True)
    expected = logits.past_key_values
    output = model.generate(
        prompt, write_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    close(output.logits[0], logits.logits[:, -1].float(), 1e-6)
    again = model(output.sequences[:, 10:-1], past_key_values=expected, use_cache=True)
    close(state(output.past_key_values), state(again.past_key_values))


@architectures
def test_a_frozen_trace_is_read_but_not_changed(architecture):
    model = tiny_model(**architecture)
    past_key_values = model(tokens(2, 9), use_cache=True).past_key_values
    before = [trace.clone() for trace in traces_in(past_key_values)]
    input_ids = tokens(2, 70)
    outputs = model(input_ids, past_key_values=past_key_values, use_cache=True, plastic=False)
    same(traces_in(outputs.past_key_values), before)
    empty = model(input_ids, plastic=False)
    assert (outputs.logits - empty.logits).abs().max() > 1e-3


def test_generate_keeps_a_frozen_trace():
    model = tiny_model()
    past_key_values = model(tokens(1, 9), use_cache=True).past_key_values
    trace = state(past_key_values)[1].clone()
    new = {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 13, dtype=torch.long)}
    output = model.generate(
        **new, past_key_values=past_key_values, plastic=False, max_new_tokens=6, return_dict_in_generate=True
    )
    same(state(output.past_key_values)[1], trace)


@architectures
@pytest.mark.parametrize("steps", [1, 70])
def test_slots_switched_off_are_neither_recalled_nor_written(architecture, steps):
    model = tiny_model(**architecture)
    past_key_values = model(tokens(2, 9), use_cache=True).past_key_values
    before = [trace.clone() for trace in traces_in(past_key_values)]
    mask = all_but(SLOTS, 1, 5)
    outputs = model(
        tokens(2, steps), past_key_values=past_key_values, use_cache=True, slot_mask=mask, output_recall=True
    )
    for recall, old, new in zip(outputs.recall, before, traces_in(outputs.past_key_values), strict=True):
        assert recall.shape in ((2, steps, SLOTS), (2, steps, model.config.num_attention_heads, SLOTS))
        assert recall[..., ~mask].count_nonzero() == 0
        close(recall.sum(-1), torch.ones(recall.shape[:-1], dtype=recall.dtype))
        same(new[..., ~mask, :], old[..., ~mask, :])
        assert not torch.equal(new[..., mask, :], old[..., mask, :])


def test_slots_may_be_switched_off_in_one_layer_only():
    model = tiny_model(num_hidden_layers=2)
    mask = torch.ones(2, SLOTS, dtype=torch.bool)
    mask[1, 3] = False
    recall = model(tokens(2, 6), slot_mask=mask, output_recall=True).recall
    assert recall[0][..., 3].min() > 0
    assert recall[1][..., 3].count_nonzero() == 0


def test_generate_keeps_slots_switched_off():
    model, mask = tiny_model(), all_but(SLOTS, 0)
    output = model.generate(tokens(1, 4), slot_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
    assert state(output.past_key_values)[1][:, 0].count_nonzero() == 0


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], ids=str
)
@pytest.mark.parametrize("rows", [1, 2])
def test_masks_for_all_rows_fan_out_with_them(mode, rows):
    model, prompt = tiny_model(num_hidden_layers=2), tokens(rows, 7)
    slots = torch.ones(2, SLOTS, dtype=torch.bool)
    slots[1, 3] = slots[0, 1] = False
    options = {"max_new_tokens": 5, "pad_token_id": 0, "slot_mask": slots, **mode}
    found = model.generate(prompt, write_mask=all_but(7, 2)[None], **options)
    same(found, model.generate(prompt, write_mask=all_but(7, 2).expand(rows, 7), **options))
    assert not torch.equal(found, model.generate(prompt, **{**options, "slot_mask": None}))


@pytest.mark.parametrize("given", ["all_ids", "new_ids"])
@pytest.mark.parametrize("seen", [0, 4])
@pytest.mark.parametrize("kind", [{}, {"prefill_chunk_size": 2}], ids=["at_once", "in_chunks"])
def test_generate_erases_the_same_tokens_in_parts_as_at_once(given, seen, kind):
    model, prompt = tiny_model(num_hidden_layers=2), tokens(1, 9)
    mask = all_but(9, 5, 6)[None]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(prompt, write_mask=mask, **options)
    past_key_values = model(prompt[:, :seen], use_cache=True).past_key_values if seen else None
    first = 0 if given == "all_ids" else seen
    found = model.generate(
        prompt[:, first:],
        attention_mask=torch.ones_like(prompt),
        write_mask=mask[:, first:],
        past_key_values=past_key_values,
        **options,
        **kind,
    )
    close(found.logits, expected.logits)
    close(state(found.past_key_values), state(expected.past_key_values))
    assert (found.logits[0] - model.generate(prompt, **options).logits[0]).abs().max() > 1e-3


def test_generate_refuses_a_write_mask_that_is_longer_than_the_prompt():
    model, prompt = tiny_model(), tokens(1, 9)
    past_key_values = model(prompt[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"write_mask has shape \(1, 9\); expected at most 5 columns"):
        model.generate(
            prompt[:, 4:],
            attention_mask=torch.ones_like(prompt),
            past_key_values=past_key_values,
            write_mask=all_but(9, 1)[None],
            max_new_tokens=2,
        )


def test_generate_from_features_refuses_a_write_mask():
    model = tiny_model()
    features = model.get_input_embeddings()(tokens(2, 6))
    with pytest.raises(ValueError, match="write_mask goes with input_ids in `generate`; given: inputs_embeds"):
        model.generate(inputs_embeds=features, write_mask=all_but(6, 1)[None], max_new_tokens=2)


def test_encodings_are_what_is_written():
    model = tiny_model(EnnModel)
    outputs = model(tokens(2, 1), use_cache=True, output_encodings=True, output_recall=True)
    written = TINY["hebbian_lr"] * torch.einsum("btn,bth->bnh", outputs.recall[0], outputs.encodings[0])
    close(state(outputs.past_key_values)[1], written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"write_mask": torch.ones(2, 5, dtype=torch.bool)}, r"write_mask has shape \(2, 5\); expected \(2, 6\)"),
        ({"slot_mask": torch.ones(5, dtype=torch.bool)}, r"slot_mask has shape \(5,\); expected \(8,\)"),
        ({"slot_mask": torch.zeros(8, dtype=torch.bool)}, "switches off every slot"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens(2, 6), **arguments)
