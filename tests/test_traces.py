"""Recordings say what the memory recalled and wrote, and where, exactly, every recalled memory came from."""

import copy
import re

import pytest
import torch
from helpers import BOOKS, architectures, close, kinds, left_padded, same, tiny_model, tokens, traces_in
from memories import memories, mixer_slots, recalled_by_definition, sum_of_parts
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.recording import main
from hf_engram.traces import Recorder, record


def recalled_without(layer, erased):
    """The memory of every step without the write of one token, all recall weights as they were."""
    eta, scale = layer.settings.hebbian_lr, layer.settings.trace_scale
    trace, recalled = layer.carried_trace, []
    for t, (a, z) in enumerate(zip(layer.recall, layer.encodings, strict=True)):
        recalled.append(a @ (layer.bank + scale * trace))
        trace = (1 - eta) * trace + (0 if t == erased else eta * torch.outer(a, z))
    return torch.stack(recalled)


@architectures
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_sum_to_the_recalled_memory(architecture, dtype):
    model = tiny_model(dtype=dtype, **architecture)
    recordings = record(model, tokens(3, 70))
    assert len(recordings) == 3
    for memory in (memory for recording in recordings for memory in memories(recording)):
        parts = memory.attribution
        close(sum_of_parts(parts), recalled_by_definition(memory), 1e-10 if dtype is torch.float64 else 1e-5)
        if "trace_clip" not in architecture:
            assert parts.exact.all()
            assert parts.first_inexact is None
            assert not parts.clip.any()


@pytest.mark.parametrize("erased", [0, 5, 18])
def test_coefficient_is_what_erasing_the_write_takes_away(erased):
    [recording] = record(tiny_model(), tokens(1, 20))
    [layer] = recording.layers
    parts = layer.attribution
    taken = layer.recalled - recalled_without(layer, erased)
    close(parts.coefficients[:, erased, None] * layer.encodings[erased], taken)
    assert taken[: erased + 1].abs().max() < 1e-15
    assert (taken[erased + 1 :].norm(dim=-1) > 1e-4).all()
    close(parts.share.tokens[:, erased], taken.norm(dim=-1) / layer.recalled.norm(dim=-1))


@architectures
def test_contributions_to_a_token_sum_to_one(architecture):
    [recording] = record(tiny_model(**architecture), tokens(1, 20))
    for layer in recording.layers:
        of = layer.attribution.contribution
        close(of.bank + of.carried + of.clip + of.tokens.sum(1), torch.ones(20).double())


@architectures
def test_recording_holds_what_the_model_returns(architecture):
    model, input_ids = tiny_model(**architecture), tokens(2, 70)
    outputs = model(input_ids, output_recall=True, output_traces=True)
    for row, recording in enumerate(record(model, input_ids)):
        same(recording.token_ids, input_ids[row])
        assert [layer.layer for layer in recording.layers] == layers_with_memory(model)
        for layer, recall, trace in zip(recording.layers, outputs.recall, outputs.traces, strict=True):
            close(layer.trace(), trace[row])
            if layer.heads:
                same(torch.stack([head.recall for head in layer.heads], 1), recall[row])
                close(layer.recall, recall[row].mean(1))
                close(layer.trace_norms[-1], trace[row].norm(dim=-1).mean(0))
            else:
                same(layer.recall, recall[row])
                close(layer.trace_norms[-1], trace[row].norm(dim=-1))


def layers_with_memory(model):
    return [index for index, name in enumerate(model.config.layer_types) if "attention" not in name]


@kinds
def test_trace_after_any_token_is_that_of_the_text_so_far(kind):
    model, input_ids = tiny_model(**kind), tokens(1, 12)
    [recording] = record(model, input_ids)
    for step in (0, 6, -3):
        until = step % 12 + 1
        traces = model(input_ids[:, :until], output_traces=True).traces
        close([layer.trace(step) for layer in recording.layers], [trace[0] for trace in traces])
    for step in (12, -13):
        with pytest.raises(IndexError, match=f"step is {step}; allowed: -12 to 11"):
            recording.layers[0].trace(step)


def test_writes_rebuild_the_trace():
    [recording] = record(tiny_model(), tokens(1, 9))
    [layer] = recording.layers
    before, after = layer.trace(7), layer.trace(8)
    close(after, 0.7 * before + torch.outer(layer.writes[8], layer.encodings[8]))


# Clip


def test_clip_is_a_part_of_its_own_from_the_first_recall_it_reaches():
    model, input_ids = tiny_model(trace_clip=0.15), tokens(1, 40)
    [recording] = record(model, input_ids)
    [layer] = recording.layers
    parts = layer.attribution
    writes_clipped = layer.clipped.any(-1).nonzero().flatten().tolist()
    assert 0 < writes_clipped[0] < 39
    assert parts.first_inexact == writes_clipped[0] + 1
    assert parts.exact.tolist() == [True] * parts.first_inexact + [False] * (40 - parts.first_inexact)
    assert not parts.clip[parts.exact].any()
    assert (parts.clip[~parts.exact].norm(dim=-1) > 1e-6).all()

    unclipped = copy.deepcopy(model)
    unclipped.model.layers[0].cell.settings = layer.settings._replace(trace_clip=None)
    [free] = record(unclipped, input_ids)
    close(layer.recalled[parts.exact], free.layers[0].recalled[parts.exact])
    assert (layer.recalled[parts.first_inexact] - free.layers[0].recalled[parts.first_inexact]).abs().max() > 1e-6


def test_attribution_is_exact_again_once_the_memory_is_cleared():
    position_ids = torch.cat([torch.arange(30), torch.arange(10)])[None]
    [recording] = record(tiny_model(trace_clip=0.15), tokens(1, 40), position_ids=position_ids)
    parts = recording.layers[0].attribution
    assert not parts.exact[29]
    assert parts.exact[30]


# Memory carried in, cleared, and padding


@architectures
def test_memory_carried_in_is_the_part_of_what_was_read_before(architecture):
    model, input_ids = tiny_model(**architecture), tokens(2, 70)
    memory = DynamicCache(config=model.config)
    record(model, input_ids[:, :30], past_key_values=memory)
    later = record(model, input_ids[:, 30:], past_key_values=memory)
    for whole, part in zip(record(model, input_ids), later, strict=True):
        for all_tokens, second in zip(memories(whole), memories(part), strict=True):
            expected, found = all_tokens.attribution, second.attribution
            close(found.coefficients, expected.coefficients[30:, 30:])
            close(found.bank, expected.bank[30:])
            close(found.recalled, expected.recalled[30:])
            if "trace_clip" not in architecture:
                close(found.carried, expected.coefficients[30:, :30] @ expected.encodings[:30])
            assert found.carried.any()


@kinds
def test_cleared_memory_gives_the_recordings_of_the_documents_alone(kind):
    model, first, second = tiny_model(**kind), tokens(1, 7), tokens(1, 9)
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None]
    memory = model(tokens(1, 4), use_cache=True).past_key_values
    [packed] = record(model, torch.cat([first, second], 1), position_ids=position_ids, past_key_values=memory)
    for document, steps in ((first, slice(0, 7)), (second, slice(7, 16))):
        [alone] = record(model, document)
        for both, one in zip(memories(packed), memories(alone), strict=True):
            close(both.attribution.coefficients[steps, steps], one.attribution.coefficients)
            close(both.attribution.recalled[steps], one.attribution.recalled)
            close(both.trace_norms[steps], one.trace_norms)
            assert not both.attribution.carried.any()
    assert not packed.layers[0].attribution.coefficients[7:, :7].any()


@kinds
def test_padding_is_left_out(kind):
    model, inputs = tiny_model(**kind), left_padded([5, 8, 3])
    inputs["attention_mask"][1, 4] = 0
    for row, recording in enumerate(record(model, **inputs)):
        valid = inputs["attention_mask"][row].bool()
        [alone] = record(model, inputs["input_ids"][row : row + 1, valid])
        same(recording.token_ids, alone.token_ids)
        for padded, unpadded in zip(recording.layers, alone.layers, strict=True):
            close(padded.attribution.coefficients, unpadded.attribution.coefficients)
            close(padded.recalled, unpadded.recalled)


# Interventions


@architectures
def test_any_mixture_of_interventions_is_attributed(architecture):
    """Token by token, against the state of the model itself."""
    model, input_ids = tiny_model(**architecture), tokens(2, 40)
    layers = model.config.num_hidden_layers
    memory, recorder = model(tokens(2, 5), use_cache=True).past_key_values, Recorder(model)
    recalled, traces = [], []
    for t in range(40):
        restart, slot_mask = t in (13, 29), torch.rand(layers, 8) > 0.2
        inputs = {
            "write_mask": torch.rand(2, 1) > 0.3,
            "plastic": t % 7 > 1,
            "slot_mask": slot_mask if t % 5 < 3 else None,
            "position_ids": torch.tensor([[0 if restart else 1]]),
        }
        before = [torch.zeros_like(trace) if restart else trace.clone() for trace in traces_in(memory)]
        with recorder:
            outputs = model(input_ids[:, t : t + 1], past_key_values=memory, output_recall=True, **inputs)
        traces.append([trace.clone() for trace in traces_in(memory)])
        recalled.append(
            [
                recalled_from(layer, a[:, 0], *states)
                for layer, a, *states in zip(layers_of(model), outputs.recall, before, traces[-1], strict=True)
            ]
        )
    for row, recording in enumerate(recorder.recordings()):
        for index, layer in enumerate(recording.layers):
            found = [sum_of_parts(memory.attribution) for memory in layer.heads or [layer]]
            close(torch.cat(found, -1), torch.stack([step[index][row] for step in recalled]))
            close(torch.stack([layer.trace(t) for t in range(40)]), torch.stack([t[index][row] for t in traces]))
            silent = ~layer.written
            assert silent.any()
            assert not layer.writes[silent].any()
            assert not layer.attribution.coefficients[:, silent].any()
            assert not layer.attribution.coefficients[29:, :29][:, layer.active_slots[:29].all(1)].any()


def layers_of(model):
    return [model.base_model.layers[index] for index in layers_with_memory(model)]


def recalled_from(layer, recall, before, after):
    """What a layer recalls with these weights: a cell from its trace before the token, a mixer from that after it."""
    if hasattr(layer, "cell"):
        memory = layer.cell.memory_bank + layer.cell.settings.trace_scale * before
        return (recall[:, None] @ memory)[:, 0]
    bank, width = layer.mixer.bank(after.dtype), layer.mixer.head_dim
    slots = mixer_slots(bank.values, bank.trace_scale[:, None, None], after, width)
    return (recall[:, :, None] @ slots).flatten(1)


@kinds
def test_generation_with_interventions_is_recorded_with_them(kind):
    model, prompt = tiny_model(**kind), tokens(1, 6)
    slot_mask, write_mask = torch.arange(8) != 3, torch.arange(6)[None] != 2
    with Recorder(model) as recorder:
        output = model.generate(
            prompt, write_mask=write_mask, slot_mask=slot_mask, max_new_tokens=8, return_dict_in_generate=True
        )
    [recording] = recorder.recordings()
    for layer, trace in zip(recording.layers, traces_in(output.past_key_values), strict=True):
        close(layer.trace(), trace[0])
        assert layer.written.tolist() == [t != 2 for t in range(len(recording))]
        assert not layer.recall[:, 3].any()


# Real text


def test_shipped_checkpoint_is_attributed_exactly():
    tokenizer = AutoTokenizer.from_pretrained(BOOKS)
    model = AutoModelForCausalLM.from_pretrained(BOOKS)
    inputs = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    with Recorder(model, tokenizer) as recorder:
        output = model.generate(**inputs, max_new_tokens=200, do_sample=True, return_dict_in_generate=True)
    [recording] = recorder.recordings()
    [layer] = recording.layers
    parts = layer.attribution
    assert parts.exact.all()
    close(sum_of_parts(parts), recalled_by_definition(layer), 1e-5)
    close(layer.trace(), output.past_key_values.layers[0].state.trace[0], 1e-5)
    assert parts.share.bank[0] == pytest.approx(1)


def test_cost_of_recording_is_measured_by_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recording", "--rounds", "2", "--new_tokens", "5"])
    main()
    assert re.search(r"time recorded / plain: \d+\.\d+ \(.*reading 15 tokens", capsys.readouterr().out, re.DOTALL)
