"""What a mixer recalls is a mean of bank values and past values: its attribution is an exact distribution."""

import pytest
import torch
from helpers import ARCHITECTURES, close, same, tiny_model, tokens
from memories import memories, recalled_by_head

from hf_engram import EnnModel
from hf_engram.traces import Recorder, record

MIXER, HYBRID = ARCHITECTURES["mixer"], ARCHITECTURES["hybrid"]


def interventions(steps):
    return {
        "write_mask": torch.rand(1, steps) > 0.2,
        "slot_mask": torch.rand(2, 8) > 0.2,
        "position_ids": torch.cat([torch.arange(1, 31), torch.arange(steps - 30)])[None],
    }


def recorded_with_everything(dtype=torch.float64, steps=70):
    """A text read on a memory, in two passes under different interventions, with a new document in each."""
    model = tiny_model(dtype=dtype, **MIXER)
    memory = model(tokens(1, 9), use_cache=True).past_key_values
    with Recorder(model) as recorder, torch.no_grad():
        model(tokens(1, 5), past_key_values=memory, plastic=False)
        for _ in range(2):
            model(tokens(1, steps), past_key_values=memory, **interventions(steps))
    [recording] = recorder.recordings()
    return recording


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shares_are_a_distribution_over_bank_memory_and_tokens(dtype):
    recording = recorded_with_everything(dtype)
    for memory in [*memories(recording), *recording.layers]:
        share = memory.attribution.share
        assert all((part >= 0).all() for part in share)
        assert not share.clip.any()
        whole = share.bank + share.carried + share.tokens.sum(1)
        close(whole, torch.ones_like(whole), 1e-10 if dtype is torch.float64 else 1e-5)
        assert share.carried[:35].all()
        assert memory.attribution.exact.all()


@pytest.mark.parametrize("written_by", [0, 5, 18])
@pytest.mark.parametrize("head", [0, 1])
def test_coefficient_is_what_another_value_would_have_changed(head, written_by):
    """In the model itself: queries, keys and weights stay as they are when one value changes."""
    model, input_ids = tiny_model(layer_types=["engram_mixer"], num_attention_heads=2), tokens(1, 20)
    [before] = record(model, input_ids)
    change = torch.randn(8).double()

    def change_value(module, args, output):
        changed = output.clone()
        changed[0, written_by].unflatten(-1, (2, 8))[head] += change
        return changed

    handle = model.model.layers[0].mixer.v_proj.register_forward_hook(change_value)
    [after] = record(model, input_ids)
    handle.remove()
    [layer], [changed] = before.layers, after.layers
    same(changed.recall, layer.recall)
    coefficients = layer.heads[head].attribution.coefficients[:, written_by]
    close(changed.heads[head].recalled - layer.heads[head].recalled, coefficients[:, None] * change)
    same(changed.heads[1 - head].recalled, layer.heads[1 - head].recalled)
    assert not coefficients[:written_by].any()
    assert (coefficients[written_by:] > 0).all()  # itself, too: a mixer writes before it recalls


def test_parts_add_up_to_what_the_definition_recalls_from_any_values():
    [recording] = record(tiny_model(**MIXER), tokens(1, 30))
    for head in memories(recording):
        other, parts = torch.randn_like(head.values), head.attribution
        close(parts.bank + parts.coefficients @ other, recalled_by_head(head, other))


def test_weight_of_carried_memory_is_that_of_the_tokens_before():
    model, input_ids = tiny_model(**MIXER), tokens(1, 40)
    [whole] = record(model, input_ids)
    memory = model(input_ids[:, :25], use_cache=True).past_key_values
    [part] = record(model, input_ids[:, 25:], past_key_values=memory)
    for all_tokens, second in zip([*memories(whole), *whole.layers], [*memories(part), *part.layers], strict=True):
        expected, found = all_tokens.attribution.share, second.attribution.share
        close(found.carried, expected.tokens[25:, :25].sum(1))
        close(found.bank, expected.bank[25:])
        close(found.tokens, expected.tokens[25:, 25:])


def test_a_mixer_is_the_mean_over_its_heads():
    recording = recorded_with_everything()
    for layer in recording.layers:
        parts = [head.attribution for head in layer.heads]
        close(layer.recalled, torch.cat([head.recalled for head in layer.heads], 1))
        for name in ("recall", "writes", "trace_norms"):
            close(getattr(layer, name), torch.stack([getattr(head, name) for head in layer.heads]).mean(0))
        for name in ("share", "contribution"):
            for index, mean in enumerate(getattr(layer.attribution, name)):
                close(mean, torch.stack([getattr(part, name)[index] for part in parts]).mean(0))
        close(layer.attribution.coefficients, torch.stack([part.coefficients for part in parts]).mean(0))
        assert layer.attribution.first_inexact is None
        same(layer.of_head(-1).recall, layer.heads[1].recall)


def test_writes_rebuild_the_trace():
    [recording] = record(tiny_model(**MIXER), tokens(1, 9))
    for head in memories(recording):
        entry = torch.cat([head.keys[8], head.values[8], torch.ones(1).double()])
        close(head.trace(8), head.log_decays[8].exp() * head.trace(7) + torch.outer(head.writes[8], entry))
        close(head.writes.sum(1), head.strengths)


def test_what_a_model_says_it_asked_and_wrote_rebuilds_its_trace():
    model, input_ids = tiny_model(EnnModel, **HYBRID), tokens(3, 12)
    outputs = model(input_ids, output_reads=True, output_traces=True, output_encodings=True)
    [reads], [encodings] = outputs.reads, outputs.encodings
    assert reads.queries.shape == reads.keys.shape == reads.values.shape == (3, 2, 12, 8)
    assert reads.strengths.shape == reads.log_decays.shape == (3, 2, 12)
    assert encodings.shape == (3, 12, 16)
    later = reads.log_decays.flip(2).cumsum(2).flip(2) - reads.log_decays
    mass = outputs.traces[0][..., -1].sum(-1)  # write weights of a token sum to its strength
    close(mass, (later.exp() * reads.strengths).sum(2))
    assert "reads" not in model(input_ids)


def test_recorder_keeps_only_recall_and_writes_per_token():
    model = tiny_model(layer_types=["engram_mixer"], num_attention_heads=2)
    recorder = Recorder(model)
    with recorder:
        model.generate(tokens(1, 4), max_new_tokens=20, min_new_tokens=20)
    kept = [t for packet in recorder.packets for t in (*packet.recall, *packet.mixer_writes[0])]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in kept}.values())
    assert held == 23 * 2 * (8 + 2 * 8 + 2) * 8  # float64


def test_layers_of_a_hybrid_keep_their_numbers():
    model = tiny_model(**{**HYBRID, "layer_types": [*HYBRID["layer_types"][1:], "engram_mixer"]})
    [recording] = record(model, tokens(1, 6))
    assert [layer.layer for layer in recording.layers] == [1, 3]
    assert [len(layer.heads) for layer in recording.layers] == [0, 2]
    table = recording.to_pandas()
    assert table.layer.unique().tolist() == [1, 3]
    assert len(table[table.layer == 1]) == 6 * 3 + 6 * 5 // 2
    assert len(table[table.layer == 3]) == 6 * 3 + 6 * 7 // 2


def test_heads_that_are_not_there_are_named():
    [recording] = record(tiny_model(**HYBRID), tokens(1, 6))
    mixer, cell = recording.layers
    assert mixer.of_head(None) is mixer
    for head in (2, -3):
        with pytest.raises(IndexError, match=rf"head is {head}; allowed: None or -2 to 1, layer 0 has 2 heads"):
            mixer.of_head(head)
    with pytest.raises(IndexError, match="head is 0; allowed: None, layer 2 has 0 heads"):
        cell.plot(head=0)
    for layer in (mixer, mixer.heads[1]):
        with pytest.raises(IndexError, match="step is 6; allowed: -6 to 5"):
            layer.trace(6)


def test_constants_of_cells_mean_nothing_to_mixers():
    assert len(record(tiny_model(trace_scope="batch", **MIXER), tokens(2, 4))) == 2
    with pytest.raises(ValueError, match="trace_scope='batch'"):
        record(tiny_model(trace_scope="batch", **HYBRID), tokens(2, 4))
