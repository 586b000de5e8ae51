"""The token memory of a language head: its parallel form equals its definition, and its predictions are mixtures."""

import pytest
import torch
from helpers import close, gradients, left_padded, same, tiny_config, tiny_model, tokens

from hf_engram import EnnForCausalLM, EnnModel, load_memory, save_memory
from hf_engram.scan_token_memory_enn import CHUNK_SIZE
from hf_engram.traces import Recorder, counterfactual, record

MIXER = {"layer_types": ["engram_mixer"], "num_attention_heads": 2}
NETWORKS = {"mixer": MIXER, "cell": {}, "gated": {"integrator": "gated"}}
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
LENGTHS = [1, 2, 7, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 3]

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


def token_model(dtype=torch.float64, token_memory_size=6, **kwargs):
    """A tiny model whose token memory speaks up: it looks where it likes, and says it aloud."""
    model = tiny_model(dtype=dtype, token_memory_size=token_memory_size, **kwargs)
    with torch.no_grad():
        model.token_memory.scale.weight.normal_(std=0.3)
        model.token_memory.log_timescale.fill_(3.0)  # 20 tokens: forgetting shows in a test
    return model


def both_forms(monkeypatch, run):
    """What `run` returns with the parallel form, and with the definition."""
    results = []
    for scan in ("auto", "definition"):
        monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
        results.append(run())
    return results


@dtypes
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_parallel_form_equals_the_definition(steps, batch, dtype, monkeypatch):
    model, input_ids = token_model(dtype, **MIXER), tokens(batch, steps)
    targets = tokens(batch, steps)

    def run():
        model.zero_grad()
        outputs = model(input_ids, use_cache=True)
        torch.nn.functional.cross_entropy(outputs.logits.mT, targets).backward()
        return outputs.logits.detach(), outputs.past_key_values.layers[-1].state, gradients(model.token_memory)

    close(*both_forms(monkeypatch, run), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", [[CHUNK_SIZE + 9], [12, 5, 20]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_parallel_form_equals_the_definition_with_padding(lengths, side, monkeypatch):
    model, inputs = token_model(), left_padded(lengths)
    if side == "right":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    valid = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].where(valid & valid.roll(1, 1), -100)  # padding does not say what comes first

    def run():
        model.zero_grad()
        outputs = model(**inputs, labels=labels, use_cache=True)
        outputs.loss.backward()
        return outputs.logits[valid].detach(), outputs.past_key_values.layers[-1].state, gradients(model)

    close(*both_forms(monkeypatch, run), tolerance=1e-9)


def test_parallel_form_equals_the_definition_with_state_documents_and_erasures(monkeypatch):
    model, input_ids = token_model(), tokens(2, CHUNK_SIZE + 40)
    position_ids = (torch.arange(CHUNK_SIZE + 40)[None] + 5) % 30
    write_mask = torch.rand(2, CHUNK_SIZE + 40) > 0.3

    def run():
        model.zero_grad()
        past_key_values = model(input_ids[:, :9], use_cache=True).past_key_values
        inputs = {"position_ids": position_ids, "write_mask": write_mask, "past_key_values": past_key_values}
        outputs = model(input_ids, **inputs)
        outputs.logits.square().sum().backward()
        return outputs.logits.detach(), past_key_values.layers[-1].state, gradients(model)

    close(*both_forms(monkeypatch, run), tolerance=1e-8)


def loss_of(logits, targets, count=None):
    """Mean negative logarithm of the targets' probabilities, in the dtype of the logits; -100 is no target."""
    asked = targets != -100
    scores = logits.gather(2, targets.clamp_min(0)[..., None])[..., 0]
    return -scores[asked].sum() / (asked.sum() if count is None else count)


def losses_with_and_without_logits(monkeypatch, model, inputs, targets, text_before=None):
    """Loss, state and gradients from the logits of the definition, and from either form without logits."""
    results = []
    for scan, skip_logits in (("definition", False), ("auto", True), ("definition", True)):
        monkeypatch.setenv("HF_ENGRAM_SCAN", scan)
        model.zero_grad()
        cache = None if text_before is None else model(text_before, use_cache=True).past_key_values
        outputs = model(**inputs, past_key_values=cache, use_cache=True, skip_logits=skip_logits)
        loss = outputs.loss if skip_logits else loss_of(outputs.logits, targets, inputs.get("num_items_in_batch"))
        loss.backward()
        results.append((loss.detach(), outputs.past_key_values.layers[-1].state, gradients(model)))
    return results


@dtypes
@pytest.mark.parametrize("steps", LENGTHS[1:])
@pytest.mark.parametrize("batch", [1, 3])
def test_loss_without_logits_is_that_of_the_definition(steps, batch, dtype, monkeypatch):
    model, input_ids = token_model(dtype, **MIXER), tokens(batch, steps)
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    expected, *found = losses_with_and_without_logits(monkeypatch, model, inputs, targets)
    for one in found:
        close(one, expected, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counted", [None, 100])
def test_loss_without_logits_heeds_padding_state_documents_erasures_and_labels(side, counted, monkeypatch):
    model, inputs = token_model(), left_padded([CHUNK_SIZE + 9, 40])
    if side == "right":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    steps = inputs["input_ids"].shape[1]
    inputs |= {"position_ids": (torch.arange(steps)[None] + 5) % 30, "write_mask": torch.rand(2, steps) > 0.3}
    targets = tokens(2, steps).where(inputs["attention_mask"].bool() & (torch.rand(2, steps) > 0.2), -100)
    inputs |= {"labels": inputs["input_ids"], "shift_labels": targets, "num_items_in_batch": counted}
    expected, *found = losses_with_and_without_logits(monkeypatch, model, inputs, targets, text_before=tokens(2, 9))
    for one in found:
        close(one, expected, tolerance=1e-9)


def test_loss_without_logits_of_an_unlikely_token_is_finite():
    model, input_ids = token_model(torch.float32), tokens(2, 12)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    outputs = model(input_ids, labels=input_ids, skip_logits=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("token_memory_size", [None, 6])
def test_skipped_logits_are_not_there_and_need_labels(token_memory_size):
    model, input_ids = tiny_model(token_memory_size=token_memory_size, recall_entropy_weight=0.1), tokens(2, 9)
    outputs = model(input_ids, labels=input_ids, skip_logits=True)
    assert outputs.logits is None
    close(outputs.loss.float(), model(input_ids, labels=input_ids).loss.float(), tolerance=1e-6)
    for wrong in ({}, {"labels": input_ids, "logits_to_keep": 2}):
        with pytest.raises(ValueError, match="skip_logits=True leaves the loss alone: give labels, and no logits_to"):
            model(input_ids, skip_logits=True, **wrong)


@networks
def test_every_parameter_learns(network):
    model, input_ids = token_model(**network).train(), tokens(2, 20)
    model(input_ids, labels=input_ids).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@networks
def test_predictions_are_probabilities(network):
    model, input_ids = token_model(**network), tokens(3, 30)
    logits = model(input_ids).logits
    close(logits.logsumexp(-1), torch.zeros(3, 30, dtype=torch.float64))


def test_before_anything_has_followed_the_network_speaks_alone():
    model, input_ids = token_model(), tokens(2, 1)
    plain = model.lm_head(model.model(input_ids).last_hidden_state)
    close(model(input_ids).logits, plain.log_softmax(-1))


def test_a_prediction_is_a_mean_of_the_network_and_of_what_followed_the_same_address():
    """Written out with sums over the text, in place of the trace."""
    model, input_ids = token_model(), tokens(1, 15)
    hidden = model.model(input_ids).last_hidden_state
    reads, _ = model.token_memory.reads(hidden, input_ids)
    addresses, keep = reads.addresses[0], torch.exp(reads.log_decays[0, 0])
    own = model.lm_head(hidden)[0].softmax(-1)
    for t in range(15):
        mass = torch.zeros(40, dtype=torch.float64)
        for s in range(1, t + 1):
            mass[input_ids[0, s]] += reads.scales[0, t] * keep ** (t - s) * addresses[t] @ addresses[s - 1]
        close(model(input_ids).logits[0, t].exp(), (own[t] + mass) / (1 + mass.sum()))


def test_what_followed_once_is_expected_again_even_before_training():
    text = torch.stack([torch.randperm(37)[:16] + 3 for _ in range(16)])
    text = torch.cat([text, text], 1)  # nothing but the first reading tells what follows what
    right = {}
    for size in (None, 64):
        logits = tiny_model(token_memory_size=size, hidden_size=32, initializer_range=0.05, **MIXER)(text).logits
        right[size] = (logits.argmax(-1)[:, 16:-1] == text[:, 17:]).double().mean()
    assert right[64] > 0.6
    assert right[None] < 0.2


@networks
def test_every_prediction_is_shared_out_among_the_network_and_the_tokens_that_wrote(network):
    """Two rows of other lengths, on a memory that holds a text already, with a document that begins in the middle."""
    model, inputs = token_model(**network), left_padded([9, 14])
    cache = model(tokens(2, 7), use_cache=True).past_key_values
    carried = cache.layers[-1].state.trace.clone()
    position_ids = torch.arange(1, 15)[None].repeat(2, 1)
    position_ids[1, 8] = 0
    recorder = Recorder(model)
    with recorder, torch.no_grad():
        outputs = model(**inputs, position_ids=position_ids, past_key_values=cache)
    for row, recording in enumerate(recorder.recordings()):
        memory, valid = recording.token_memory, inputs["attention_mask"][row].bool()
        shares = memory.shares
        close(shares.network + shares.tokens.sum(1) + shares.carried, torch.ones(len(memory), dtype=torch.float64))
        predicted = outputs.logits[row, valid].exp()
        from_tokens = torch.zeros_like(predicted).index_add(1, recording.token_ids, shares.tokens)
        assert (predicted - from_tokens > 0).all()
        close((predicted - from_tokens).sum(-1), shares.network + shares.carried)
        assert (shares.carried > 0).tolist() == [row == 0 or t < 8 for t in range(len(memory))]
        assert carried[row].sum() > 1
        for step, token_id in ((0, 5), (6, int(recording.token_ids[3])), (-1, int(recording.token_ids[-2]))):
            parts = memory.parts_of(token_id, step)
            close(parts.tokens, shares.tokens[step] * (recording.token_ids == token_id))
            address = memory.reads.addresses[step]
            again = (carried[row, token_id] @ address) / (carried[row].sum(0) @ address)
            close(parts.carried, shares.carried[step] * again)


def test_parts_of_no_such_step_are_refused():
    [recording] = record(token_model(**MIXER), tokens(1, 6))
    for step in (6, -7):
        with pytest.raises(IndexError, match=f"step is {step}; allowed: -6 to 5, there are 6 tokens"):
            recording.token_memory.parts_of(3, step)


def test_recording_while_generating_equals_recording_the_text_at_once():
    model, prompt = token_model(**MIXER), tokens(1, 5)
    with Recorder(model) as recorder:
        text = model.generate(prompt, max_new_tokens=9, do_sample=False)
    [recording], [again] = recorder.recordings(), record(model, text[:, :-1])
    close(recording.token_memory.shares, again.token_memory.shares)
    moved = counterfactual(model, text[:, :-1], 3)
    assert not moved.without.token_memory.shares.tokens[:, 3].any()
    assert moved.original.token_memory.shares.tokens[3:, 3].all()


def test_an_erased_token_is_not_recalled():
    model, input_ids = token_model(), torch.arange(3, 15)[None]
    write_mask = torch.ones(1, 12, dtype=torch.bool)
    write_mask[0, 5] = False
    outputs = [model(input_ids, write_mask=mask, use_cache=True) for mask in (None, write_mask)]
    traces = [output.past_key_values.layers[-1].state.trace[0] for output in outputs]
    assert traces[0][input_ids[0, 5]].sum() > 0.5
    assert not traces[1][input_ids[0, 5]].any()
    assert traces[1][input_ids[0, 4]].sum() > 0.5


def test_frozen_memory_recalls_and_stays_as_it_is():
    model, input_ids = token_model(), tokens(2, 12)
    cache = model(input_ids, use_cache=True).past_key_values
    before = cache.layers[-1].state.trace.clone()
    frozen = model(input_ids, past_key_values=cache, plastic=False).logits
    same(cache.layers[-1].state.trace, before)
    assert (frozen - model(input_ids, plastic=False).logits).abs().max() > 0.01


@pytest.mark.parametrize("logits_to_keep", [1, 5, torch.tensor([3]), torch.tensor([CHUNK_SIZE + 3, 2, 2])], ids=str)
def test_logits_of_some_steps_are_those_of_all(logits_to_keep, monkeypatch):
    model, input_ids = token_model(), tokens(2, CHUNK_SIZE + 9)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    for found, every in both_forms(
        monkeypatch, lambda: (model(input_ids, logits_to_keep=logits_to_keep).logits, model(input_ids).logits)
    ):
        close(found, every[:, kept])


def test_unlikely_tokens_have_finite_logarithms_and_gradients():
    model, input_ids = token_model(torch.float32), tokens(2, 12)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    outputs = model(input_ids, labels=input_ids)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_bfloat16_mixes_in_float32():
    model, input_ids = token_model(torch.float32, **MIXER), tokens(2, 70)
    expected = model(input_ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, use_cache=True)
    low = model.to(torch.bfloat16)(input_ids, use_cache=True)
    for outputs in (mixed, low):
        assert outputs.logits.dtype == outputs.past_key_values.layers[-1].state.trace.dtype == torch.float32
        assert (outputs.logits - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_features_without_token_ids_are_refused():
    model = token_model()
    with pytest.raises(ValueError, match=r"token_memory_size.*input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 16, dtype=torch.float64))


def test_the_backbone_leaves_it_alone_and_so_does_its_memory_file(tmp_path):
    model, input_ids = tiny_model(EnnModel, token_memory_size=6), tokens(1, 9)
    save_memory(model(input_ids, use_cache=True).past_key_values, tmp_path / "backbone.safetensors", model.config)
    cache = load_memory(tmp_path / "backbone.safetensors", model.config)
    head = token_model()
    assert head(input_ids, past_key_values=cache, use_cache=True).logits.isfinite().all()


def test_a_memory_of_another_size_is_refused(tmp_path):
    model = token_model()
    save_memory(model(tokens(1, 9)).past_key_values, tmp_path / "memory.safetensors", model.config)
    with pytest.raises(ValueError, match="token_memory_size is 6 in the file, 5 here"):
        load_memory(tmp_path / "memory.safetensors", tiny_config(token_memory_size=5))


def test_a_checkpoint_brings_it_back(tmp_path):
    model, input_ids = token_model(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    close(EnnForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(input_ids).logits, model(input_ids).logits)
