"""The engram mixer: its parallel form equals its definition, and its memory is a mean of bank and past."""

from typing import NamedTuple

import pytest
import torch
from helpers import ARCHITECTURES, close, gradients, same, tiny_model, tokens

from hf_engram import EnnModel
from hf_engram.ops_enn import StepMasks, l2_normalize
from hf_engram.ops_mixer_enn import MixerBank, MixerReads, convolve, convolve_loop, mixer_memory_loop
from hf_engram.scan_mixer_enn import CHUNK_SIZE, mixer_memory_scan

HEADS, WIDTH, SLOTS = 2, 5, 7
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11}
LENGTHS = [1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 5]

architectures = pytest.mark.parametrize("architecture", ["mixer", "hybrid"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Case(NamedTuple):
    reads: MixerReads
    trace: torch.Tensor
    bank: MixerBank
    restart: torch.Tensor | None

    def leaves(self):
        return [*self.reads, self.trace, *self.bank]


def make_case(steps, batch=3, dtype=torch.float64, restarts=False, idle=False, rate=0.2):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    busy = uniform(batch, 1, steps) > 0.3 if idle else torch.ones(batch, 1, steps, dtype=torch.bool)
    heads = batch, HEADS, steps
    reads = MixerReads(
        l2_normalize(normal(*heads, WIDTH)),
        l2_normalize(normal(*heads, WIDTH)),
        normal(*heads, WIDTH),
        uniform(*heads) * busy,
        -rate * uniform(*heads) * busy,
    )
    slots = HEADS, SLOTS, WIDTH
    bank = MixerBank(l2_normalize(normal(*slots)), normal(*slots), *(uniform(3, HEADS) + 0.2))
    trace = uniform(batch, HEADS, SLOTS, 2 * WIDTH + 1)
    restart = uniform(batch, steps) > 0.95 if restarts else None

    def leaf(tensor):
        return tensor.to(dtype).clone().requires_grad_()

    return Case(MixerReads(*map(leaf, reads)), leaf(trace), MixerBank(*map(leaf, bank)), restart)


def run(memory, case):
    """All results and all gradients under a fixed cotangent."""
    results = memory(*case)
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in results)
    return [*results, *torch.autograd.grad(loss, case.leaves())]


def assert_equals_definition(case):
    for ours, definition in zip(run(mixer_memory_scan, case), run(mixer_memory_loop, case), strict=True):
        assert ours.dtype == definition.dtype
        assert (ours - definition).abs().max() <= TOLERANCES[ours.dtype] * definition.abs().max()


@pytest.fixture(autouse=True)
def default_scan(monkeypatch):
    monkeypatch.delenv("HF_ENGRAM_SCAN", raising=False)


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", LENGTHS)
def test_equals_definition_at_every_length(steps, batch, dtype):
    assert_equals_definition(make_case(steps, batch, dtype))


@dtypes
@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize("idle", [False, True], ids=["", "idle_steps"])
@pytest.mark.parametrize("rate", [0.0, 0.01, 20.0], ids=["never_forgets", "slow", "fast"])
def test_equals_definition_with_documents_idle_steps_and_any_decay(restarts, idle, rate, dtype):
    assert_equals_definition(make_case(2 * CHUNK_SIZE + 5, dtype=dtype, restarts=restarts, idle=idle, rate=rate))


def test_gradients_of_the_parallel_form_are_those_of_finite_differences():
    case = make_case(5, batch=1)
    reads, trace, bank, _ = case

    def memory(*leaves):
        return mixer_memory_scan(MixerReads(*leaves[:5]), leaves[5], MixerBank(*leaves[6:]))

    assert torch.autograd.gradcheck(memory, (*reads, trace, *bank))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_the_convolution_equals_its_definition(steps, taps):
    for _ in range(20):
        x, tail, weight = (torch.randn(*shape).double() for shape in ((3, steps, 4), (3, taps - 1, 4), (taps, 4)))
        valid = torch.rand(3, steps) > 0.4
        restart = (torch.rand(3, steps) > 0.8) & valid
        for masks in (StepMasks(), StepMasks(valid), StepMasks(restart=restart), StepMasks(valid, restart)):
            ours, definition = convolve(x, tail, weight, masks), convolve_loop(x, tail, weight, masks)
            close(ours[1], definition[1])
            counted = valid if masks.valid is not None else torch.ones_like(valid)
            close(ours[0][counted], definition[0][counted])


def test_the_convolution_is_that_of_torch():
    x, weight = torch.randn(2, 9, 4).double(), torch.randn(4, 4).double()
    expected = torch.nn.functional.conv1d(x.mT, weight.T[:, None], padding=3, groups=4)[..., :9].mT
    close(convolve(x, x.new_zeros(2, 3, 4), weight)[0], expected)


def test_recalled_memories_are_means_of_bank_and_past_values():
    """With all values equal, a mean of them is that value, whatever the weights."""
    case = make_case(70)
    value = torch.randn(WIDTH).double()
    reads = case.reads._replace(values=value.expand_as(case.reads.values))
    bank = case.bank._replace(values=value.expand_as(case.bank.values))
    trace = torch.zeros_like(case.trace)
    recalled, recall, _ = mixer_memory_scan(reads, trace, bank)
    close(recalled, value.expand_as(recalled))
    close(recall.sum(-1), torch.ones(recall.shape[:-1], dtype=recall.dtype))


def test_a_key_recalls_the_value_that_was_written_with_it():
    """Sharp addresses, no forgetting, a faint bank: an associative memory."""
    pairs = 8  # as many as slots
    keys, values = torch.eye(pairs).double(), torch.randn(pairs, pairs).double()
    order = torch.randperm(pairs)
    writes = torch.cat([torch.ones(pairs), torch.zeros(pairs)]).double()  # first the pairs, then the questions
    reads = MixerReads(
        torch.cat([keys, keys[order]])[None, None],
        torch.cat([keys, keys])[None, None],
        torch.cat([values, values])[None, None],
        writes[None, None],
        torch.zeros_like(writes)[None, None],
    )
    scale, sharp = torch.tensor([1e8]).double(), torch.tensor([0.02]).double()
    bank = MixerBank(keys[None], torch.zeros_like(keys)[None], scale, sharp, sharp)
    recalled, _, _ = mixer_memory_scan(reads, values.new_zeros(1, 1, pairs, 2 * pairs + 1), bank)
    close(recalled[0, 0, pairs:], values[order], tolerance=1e-6)


@architectures
@pytest.mark.parametrize("lengths", [[70], [12, 5, 20]], ids=str)
def test_models_agree_with_their_definition(architecture, lengths, monkeypatch):
    results = []
    model = tiny_model(**ARCHITECTURES[architecture])
    input_ids = tokens(len(lengths), max(lengths))
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    labels = input_ids.where(mask.cumsum(1) > 1, -100)  # padding does not say which token comes first
    for scan in ("auto", "definition"):
        monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
        model.zero_grad()
        outputs = model(input_ids, attention_mask=mask, labels=labels)
        outputs.loss.backward()
        results.append((outputs.logits[mask.bool()].detach(), gradients(model)))
    close(*results, tolerance=1e-9)


@architectures
def test_every_parameter_learns(architecture):
    model = tiny_model(**ARCHITECTURES[architecture]).train()
    input_ids = tokens(2, 20)
    model(input_ids, labels=input_ids).loss.backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


@architectures
def test_checkpointing_changes_no_gradient(architecture):
    model, input_ids = tiny_model(**ARCHITECTURES[architecture]).train(), tokens(2, 70)
    model(input_ids, labels=input_ids).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(input_ids, labels=input_ids).loss.backward()
    same(gradients(model), plain)


@architectures
def test_bfloat16_is_close_to_float32(architecture):
    model, input_ids = tiny_model(dtype=torch.float32, **ARCHITECTURES[architecture]), tokens(2, 70)
    expected = model(input_ids, use_cache=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, use_cache=True)
    assert mixed.past_key_values.layers[0].state.trace.dtype == torch.float32
    assert (mixed.logits.float() - expected.logits).norm() < 0.1 * expected.logits.norm()
    low = model.to(torch.bfloat16)(input_ids, use_cache=True)
    assert low.logits.dtype == torch.bfloat16
    assert low.past_key_values.layers[0].state.trace.dtype == torch.float32


def test_outputs_of_a_hybrid_are_those_of_its_layers():
    model = tiny_model(EnnModel, **ARCHITECTURES["hybrid"])
    outputs = model(tokens(3, 12), output_recall=True, output_traces=True, output_hidden_states=True, use_cache=True)
    assert [recall.shape for recall in outputs.recall] == [(3, 12, 2, 8), (3, 12, 8)]
    assert [trace.shape for trace in outputs.traces] == [(3, 2, 8, 17), (3, 8, 16)]
    assert len(outputs.hidden_states) == 5
    same(outputs.traces[0], outputs.past_key_values.layers[0].state.trace)


def test_time_scales_are_spread_from_a_few_tokens_to_thousands():
    mixer = EnnModel(model_config(heads=4)).layers[0].mixer
    rates = torch.nn.functional.softplus(mixer.plasticity.bias[4:])
    torch.testing.assert_close(1 / rates, torch.tensor([4.0, 40.32, 406.37, 4096.0]), rtol=1e-3, atol=0)


def test_a_new_mixer_asks_for_what_tokens_like_the_one_at_hand_wrote():
    model = EnnModel(model_config(heads=2))
    reads = model(tokens(2, 12), output_reads=True).reads[0]
    same(reads.queries, reads.keys)
    assert model.layers[0].mixer.bank(torch.float32).trace_scale.tolist() == pytest.approx([8, 8])


def model_config(heads):
    return tiny_model(layer_types=["engram_mixer"], num_attention_heads=heads).config


@pytest.mark.parametrize("layer_type", ["engram_mixer", "full_attention"])
@pytest.mark.parametrize("hidden_size", [16, 256])
def test_what_a_new_block_adds_to_the_embeddings_is_small(hidden_size, layer_type):
    model = tiny_model(EnnModel, hidden_size=hidden_size, layer_types=[layer_type], num_attention_heads=2)
    embeddings, block = model.embed_tokens(tokens(2, 20)), model.layers[0]
    mixed = block.mixer(block.input_norm(embeddings))[0]
    fed_forward = block.feed_forward(block.feed_forward_norm(embeddings))
    for added in (mixed, fed_forward):
        assert 0.05 < added.std() / embeddings.std() < 0.7


def test_an_attention_layer_sees_its_window_and_no_more():
    model = tiny_model(layer_types=["sliding_attention"], num_attention_heads=2, sliding_window=4)
    text = tokens(1, 12)
    other = torch.cat([tokens(1, 8), text[:, 8:]], 1)
    close(model(text).logits[:, 11], model(other).logits[:, 11])
    assert (model(text).logits[:, 10] - model(other).logits[:, 10]).abs().max() > 1e-6
    kept = model(text, use_cache=True).past_key_values.layers[0].state
    assert kept.positions.tolist() == [[9, 10, 11]]  # and the next token itself
    assert kept.keys.shape[2] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads` is 0; allowed: a positive integer"),
        ({"conv_kernel": 0}, "conv_kernel` is 0; allowed: a positive integer"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window` is None; allowed: a positive integer"),
        ({"layer_types": ["mamba"]}, "layer_types` is .*; allowed: a list of"),
    ],
)
def test_settings_out_of_range_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_model(**fields)
