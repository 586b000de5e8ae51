"""The streaming core: text, seeds, stopping, and what is reported about the memory."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from hf_engram import as_new_sequence
from serve.live_memory.packets import traces
from serve.live_memory.session import Session
from serve.live_memory.streaming import MAX_PROMPT_TOKENS, PROMPT_CHUNK, Sampling, TokenStream

PROMPT = "the memory of a"
GREEDY = Sampling(temperature=0, max_new_tokens=30)


def text_of(stream):
    return "".join(step.text for steps in stream for step in steps)


def generated_ids(model, tokenizer, prompt=PROMPT, **kwargs):
    inputs = tokenizer(prompt, return_tensors="pt")
    return model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=30, **kwargs)


def test_greedy_text_is_that_of_generate(model, tokenizer):
    assert text_of(TokenStream(model, tokenizer, PROMPT, GREEDY)) == tokenizer.decode(
        generated_ids(model, tokenizer)[0]
    )


def test_prompts_longer_than_a_chunk_are_read_whole(model, tokenizer):
    prompt = PROMPT * 40
    stream = TokenStream(model, tokenizer, prompt, GREEDY)
    assert len(stream.prompt_ids) > 2 * PROMPT_CHUNK
    assert text_of(stream) == tokenizer.decode(generated_ids(model, tokenizer, prompt)[0])


def test_text_ends_at_the_end_of_text_token_which_is_not_shown(make_model, tokenizer):
    ids = generated_ids(make_model(), tokenizer)[0].tolist()
    model = make_model(eos_token_id=ids[-5])
    stream = TokenStream(model, tokenizer, PROMPT, GREEDY)
    expected = generated_ids(model, tokenizer)[0]
    assert text_of(stream) == tokenizer.decode(expected[:-1])
    assert stream.finish_reason == "eos"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    def text(seed):
        torch.rand(seed + 1)  # the global generator plays no part
        return text_of(TokenStream(model, tokenizer, PROMPT, Sampling(seed=seed)))

    assert text(1) == text(1) != text(2)


def test_top_p_close_to_zero_is_greedy(model, tokenizer):
    narrow = Sampling(temperature=2.0, top_p=1e-6, max_new_tokens=30)
    greedy = text_of(TokenStream(model, tokenizer, PROMPT, GREEDY))
    assert text_of(TokenStream(model, tokenizer, PROMPT, narrow)) == greedy


def test_stop_ends_the_text_before_the_next_token(model, tokenizer):
    seen = []
    stream = TokenStream(model, tokenizer, PROMPT, GREEDY, should_stop=lambda: len(seen) >= 5)
    for steps in stream:
        seen.append(steps)
    assert len(seen) == 5
    assert stream.finish_reason == "stopped"


def test_stop_is_heard_while_a_long_prompt_is_read(model, tokenizer):
    seen = []
    stream = TokenStream(model, tokenizer, PROMPT * 40, GREEDY, should_stop=lambda: bool(seen))
    for steps in stream:
        seen.append(steps)
    assert [len(steps) for steps in seen] == [PROMPT_CHUNK]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_replaying_the_writes_gives_the_trace_of_the_model(make_model, tokenizer, residual, clip):
    model = make_model(residual=residual, trace_clip=clip)
    stream = TokenStream(model, tokenizer, PROMPT, Sampling(max_new_tokens=50))
    rate, trace = model.config.hebbian_lr, 0.0
    for steps in stream:
        for step in steps:
            trace = (1 - rate) * trace + rate * np.einsum("ln,lh->lnh", step.recall, step.encoding)
            trace = trace if clip is None else trace.clip(-clip, clip)
    np.testing.assert_allclose(trace, traces(stream.memory), atol=1e-6)
    assert clip is None or np.abs(trace).max() == pytest.approx(clip)


def test_the_memory_has_read_prompt_and_text(model, tokenizer):
    stream = TokenStream(model, tokenizer, PROMPT, GREEDY)
    text_of(stream)
    read = model(generated_ids(model, tokenizer), use_cache=True).past_key_values
    np.testing.assert_allclose(traces(stream.memory), traces(read), atol=1e-6)


def test_a_memory_is_carried_on_as_by_generate(model, tokenizer):
    stream = TokenStream(model, tokenizer, PROMPT, GREEDY)
    text_of(stream)
    memory = DynamicCache(config=model.config)
    model(generated_ids(model, tokenizer), past_key_values=memory, use_cache=True)

    expected = generated_ids(model, tokenizer, "it is read", past_key_values=as_new_sequence(memory))
    carried_on = TokenStream(model, tokenizer, "it is read", GREEDY, memory=stream.memory)
    assert text_of(carried_on) == tokenizer.decode(expected[0])


def test_characters_of_several_tokens_arrive_whole(make_model, tokenizer):
    """Byte-level tokens are parts of characters; no replacement character may be shown for them."""
    text = "naïve café"
    tokenizer = type(tokenizer).train_new_from_iterator(tokenizer, [text], vocab_size=260)
    stream = TokenStream(make_model(vocab_size=len(tokenizer)), tokenizer, text, Sampling(max_new_tokens=1))
    shown = "".join(step.text for steps in stream for step in steps if step.is_prompt)
    assert shown == text


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("max_new_tokens", 0), ("seed", None), ("seed", -1)],
)
def test_impossible_sampling_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value}; allowed: "):
        Sampling(**{field: value})


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("a " * MAX_PROMPT_TOKENS * 2, "at most 4096")])
def test_an_impossible_prompt_is_refused_and_leaves_the_memory_alone(model, tokenizer, prompt, message):
    session = Session(memory=TokenStream(model, tokenizer, PROMPT, GREEDY).memory)
    memory = session.memory
    (packet,) = session.generate(model, tokenizer, prompt, {}, keep_memory=False)
    assert '"status":"error"' in packet
    assert message in packet
    assert session.memory is memory


def test_a_failing_model_ends_the_run_with_a_sentence_that_does_not_repeat_the_prompt(model, tokenizer, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError(PROMPT)

    monkeypatch.setattr(model, "forward", fail)
    session = Session()
    *_, last = session.generate(model, tokenizer, PROMPT, {}, keep_memory=False)
    assert "The model failed (RuntimeError)" in last
    assert PROMPT not in last
    assert session.memory is None
