"""A text read again without what some token wrote: the difference that the write makes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, close, same, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_engram import EnnModel
from hf_engram.traces import counterfactual, record

CHECKPOINT = "model_cards/enn-books"


@pytest.fixture(scope="module", params=["stacked", "mixer", "hybrid"])
def model(request):
    return tiny_model(**ARCHITECTURES[request.param])


TOKENS = [
    (4, (4,)),
    ([7, 2], (2, 7)),
    (-3, (9,)),
    (torch.tensor(3), (3,)),
    (np.int64(2), (2,)),
    (torch.tensor([2, 5]), (2, 5)),
    ({3, 1}, (1, 3)),
    ([torch.tensor(3), np.int64(1)], (1, 3)),
]


@pytest.mark.parametrize(("erase", "erased"), TOKENS, ids=str)
def test_both_runs_are_those_of_the_model(model, erase, erased):
    input_ids = tokens(1, 12)
    result = counterfactual(model, input_ids, erase)
    assert result.erased == erased
    write_mask = torch.ones(1, 12, dtype=torch.bool)
    write_mask[:, list(erased)] = False
    close(result.original_logits, model(input_ids).logits[0].float(), 1e-6)
    close(result.logits_without, model(input_ids, write_mask=write_mask).logits[0].float(), 1e-6)
    for recording, inputs in ((result.original, {}), (result.without, {"write_mask": write_mask})):
        [expected] = record(model, input_ids, **inputs)
        for layer, other in zip(recording.layers, expected.layers, strict=True):
            close(layer.attribution.coefficients, other.attribution.coefficients)


def first_moved(recording, erased=4):
    """The first token that could recall what the erased one wrote: itself, where a layer writes before it recalls."""
    return erased if any(layer.recalls_itself for layer in recording.layers) else erased + 1


def test_erased_token_speaks_in_no_later_recall(model):
    result = counterfactual(model, tokens(1, 12), 4)
    first = first_moved(result.original)
    for before, after in zip(result.original.layers, result.without.layers, strict=True):
        close(before.recall[:first], after.recall[:first])
        assert (before.attribution.coefficients[5:, 4] > 0).all()
        assert (before.attribution.coefficients[4, 4] > 0) == before.recalls_itself
        assert not after.attribution.coefficients[:, 4].any()
        assert (before.recall[5:] - after.recall[5:]).abs().max() > 1e-3


def test_predictions_move_after_the_erased_token_only(model):
    result = counterfactual(model, tokens(1, 12), 4)
    moved, first = result.total_variation, first_moved(result.original)
    assert moved[:first].max() < 1e-6
    assert moved[first:].min() > 1e-6
    before, after = result.original_logits.softmax(-1), result.logits_without.softmax(-1)
    for step in (6, -1):
        close(moved[step], (after[step] - before[step]).clamp(min=0).sum(), 1e-6)
        changes = result.most_changed(step, count=40)
        assert sorted(change.token_id for change in changes) == list(range(40))
        sizes = [abs(change.after - change.before) for change in changes]
        assert sizes == sorted(sizes, reverse=True)
        for change in changes[:3]:
            assert change.before == pytest.approx(before[step, change.token_id].item())
            assert change.after == pytest.approx(after[step, change.token_id].item())
    assert len(result.most_changed()) == 10


def test_memory_that_is_carried_in_is_left_as_it_was(model):
    memory = model(tokens(1, 5), use_cache=True).past_key_values
    before, input_ids = copy.deepcopy(memory), tokens(1, 6)
    result = counterfactual(model, input_ids, 0, past_key_values=memory)
    assert memory.get_seq_length() == 5
    for layer, kept in zip(memory.layers, before.layers, strict=True):
        for now, then in zip(layer.state, kept.state, strict=True):
            same(now, then)
    for recorded in result.without.layers:
        trace = memory.layers[recorded.layer].state.trace[0]
        for part, carried in zip(recorded.heads or [recorded], trace if recorded.heads else [trace], strict=True):
            same(part.carried_trace, carried)
            assert part.attribution.carried.any()


def test_figure_shows_what_moved(model, tmp_path):
    result = counterfactual(model, tokens(1, 12), [4, 6])
    figure = result.plot(step=8, count=5)
    moved, changed = figure.axes
    close([bar.get_height() for bar in moved.patches], result.total_variation.tolist())
    assert [label.get_text() for label in changed.get_yticklabels()] == [
        change.token for change in reversed(result.most_changed(8, 5))
    ]
    figure.savefig(tmp_path / "figure.png")


def test_a_figure_of_tokens_with_dollars(model, tmp_path):
    result = counterfactual(model, tokens(1, 12), [4, 6])
    priced = replace(result.original, tokens=(" $5^$",) * 12)
    replace(result, original=priced).plot(step=4).savefig(tmp_path / "figure.png")


WRONG = {
    "no_such_token": ({"erase": 12}, r"erase is 12; allowed: one or more whole numbers from -12 to 11"),
    "mask": ({"erase": torch.arange(12) == 7}, r"(?s)erase is tensor\(\[False, .*; allowed"),
    "part": ({"erase": [1.5]}, r"erase is \[1.5\]; allowed"),
    "none": ({"erase": []}, r"erase is \[\]; allowed"),
    "two_rows": ({"erase": 1, "input_ids": tokens(2, 12)}, r"input_ids has shape \(2, 12\); expected \[1, tokens\]"),
    "padding": ({"erase": 1, "attention_mask": torch.tensor([[0] + [1] * 11])}, "attention_mask has zeros"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        counterfactual(model, **{"input_ids": tokens(1, 12), **arguments})


def test_a_change_is_looked_for_after_one_of_the_tokens(model):
    result = counterfactual(model, tokens(1, 12), 4)
    with pytest.raises(IndexError, match="step is 12; allowed: -12 to 11"):
        result.most_changed(step=12)
    with pytest.raises(ValueError, match="count is 0; allowed: 1 or more"):
        result.most_changed(count=0)


def test_only_language_models_have_next_tokens():
    with pytest.raises(TypeError, match="EnnModel; expected EnnForCausalLM"):
        counterfactual(tiny_model(EnnModel), tokens(1, 4), 0)


def test_text_of_changed_tokens_on_the_shipped_checkpoint():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    inputs = tokenizer("Mr. Darcy looked at Elizabeth, and Elizabeth looked at", return_tensors="pt")
    result = counterfactual(AutoModelForCausalLM.from_pretrained(CHECKPOINT), **inputs, erase=-3, tokenizer=tokenizer)
    assert result.original.tokens[-3] == " Elizabeth"
    for change in result.most_changed():
        assert change.token == tokenizer.decode([change.token_id])
        assert change.before != change.after
    assert result.total_variation[-2:].min() > 0


def test_a_name_that_comes_again_is_remembered_from_its_first_time():
    """The README's example."""
    tokenizer = AutoTokenizer.from_pretrained("model_cards/enn-wikitext103-mixer")
    model = AutoModelForCausalLM.from_pretrained("model_cards/enn-wikitext103-mixer")
    input_ids = tokenizer("Maria Kowalski was born in Warsaw. In 1994, Maria K", return_tensors="pt")["input_ids"]
    [change] = counterfactual(model, input_ids, erase=4, tokenizer=tokenizer).most_changed(count=1)
    assert (change.token, tokenizer.decode(input_ids[0, 4])) == ("ow", "ow")
    assert (round(change.before, 3), round(change.after, 3)) == (0.361, 0.002)
