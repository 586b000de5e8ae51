"""What a recorder sees: whole and stepwise runs, `generate`, and nothing of others; what it refuses."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from helpers import ARCHITECTURES, BOOKS, close, kinds, left_padded, same, tiny_inputs, tiny_model, tokens
from memories import memories, recalled_by_definition, sum_of_parts
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_engram import EnnForImageClassification, EnnForSequenceClassification, EnnModel, as_new_sequence
from hf_engram.traces import Recorder, record

# Generation


@kinds
@pytest.mark.parametrize(
    "how",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"do_sample": True}],
    ids=["greedy", "static", "chunked_prefill", "sampling"],
)
@pytest.mark.parametrize("lengths", [[7], [5, 8, 3]], ids=["one_row", "three_rows"])
def test_generation_is_recorded_as_it_happens(how, lengths, kind):
    model, inputs = tiny_model(**kind), left_padded(lengths)
    how = {"max_new_tokens": 10, "pad_token_id": 1, "eos_token_id": [5, 11, 17], **how}
    torch.manual_seed(0)
    plain = model.generate(**inputs, **how)
    torch.manual_seed(0)
    recorder = Recorder(model)
    with recorder:
        sequences = model.generate(**inputs, **how)
    same(sequences, plain)
    for row, recording in enumerate(recorder.recordings()):
        prompt = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
        text = torch.cat([prompt, sequences[row, max(lengths) :]])[: len(recording)]
        same(recording.token_ids, text)
        assert len(recording) >= len(prompt)
        [read] = record(model, text[None])
        for generated, expected in zip(memories(recording), memories(read), strict=True):
            close(generated.recall, expected.recall)
            close(generated.attribution.coefficients, expected.attribution.coefficients)
            close(generated.trace(), expected.trace())


def test_rows_that_have_finished_are_not_recorded_further():
    model, inputs = tiny_model(), left_padded([5, 8, 3])
    recorder = Recorder(model)
    with recorder:
        sequences = model.generate(**inputs, max_new_tokens=12, pad_token_id=1, eos_token_id=list(range(3, 40, 4)))
    lengths = [len(recording) for recording in recorder.recordings()]
    # Every token but the last one of a row has been read; a row that ended has padding behind its last one.
    generated = [(row[8:] != 1).sum().item() for row in sequences]
    assert lengths == [prompt + new - 1 for prompt, new in zip([5, 8, 3], generated, strict=True)]
    assert len(set(generated)) > 1


def test_recorder_keeps_only_recall_and_encoding_per_token():
    model = tiny_model()
    recorder = Recorder(model)
    with recorder:
        model.generate(tokens(1, 4), max_new_tokens=20, min_new_tokens=20)
    held = sum(t.untyped_storage().size() for packet in recorder.packets for t in (*packet.recall, *packet.encodings))
    assert held == 23 * (8 + 16) * 8  # float64


@kinds
def test_recorder_may_be_entered_for_one_step_at_a_time(kind):
    model, input_ids = tiny_model(**kind), tokens(1, 6)
    memory, recorder = DynamicCache(config=model.config), Recorder(model)
    for t in range(6):
        with recorder:
            model(input_ids[:, t : t + 1], past_key_values=memory)
        assert recorder.packets[-1].recall[0].shape[:2] == (1, 1)
        memory = copy.deepcopy(memory)
        as_new_sequence(memory)
    [stepwise], [whole] = recorder.recordings(), record(model, input_ids)
    for steps, once in zip(memories(stepwise), memories(whole), strict=True):
        close(steps.attribution.coefficients, once.attribution.coefficients)


# What recording leaves alone, and what it refuses


@kinds
def test_model_is_as_before_after_recording(kind):
    model, input_ids = tiny_model(**kind), tokens(1, 6)
    with Recorder(model) as recorder:
        model(input_ids)
    before = len(recorder.packets)
    outputs = model(input_ids)
    assert len(recorder.packets) == before == 1
    assert not {"recall", "encodings", "reads"} & outputs.keys()


def test_other_threads_on_the_same_model_are_not_recorded():
    model, input_ids = tiny_model(), tokens(1, 6)
    seen = []
    other = threading.Thread(target=lambda: seen.append(model(tokens(2, 3)).keys()))
    with Recorder(model) as recorder:
        other.start()
        other.join()
        model(input_ids)
    [recording] = recorder.recordings()
    same(recording.token_ids, input_ids[0])
    assert not {"recall", "encodings", "reads"} & seen[0]


@pytest.mark.parametrize("hooks", ["_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"])
def test_other_threads_may_run_while_a_recorder_is_entered(hooks):
    model, input_ids, seen = tiny_model(), tokens(1, 6), []

    class Meanwhile(OrderedDict):
        """Where torch notes that a hook wants keyword arguments: just before it does, another thread runs the model."""

        def __setitem__(self, key, value):
            other = threading.Thread(target=lambda: seen.append(model(tokens(2, 3)).logits.shape))
            other.start()
            other.join()
            super().__setitem__(key, value)

    setattr(model.model, hooks, Meanwhile(getattr(model.model, hooks)))
    with Recorder(model) as recorder:
        model(input_ids)
    assert seen == [(2, 3, 40)]
    same(recorder.recordings()[0].token_ids, input_ids[0])


@kinds
@pytest.mark.parametrize("model_class", [EnnModel, EnnForSequenceClassification, EnnForImageClassification])
def test_every_model_can_be_recorded(model_class, kind):
    model = tiny_model(model_class, **kind)
    recordings = record(model, **tiny_inputs(model))
    assert len(recordings) == 3
    for memory in memories(recordings[2]):
        close(sum_of_parts(memory.attribution), recalled_by_definition(memory))
    if model_class is EnnForImageClassification:
        assert recordings[0].token_ids is None
        assert recordings[0].tokens == tuple(map(str, range(8)))


def test_arguments_by_position_are_recorded_too():
    model, input_ids = tiny_model(EnnModel), tokens(1, 5)
    with Recorder(model) as recorder:
        model(input_ids, torch.tensor([[0, 1, 1, 1, 1]]))
    same(recorder.recordings()[0].token_ids, input_ids[0, 1:])


def test_tokens_are_named_by_the_tokenizer_or_by_their_ids():
    [recording] = record(tiny_model(), torch.tensor([[7, 9, 4]]))
    assert recording.tokens == ("7", "9", "4")
    tokenizer = AutoTokenizer.from_pretrained(BOOKS)
    input_ids = tokenizer("It is a truth", return_tensors="pt")["input_ids"]
    [recording] = record(AutoModelForCausalLM.from_pretrained(BOOKS), input_ids, tokenizer=tokenizer)
    assert recording.tokens == ("It", " is", " a", " truth")


@kinds
def test_memory_that_changes_between_steps_is_refused(kind):
    model = tiny_model(**kind)
    recorder = Recorder(model)
    with recorder:
        memory = model(tokens(2, 4), use_cache=True).past_key_values
        memory.batch_select_indices(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="not the one that the last recorded step left behind"):
            model(tokens(2, 1), past_key_values=memory)
    assert len(recorder.packets) == 1


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"use_cache": False}], ids=["beams", "no_state"])
def test_decoding_that_does_not_follow_one_memory_is_refused(how):
    model = tiny_model()
    with Recorder(model), pytest.raises(ValueError, match="use_cache=True and without beams"):
        model.generate(tokens(1, 4), max_new_tokens=12, pad_token_id=1, **how)
    assert model.generate(tokens(1, 4), max_new_tokens=3).shape == (1, 7)


def test_trace_shared_by_the_batch_is_refused_unless_there_is_one_row():
    model = tiny_model(trace_scope="batch")
    with pytest.raises(ValueError, match=r"trace_scope='batch'.*2 rows"):
        record(model, tokens(2, 4))
    [recording] = record(model, tokens(1, 12))
    close(sum_of_parts(recording.layers[0].attribution), recalled_by_definition(recording.layers[0]))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        record(tiny_model().train(), tokens(1, 4))


def test_outputs_without_names_are_refused():
    with pytest.raises(ValueError, match="return_dict"):
        record(tiny_model(EnnModel), tokens(1, 4), return_dict=False)
    assert isinstance(record(tiny_model(), tokens(1, 4), return_dict=False), list)


def test_recorder_wants_a_model_of_this_package():
    with pytest.raises(TypeError, match="Linear"):
        Recorder(torch.nn.Linear(2, 2))


def test_recorder_wants_a_layer_with_a_memory():
    with pytest.raises(ValueError, match=r"layer_types is \['full_attention'\]: there is no memory to record"):
        Recorder(tiny_model(layer_types=["full_attention"]))


def test_a_row_of_padding_has_nothing_to_record():
    attention_mask = torch.ones(3, 5, dtype=torch.long)
    attention_mask[1] = 0
    with pytest.raises(ValueError, match=r"attention_mask is 0 all along the rows \[1\]"):
        record(tiny_model(), tokens(3, 5), attention_mask=attention_mask)


def test_recorder_without_a_run_says_so():
    with pytest.raises(ValueError, match="Nothing was recorded"):
        Recorder(tiny_model()).recordings()


def test_recorder_records_one_run_at_a_time():
    recorder = Recorder(tiny_model())
    with recorder, pytest.raises(RuntimeError, match="recording already"), recorder:
        pass


def test_recordings_introduce_themselves_briefly():
    [recording] = record(tiny_model(), tokens(1, 6))
    layer = recording.layers[0]
    assert repr(recording) == "Recording(tokens=6, layers=1)"
    assert repr(layer) == "CellRecording(layer=0, tokens=6, slots=8, width=16)"
    assert repr(layer.attribution) == "Attribution(tokens=6, exact=True)"
    [recording] = record(tiny_model(**ARCHITECTURES["mixer"]), tokens(1, 6))
    layer = recording.layers[1]
    assert repr(layer) == "MixerRecording(layer=1, tokens=6, heads=2, slots=8, width=8)"
    assert repr(layer.heads[1]) == "HeadRecording(layer=1, head=1, tokens=6, slots=8, width=8)"
    assert repr(layer.attribution) == "MixerAttribution(tokens=6, heads=2)"
