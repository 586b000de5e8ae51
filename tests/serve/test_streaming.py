"""The streaming core: text, seeds, stopping, and what is reported about the memory."""

import numpy as np
import pytest
import torch
from replays import replay, take_apart, trace_values
from transformers import DynamicCache

from hf_engram import as_new_sequence
from hf_engram.traces import record
from serve.live_memory.controls import Controls
from serve.live_memory.memories import traces
from serve.live_memory.sampling import Sampling
from serve.live_memory.streaming import PROMPT_CHUNK, TokenStream, prompt_ids

PROMPT = "the memory of a"
GREEDY = Sampling(temperature=0, max_new_tokens=30)


@pytest.fixture
def stream(model, tokenizer):
    def stream(prompt=PROMPT, sampling=GREEDY, model=model, tokenizer=tokenizer, **kwargs):
        return TokenStream(model, tokenizer, prompt_ids(tokenizer, prompt, 1000), sampling, **kwargs)

    return stream


def text_of(stream):
    return "".join(step.text for steps in stream for step in steps)


def generated_ids(model, tokenizer, prompt=PROMPT, **kwargs):
    inputs = tokenizer(prompt, return_tensors="pt")
    return model.generate(inputs["input_ids"], **{"do_sample": False, "max_new_tokens": 30, **kwargs})


def test_greedy_text_is_that_of_generate(model, tokenizer, stream):
    assert text_of(stream()) == tokenizer.decode(generated_ids(model, tokenizer)[0])


def test_sampled_text_is_that_of_generate_with_the_same_seed(model, tokenizer, stream):
    options = {"temperature": 0.9, "top_p": 0.8}
    torch.manual_seed(7)
    expected = generated_ids(model, tokenizer, do_sample=True, top_k=0, **options)[0]
    assert text_of(stream(sampling=Sampling(seed=7, max_new_tokens=30, **options))) == tokenizer.decode(expected)


def test_prompts_longer_than_a_chunk_are_read_whole(model, tokenizer, stream):
    prompt = PROMPT * 40
    long = stream(prompt)
    assert len(long.given) > 2 * PROMPT_CHUNK
    assert text_of(long) == tokenizer.decode(generated_ids(model, tokenizer, prompt)[0])


def test_text_ends_at_the_end_of_text_token_which_is_not_shown(make_model, tokenizer, stream):
    ids = generated_ids(make_model(), tokenizer)[0].tolist()
    model = make_model(eos_token_id=ids[-5])
    ending = stream(model=model)
    expected = generated_ids(model, tokenizer)[0]
    assert text_of(ending) == tokenizer.decode(expected[:-1])
    assert ending.finish_reason == "eos"


def test_another_seed_gives_another_text(stream):
    assert text_of(stream(sampling=Sampling(seed=1))) != text_of(stream(sampling=Sampling(seed=2)))


def test_top_p_close_to_zero_is_greedy(stream):
    narrow = Sampling(temperature=2.0, top_p=1e-6, max_new_tokens=30)
    assert text_of(stream(sampling=narrow)) == text_of(stream())


def test_probabilities_are_those_of_the_model(model, stream):
    steps = [step for steps in stream(num_candidates=3) for step in steps]
    given = [step.token_id for step in steps if step.is_prompt]
    with torch.no_grad():
        chances = model(torch.tensor([given])).logits[0, -1].softmax(-1)
    first = steps[len(given)]
    assert first.probability == pytest.approx(chances[first.token_id].item(), rel=1e-5)
    assert [p for _, p in first.candidates] == pytest.approx(chances.topk(3).values.tolist(), rel=1e-5)
    assert first.candidates[0].text == first.text
    assert steps[0].probability is None


@pytest.mark.parametrize("carried", [False, True])
def test_what_the_token_memory_adds_to_a_choice_is_what_is_recorded(make_model, tokenizer, stream, carried):
    model = make_model(token_memory_size=8)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])

    def memory():
        return as_new_sequence(model(ids, use_cache=True).past_key_values) if carried else None

    run = [step for steps in stream(model=model, memory=memory()) for step in steps]
    token_ids = torch.tensor([[step.token_id for step in run]])
    [recording] = record(model, token_ids, past_key_values=memory())
    first = next(index for index, step in enumerate(run) if not step.is_prompt)
    assert all(step.remembered is None for step in run[:first])
    for index, step in enumerate(run[first:], first):
        parts = recording.token_memory.parts_of(step.token_id, index - 1)
        assert step.remembered.probability == pytest.approx(float(parts.tokens.sum() + parts.carried), abs=1e-5)
        assert step.remembered.probability <= step.probability
        for writer, part in step.remembered.writers:
            assert token_ids[0, writer] == step.token_id
            assert part == pytest.approx(float(parts.tokens[writer]), abs=1e-5)
    assert any(step.remembered.writers for step in run[first:])
    assert (float(parts.carried) > 0) == carried


def test_stop_ends_the_text_before_the_next_token(stream):
    controls = Controls()
    stopped = stream(source=controls)
    seen = 0
    for _ in stopped:
        seen += 1
        controls.stop = seen >= 5
    assert seen == 5
    assert stopped.finish_reason == "stopped"


def test_stop_is_heard_while_a_long_prompt_is_read(stream):
    controls = Controls()
    seen = []
    for steps in stream(PROMPT * 40, source=controls):
        seen.append(len(steps))
        controls.stop = True
    assert seen == [PROMPT_CHUNK]


@pytest.mark.parametrize(
    "fields",
    [
        {"residual": True},
        {"residual": False},
        {"residual": True, "trace_clip": 0.01},
        {"residual": False, "trace_clip": 0.01},
        {"layer_types": ["engram_mixer", "engram_mixer"]},
        {"layer_types": ["engram_mixer", "full_attention", "engram"], "num_hidden_layers": 3},
    ],
    ids=["residual", "bare", "clipped", "bare and clipped", "mixers", "all kinds"],
)
@pytest.mark.parametrize("slots_off", [(), (2, 3)], ids=str)
def test_replaying_the_writes_gives_the_trace_of_the_model(make_model, stream, fields, slots_off):
    model = make_model(**fields)
    run = stream(model=model, sampling=Sampling(max_new_tokens=50), source=Controls(slots_off=slots_off))
    steps = [step for steps in run for step in steps]
    for (trace, mass), (expected, its_mass) in zip(replay(model, steps), traces(run.memory), strict=True):
        np.testing.assert_allclose(trace, expected, atol=1e-5 * np.abs(expected).max())
        if its_mass is not None:
            np.testing.assert_allclose(mass, its_mass, rtol=1e-4, atol=1e-7)
    clip = model.config.trace_clip
    assert clip is None or np.abs(trace).max() == pytest.approx(clip)


def test_the_memory_has_read_prompt_and_text(model, tokenizer, stream):
    run = stream()
    text_of(run)
    read = model(generated_ids(model, tokenizer), use_cache=True).past_key_values
    np.testing.assert_allclose(trace_values(run.memory), trace_values(read), atol=1e-6)


def test_a_memory_is_carried_on_as_by_generate(model, tokenizer, stream):
    run = stream()
    text_of(run)
    memory = DynamicCache(config=model.config)
    model(generated_ids(model, tokenizer), past_key_values=memory, use_cache=True)

    expected = generated_ids(model, tokenizer, "it is read", past_key_values=as_new_sequence(memory))
    assert text_of(stream("it is read", memory=run.memory)) == tokenizer.decode(expected[0])


def test_frozen_plasticity_leaves_the_trace_as_it_is(stream):
    run = stream()
    text_of(run)
    before = trace_values(run.memory)
    frozen = stream("it is read", memory=run.memory, source=Controls(plastic=False))
    steps = [step for steps in frozen for step in steps]
    assert not any(step.settings.plastic for step in steps)
    np.testing.assert_array_equal(trace_values(frozen.memory), before)


def test_slots_that_are_off_are_neither_recalled_nor_written(model, stream):
    run = stream(source=Controls(slots_off=(2, 3)))
    recall = np.stack([[read.recall for read in take_apart(model, s.memories)] for steps in run for s in steps])
    assert not recall[:, :, 2:4].any()
    assert recall[:, :, 4:].any()
    assert not trace_values(run.memory)[:, 2:4].any()
    np.testing.assert_allclose(recall.sum(-1), 1, rtol=1e-5)


def test_clearing_during_a_run_empties_the_memory_before_the_next_token(model, tokenizer, stream):
    controls = Controls()
    run = stream(source=controls)
    steps = []
    for new in run:
        steps += new
        controls.clear = len(steps) == 10
    (cleared,) = [index for index, step in enumerate(steps) if step.settings.cleared]
    read = model(torch.tensor([[step.token_id for step in steps[cleared:]]]), use_cache=True).past_key_values
    np.testing.assert_allclose(trace_values(run.memory), trace_values(read), atol=1e-6)


def test_characters_of_several_tokens_arrive_whole(make_model, tokenizer, stream):
    """Byte-level tokens are parts of characters; no replacement character may be shown for them."""
    text = "naïve café"
    tokenizer = type(tokenizer).train_new_from_iterator(tokenizer, [text], vocab_size=260)
    run = stream(text, Sampling(max_new_tokens=1), make_model(vocab_size=len(tokenizer)), tokenizer)
    assert "".join(step.text for steps in run for step in steps if step.is_prompt) == text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("seed", None),
        ("seed", -1),
    ],
)
def test_impossible_sampling_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value!r}; allowed: "):
        Sampling(**{field: value})


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("a " * 200, "at most 100")])
def test_an_impossible_prompt_is_refused(tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        prompt_ids(tokenizer, prompt, 100)
