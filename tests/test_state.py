"""`past_key_values` carries everything: a sequence read in parts is the sequence read at once."""

import copy

import pytest
import torch
from helpers import ARCHITECTURES, architectures, close, left_padded, same, state, tiny_model, tokens
from transformers import DynamicCache

from hf_engram import EnnForCausalLM, EnnForSequenceClassification, EnnModel, as_new_sequence

batch_sizes = pytest.mark.parametrize("batch", [1, 3])


def read_in_parts(model, input_ids, *splits, past_key_values=None):
    """Logits of all steps and the last state, reading `input_ids` part by part."""
    logits = []
    for part in input_ids.tensor_split(splits, dim=1):
        outputs = model(part, past_key_values=past_key_values, use_cache=True)
        past_key_values = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, 1), past_key_values


@architectures
@batch_sizes
def test_split_anywhere_equals_whole(architecture, batch):
    model, input_ids = tiny_model(**architecture), tokens(batch, 12)
    logits, past_key_values = read_in_parts(model, input_ids)
    for split in range(1, 12):
        split_logits, split_state = read_in_parts(model, input_ids, split)
        close(split_logits, logits)
        close(state(split_state), state(past_key_values))


@architectures
@pytest.mark.parametrize("splits", [(1,), (63,), (64,), (65, 66), (30, 100, 129)], ids=str)
def test_split_of_a_long_sequence_equals_whole(architecture, splits):
    model, input_ids = tiny_model(**architecture), tokens(2, 140)
    logits, past_key_values = read_in_parts(model, input_ids)
    split_logits, split_state = read_in_parts(model, input_ids, *splits)
    close(split_logits, logits)
    close(state(split_state), state(past_key_values))


@architectures
def test_prefill_and_single_steps_with_random_left_padding_equal_each_row_alone(architecture):
    model, lengths = tiny_model(**architecture), [9, 14, 5, 20]
    inputs = left_padded(lengths)
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    prefill = 16
    outputs = model(input_ids[:, :prefill], attention_mask=attention_mask[:, :prefill], use_cache=True)
    logits = [outputs.logits]
    for step in range(prefill, input_ids.shape[1]):
        outputs = model(
            input_ids[:, step : step + 1],
            attention_mask=attention_mask[:, : step + 1],
            past_key_values=outputs.past_key_values,
            use_cache=True,
        )
        logits.append(outputs.logits)
    logits = torch.cat(logits, 1)
    for row, length in enumerate(lengths):
        alone = model(input_ids[row : row + 1, -length:], use_cache=True)
        close(logits[row : row + 1, -length:], alone.logits)
        close(state(outputs.past_key_values, [row]), state(alone.past_key_values))


def test_the_state_matters():
    model, input_ids = tiny_model(), tokens(1, 6)
    with_past = read_in_parts(model, input_ids, 5)[0][:, -1]
    assert (with_past - model(input_ids[:, 5:]).logits[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("model_class", [EnnModel, EnnForCausalLM, EnnForSequenceClassification])
def test_state_comes_only_on_request(model_class):
    model, input_ids = tiny_model(model_class), tokens(1, 4)
    assert isinstance(model(input_ids).past_key_values, DynamicCache)
    assert model(input_ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(input_ids).past_key_values is None


def test_state_is_float32_with_a_size_that_does_not_depend_on_the_length():
    model = tiny_model(dtype=torch.bfloat16)
    short, long = (model(tokens(2, steps), use_cache=True).past_key_values for steps in (1, 100))
    assert [tensor.dtype for tensor in state(long)] == [torch.bfloat16, torch.float32]
    for before, after in zip(state(short), state(long), strict=True):
        assert before.shape == after.shape
        assert before.untyped_storage().nbytes() == after.untyped_storage().nbytes()


@architectures
@pytest.mark.parametrize("steps", [1, 2, 100, 300])
@pytest.mark.parametrize("plastic", [True, False])
def test_a_stored_state_holds_no_more_than_itself_and_never_changes(architecture, steps, plastic):
    model = tiny_model(**architecture)
    past_key_values = model(tokens(2, 3)).past_key_values
    before = [layer.state for layer in past_key_values.layers]
    copies = copy.deepcopy(before)
    model(tokens(2, steps), past_key_values=past_key_values, plastic=plastic)
    same(before, copies)
    for layer in past_key_values.layers:
        for tensor in layer.state:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert not any(tensor is old for state in before for old in state)


def test_sequence_length_counts_tokens_and_padding():
    model, inputs = tiny_model(), left_padded([3, 5])
    past_key_values = model(**inputs).past_key_values
    assert past_key_values.get_seq_length() == 5
    assert model(tokens(2, 1), past_key_values=past_key_values).past_key_values.get_seq_length() == 6
    assert as_new_sequence(past_key_values).get_seq_length() == 0


def test_branches_of_a_copied_state_are_independent():
    model, input_ids = tiny_model(), tokens(1, 8)
    trunk = model(input_ids[:, :4]).past_key_values
    before = [tensor.clone() for tensor in state(trunk)]
    branch = copy.deepcopy(trunk)
    close(
        model(input_ids[:, 4:], past_key_values=branch).logits,
        model(input_ids).logits[:, 4:],
    )
    same(state(trunk), before)
    close(model(tokens(1, 4), past_key_values=trunk).past_key_values.get_seq_length(), 8)


def test_rows_of_a_state_can_be_reordered_repeated_and_selected():
    model, input_ids = tiny_model(), tokens(3, 6)

    def prefilled():
        return model(input_ids).past_key_values

    original = prefilled()
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for method, (argument, rows) in changes.items():
        changed = prefilled()
        getattr(changed, method)(argument)
        same(state(changed), state(original, rows))
        next_ids = tokens(len(rows), 2)
        expected = model(torch.cat([input_ids[rows], next_ids], 1)).logits[:, -2:]
        close(model(next_ids, past_key_values=changed).logits, expected)


def test_reset_state_starts_afresh():
    model, input_ids = tiny_model(), tokens(2, 6)
    past_key_values = model(tokens(2, 9)).past_key_values
    past_key_values.reset()
    assert past_key_values.get_seq_length() == 0
    same(model(input_ids, past_key_values=past_key_values).logits, model(input_ids).logits)


def test_state_cannot_be_cropped():
    past_key_values = tiny_model()(tokens(1, 4)).past_key_values
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        past_key_values.crop(2)


def other_kind_of_cache():
    return DynamicCache()


def other_number_of_layers():
    return tiny_model(num_hidden_layers=2)(tokens(2, 3)).past_key_values


def other_hidden_size():
    return tiny_model(hidden_size=12)(tokens(2, 3)).past_key_values


def other_memory_size():
    return tiny_model(memory_size=4)(tokens(2, 3)).past_key_values


def other_batch_size():
    return tiny_model()(tokens(3, 3)).past_key_values


def tuple_of_tensors():
    return ((torch.zeros(2, 16), torch.zeros(2, 8, 16)),)


@pytest.mark.parametrize(
    "past_key_values",
    [
        other_kind_of_cache,
        other_number_of_layers,
        other_hidden_size,
        other_memory_size,
        other_batch_size,
        tuple_of_tensors,
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_state_that_does_not_fit_is_refused(past_key_values, steps):
    with pytest.raises(ValueError, match="past_key_values"):
        tiny_model()(tokens(2, steps), past_key_values=past_key_values())


@pytest.mark.parametrize("steps", [1, 3])
def test_state_of_a_model_in_another_dtype_is_taken_over(steps):
    model, prompt, new = tiny_model(dtype=torch.float32), tokens(2, 8), tokens(2, steps)
    expected = model(new, past_key_values=model(prompt).past_key_values).logits
    past_key_values = tiny_model(dtype=torch.float64)(prompt).past_key_values
    outputs = model(new, past_key_values=past_key_values)
    close(outputs.logits, expected, tolerance=1e-4)
    assert {tensor.dtype for tensor in state(outputs.past_key_values)} == {torch.float32}


def test_state_is_kept_apart_from_the_graph_that_made_it():
    model, input_ids = tiny_model(), tokens(2, 8)
    model.train()
    past_key_values = None
    for _ in range(2):
        outputs = model(input_ids, labels=input_ids, past_key_values=past_key_values, use_cache=True)
        outputs.loss.backward()
        past_key_values = outputs.past_key_values
    assert not any(tensor.requires_grad for tensor in state(past_key_values))


def test_changing_one_row_leaves_the_others_bit_equal():
    for architecture in ARCHITECTURES.values():
        model, input_ids = tiny_model(**architecture), tokens(4, 70)
        changed = input_ids.clone()
        changed[1] = tokens(1, 70)
        before, after = model(input_ids), model(changed)
        others = [0, 2, 3]
        same(after.logits[others], before.logits[others])
        same(state(after.past_key_values, others), state(before.past_key_values, others))
        assert (after.logits[1] != before.logits[1]).any()


@pytest.mark.parametrize("steps", [1, 70])
def test_row_under_the_clip_does_not_feel_a_clipped_neighbour(steps):
    model = tiny_model(EnnModel, vocab_size=None, embedding_size=16, trace_clip=1.0, use_layer_norm=False)
    quiet, loud = 0.1 * torch.randn(1, steps, 16).double(), 100 * torch.randn(1, steps, 16).double()
    with_quiet, with_loud = (
        model(inputs_embeds=torch.cat([quiet, neighbour, quiet])) for neighbour in (quiet.flip(-1), loud)
    )
    assert with_quiet.past_key_values.layers[0].state.trace.abs().max() < 1
    assert with_loud.past_key_values.layers[0].state.trace.abs().max() == 1
    for row in (0, 2):
        same(with_loud.last_hidden_state[row], with_quiet.last_hidden_state[row])
        same(state(with_loud.past_key_values, row), state(with_quiet.past_key_values, row))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_evaluation_is_deterministic_and_training_with_noise_is_not(scope):
    noisy = {"trace_noise": 0.1, "initial_state_std": 0.1, "trace_scope": scope}
    model, input_ids = tiny_model(**noisy), tokens(2, 8)
    same(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert (model(input_ids).logits != model(input_ids).logits).any()


def test_batch_trace_is_shared_by_the_rows():
    model, input_ids = tiny_model(trace_scope="batch"), tokens(3, 8)
    trace = model(input_ids).past_key_values.layers[0].state.trace
    same(trace[1:], trace[:1].expand(2, -1, -1))


@pytest.mark.parametrize("steps", [1, 5])
def test_empty_batch_and_length_one_work_and_length_zero_says_no(steps):
    model = tiny_model()
    assert model(tokens(0, steps)).logits.shape == (0, steps, 40)
    assert model(tokens(1, 1)).logits.shape == (1, 1, 40)
    with pytest.raises(ValueError, match="no steps"):
        model(tokens(2, 0))
