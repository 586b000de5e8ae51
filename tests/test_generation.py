"""`generate` gives the same with and without state, alone and in a batch, at once and resumed."""

import copy

import pytest
import torch
from helpers import architectures, close, left_padded, same, state, tiny_model, tokens
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from hf_engram import as_new_sequence

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beam_search": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "top_k": 10},
    "return_sequences": {"num_return_sequences": 3, "do_sample": True},
    "return_beams": {"num_return_sequences": 2, "num_beams": 4},
    "early_stopping_beams": {"num_beams": 3, "early_stopping": True, "eos_token_id": [5, 11, 17, 23, 29]},
}
STATES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked_prefill": {"prefill_chunk_size": 3},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
prompts = pytest.mark.parametrize("lengths", [[7], [5, 8, 3]], ids=["one_row", "three_rows"])


def generate(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    defaults = {
        "max_new_tokens": 10,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 1,
    }
    return model.generate(**{**defaults, **kwargs})


def unpadded(inputs, row):
    return {"input_ids": inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]}


@modes
@prompts
@pytest.mark.parametrize("kind", STATES.values(), ids=STATES)
def test_generation_with_state_equals_without(mode, lengths, kind):
    model, inputs = tiny_model(), left_padded(lengths)
    without = generate(model, **inputs, **mode, use_cache=False)
    with_state = generate(model, **inputs, **mode, **kind)
    same(with_state.sequences, without.sequences)
    close(with_state.scores, without.scores, tolerance=1e-6)  # scores are float32
    assert without.past_key_values is None
    assert with_state.past_key_values.get_seq_length() == with_state.sequences.shape[1] - 1
    assert len(with_state.sequences[:, max(lengths) :].unique()) > 3


@architectures
@pytest.mark.parametrize("mode", [MODES["greedy"], MODES["beam_search"]], ids=["greedy", "beam_search"])
def test_every_architecture_generates_with_state_as_without(architecture, mode):
    model, inputs = tiny_model(**architecture), left_padded([70, 4])
    same(
        generate(model, **inputs, **mode).sequences,
        generate(model, **inputs, **mode, use_cache=False).sequences,
    )


@pytest.mark.parametrize("mode", ["greedy", "beam_search", "return_beams", "early_stopping_beams"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_of_a_batch_equals_each_row_alone(mode, use_cache):
    model, inputs = tiny_model(), left_padded([5, 8, 3])
    together = generate(model, **inputs, **MODES[mode], use_cache=use_cache).sequences[:, 8:]
    rows = len(together) // 3
    for row in range(3):
        alone = generate(model, **unpadded(inputs, row), **MODES[mode], use_cache=use_cache).sequences
        alone = alone[:, inputs["attention_mask"][row].sum() :]
        mine = together[row * rows : (row + 1) * rows]
        same(mine[:, : alone.shape[1]], alone)
        assert (mine[:, alone.shape[1] :] == 1).all()


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("kind", STATES.values(), ids=STATES)
def test_padding_of_a_prompt_anywhere_changes_nothing(side, kind):
    model, prompt = tiny_model(), tokens(1, 6)
    layout = {"left": [0, 0, 0, 1, 1, 1, 1, 1, 1], "right": [1] * 6 + [0] * 3, "interior": [1, 1, 0, 1, 0, 0, 1, 1, 1]}
    attention_mask = torch.tensor([layout[side]])
    padded = torch.zeros(1, 9, dtype=torch.long).masked_scatter(attention_mask.bool(), prompt)
    alone = generate(model, input_ids=prompt)
    outputs = generate(model, input_ids=padded, attention_mask=attention_mask, **kind)
    same(outputs.sequences[:, 9:], alone.sequences[:, 6:])
    close(state(outputs.past_key_values), state(alone.past_key_values))


def test_sampling_repeats_with_its_seed():
    model, inputs = tiny_model(), left_padded([5, 8])
    first, again, other = (generate(model, seed, **inputs, do_sample=True).sequences for seed in (1, 1, 2))
    same(again, first)
    assert (other != first).any()


@prompts
@pytest.mark.parametrize("given", ["all_ids", "new_ids"])
@pytest.mark.parametrize("mode", ["greedy", "beam_search"])
@pytest.mark.parametrize("kind", [{}, {"prefill_chunk_size": 2}], ids=["at_once", "in_chunks"])
def test_resumed_generation_equals_one_run(lengths, given, mode, kind):
    model, inputs = tiny_model(), left_padded(lengths)
    first = generate(model, **inputs, max_new_tokens=4)
    assert first.past_key_values.get_seq_length() == max(lengths) + 3
    new_ids = tokens(len(lengths), 3)
    input_ids = torch.cat([first.sequences, new_ids], 1)
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 7, dtype=torch.long)], 1)
    one_run = generate(model, input_ids=input_ids, attention_mask=attention_mask, **MODES[mode])
    # The last token that `generate` returned has not been read yet.
    resumed_ids = input_ids if given == "all_ids" else input_ids[:, -4:]
    resumed = generate(
        model,
        input_ids=resumed_ids,
        attention_mask=attention_mask,
        past_key_values=copied_for_beams(first.past_key_values, MODES[mode]),
        **MODES[mode],
        **kind,
    )
    same(resumed.sequences[:, resumed_ids.shape[1] :], one_run.sequences[:, input_ids.shape[1] :])


def copied_for_beams(past_key_values, mode):
    past_key_values = copy.deepcopy(past_key_values)
    past_key_values.batch_repeat_interleave(mode.get("num_beams", 1))
    return past_key_values


@prompts
def test_new_sequence_on_an_old_memory(lengths):
    model, past, inputs = tiny_model(), tokens(len(lengths), 9), left_padded(lengths)
    past_key_values = as_new_sequence(model(past).past_key_values)
    generated = generate(model, **inputs, past_key_values=past_key_values).sequences[:, max(lengths) :]
    attention_mask = torch.cat([torch.ones_like(past), inputs["attention_mask"]], 1)
    whole = generate(model, input_ids=torch.cat([past, inputs["input_ids"]], 1), attention_mask=attention_mask)
    same(generated, whole.sequences[:, 9 + max(lengths) :])


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("kind", [{}, {"prefill_chunk_size": 2}], ids=["at_once", "in_chunks"])
def test_prompt_that_the_state_has_already_seen_is_refused(length, kind):
    model, prompt = tiny_model(), tokens(1, 9)
    past_key_values = model(prompt).past_key_values
    with pytest.raises(ValueError, match="as_new_sequence"):
        generate(model, input_ids=prompt[:, :length], past_key_values=past_key_values, **kind)


def token_that_stops_rows_apart(model, inputs):
    """The token whose first appearances in the generated rows lie furthest apart."""
    generated = generate(model, **inputs).sequences[:, inputs["input_ids"].shape[1] :].tolist()

    def stops(token):
        return [row.index(token) if token in row else len(row) for row in generated]

    def distance(token):
        return max(stops(token)) - min(stops(token))

    token = max({token for row in generated for token in row}, key=distance)
    assert distance(token) >= 4
    return token


class StopOn(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def stop_on(how, token):
    if how == "criteria":
        return {"stopping_criteria": StoppingCriteriaList([StopOn(token)])}
    return {"eos_token_id": token, "pad_token_id": token if how == "pad_is_eos" else 1}


@architectures
@pytest.mark.parametrize("how", ["eos", "pad_is_eos", "criteria"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_rows_that_have_finished_stay_frozen(architecture, how, do_sample):
    model, inputs = tiny_model(**architecture), left_padded([5, 8, 3])
    token = token_that_stops_rows_apart(model, inputs)
    sampled = {"do_sample": do_sample, "top_k": 1}
    together = generate(model, **inputs, **stop_on(how, token), **sampled)
    for row in range(3):
        alone = generate(model, **unpadded(inputs, row), **stop_on(how, token), **sampled)
        close(state(together.past_key_values, [row]), state(alone.past_key_values))


@pytest.mark.parametrize("padded", [False, True])
def test_rows_finish_without_state_too(padded):
    model, inputs = tiny_model(), left_padded([5, 8, 3] if padded else [6, 6])
    token = token_that_stops_rows_apart(model, inputs)
    if not padded:
        del inputs["attention_mask"]
    with_state, without = (generate(model, **inputs, eos_token_id=token, use_cache=flag) for flag in (True, False))
    same(with_state.sequences, without.sequences)


def test_finished_rows_of_one_call_do_not_freeze_the_next():
    model, inputs = tiny_model(), left_padded([5, 8])
    expected = generate(model, **inputs).sequences
    generate(model, **inputs, stopping_criteria=StoppingCriteriaList([StopOn(expected[0, 8].item())]))
    same(generate(model, **inputs).sequences, expected)


def test_training_on_the_state_of_an_inference_run():
    model, prompt, text = tiny_model(num_hidden_layers=2), tokens(2, 6), tokens(2, 70)
    with torch.inference_mode():
        past_key_values = generate(model, input_ids=prompt).past_key_values
        expected = model(text, past_key_values=copy.deepcopy(past_key_values)).logits.clone()
    model.train()
    for ids in (text, text[:, :1]):
        outputs = model(ids, labels=text[:, : ids.shape[1]], past_key_values=copy.deepcopy(past_key_values))
        close(outputs.logits, expected[:, : ids.shape[1]])
        outputs.logits.sum().backward()
    model(text, labels=text, past_key_values=past_key_values).loss.backward()


def test_generation_in_training_mode():
    model, prompt = tiny_model(), tokens(2, 6)
    expected = generate(model, input_ids=prompt).sequences
    model.train()
    same(generate(model, input_ids=prompt).sequences, expected)


@pytest.mark.parametrize("mode", ["greedy", "beam_search"])
def test_generation_from_features(mode):
    model, inputs = tiny_model(), left_padded([5, 8])
    expected = generate(model, **inputs, **MODES[mode]).sequences[:, 8:]
    features = model.get_input_embeddings()(inputs["input_ids"])
    outputs = generate(model, inputs_embeds=features, attention_mask=inputs["attention_mask"], **MODES[mode])
    same(outputs.sequences, expected)


def test_generation_from_nothing_but_a_first_token():
    model = tiny_model(bos_token_id=3)
    same(generate(model).sequences, generate(model, input_ids=torch.tensor([[3]])).sequences)


def test_generation_with_position_ids_of_packed_documents():
    model, input_ids = tiny_model(), tokens(1, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = generate(model, input_ids=input_ids, position_ids=position_ids).sequences[:, 9:]
    same(packed, generate(model, input_ids=input_ids[:, 4:]).sequences[:, 5:])


def test_one_prompt_fans_out_to_many_continuations():
    model, prompt = tiny_model(), tokens(1, 7)
    past_key_values = model(prompt[:, :-1]).past_key_values
    past_key_values.batch_repeat_interleave(4)
    repeated = prompt.repeat(4, 1)
    fanned = generate(model, input_ids=repeated, past_key_values=past_key_values, do_sample=True).sequences
    same(fanned, generate(model, input_ids=repeated, do_sample=True).sequences)


def test_tokens_arrive_one_by_one():
    class Collector(TextStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.pieces.append("end")

    model, prompt, collector = tiny_model(), tokens(1, 5), Collector()
    sequence = generate(model, input_ids=prompt, streamer=collector).sequences[0].tolist()
    assert collector.pieces == [sequence[:5], *([token] for token in sequence[5:]), "end"]


def test_generation_returns_what_it_recorded():
    model, prompt = tiny_model(num_hidden_layers=2), tokens(2, 5)
    outputs = generate(model, input_ids=prompt, output_hidden_states=True, output_logits=True, max_new_tokens=3)
    assert [[tuple(layer.shape) for layer in step] for step in outputs.hidden_states] == [
        [(2, 5, 16)] * 3,
        [(2, 1, 16)] * 3,
        [(2, 1, 16)] * 3,
    ]
    whole = model(outputs.sequences[:, :-1]).logits[:, 4:].float()
    close(torch.stack(outputs.logits, 1), whole, tolerance=1e-6)


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": True}], ids=str)
def test_assisted_decoding_says_why_not(option):
    if "assistant_model" in option:
        option = {"assistant_model": tiny_model()}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(tiny_model(), input_ids=tokens(1, 5), **option)


def test_state_of_another_model_is_refused_by_generate():
    with pytest.raises(ValueError, match="past_key_values"):
        generate(tiny_model(), input_ids=tokens(1, 5), past_key_values=DynamicCache())


def test_generation_config_holds_nothing_of_the_model():
    generation_config = tiny_model(bos_token_id=1, eos_token_id=2).generation_config.to_diff_dict()
    of_every_model = {"use_cache", "output_attentions", "output_hidden_states"}
    about_the_file = {"_from_model_config", "transformers_version"}
    assert generation_config.keys() - of_every_model - about_the_file == {"bos_token_id", "eos_token_id"}
