"""Every option of `generate` that shapes the next token, with the state as without it, and what each one promises."""

import pytest
import torch
from helpers import BOOKS, left_padded, same, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, WatermarkDetector, WatermarkingConfig

OPTIONS = {
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.5},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "top_h": {"do_sample": True, "top_h": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "temperature": {"do_sample": True, "temperature": 0.3},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[token] for token in range(20)]},
    "suppressed": {"suppress_tokens": [*range(15, 40)]},
    "sequence_bias": {"sequence_bias": [[[9], 4.0]]},
    "allowed_tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [3 + len(ids) % 5, 20 + row]},
    "forced_end": {"forced_eos_token_id": 6},
    "minimum_length": {"eos_token_id": list(range(3, 38)), "min_new_tokens": 6},
    "length_penalty": {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": [5, 11, 17, 23]},
    "decaying_length": {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": 5},
    "guidance": {"guidance_scale": 2.0},
    "guidance_by_negative_prompt": {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[4, 9, 12]] * 3)},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")},
    "beams_of_ngrams": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "min_p": 0.1, "num_return_sequences": 2},
}


def generate(model, inputs, use_cache=True, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 10, "pad_token_id": 1, "use_cache": use_cache, **options})


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_option_gives_the_same_with_state_as_without(option):
    model, inputs = tiny_model(), left_padded([5, 8, 3])
    with_state = generate(model, inputs, **option)
    same(with_state, generate(model, inputs, use_cache=False, **option))
    plain = generate(model, inputs, do_sample=option.get("do_sample", False), num_beams=option.get("num_beams", 1))
    assert with_state.shape != plain.shape or (with_state != plain).any(), "the option has no effect here"


def test_forbidden_tokens_do_not_appear():
    model, inputs = tiny_model(), {"input_ids": tokens(3, 6)}
    new = generate(model, inputs, bad_words_ids=[[5]], suppress_tokens=[4, 6], no_repeat_ngram_size=1)
    assert not {4, 5, 6} & {*new[:, 6:].flatten().tolist()}
    assert all(len({*row}) == len(row) for row in new[:, 6:].tolist())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_only_allowed_tokens_appear(num_beams):
    allowed = [[5, 9], [7, 11]]
    model, inputs = tiny_model(), {"input_ids": tokens(2, 6)}
    new = generate(model, inputs, prefix_allowed_tokens_fn=lambda row, ids: allowed[row], num_beams=num_beams)[:, 6:]
    for row in range(2):
        assert {*new[row].tolist()} <= {*allowed[row]}


def test_watermark_is_found():
    model, inputs = tiny_model(bos_token_id=2), {"input_ids": tokens(2, 6)}
    config = WatermarkingConfig(bias=20.0)
    marked = generate(model, inputs, watermarking_config=config, do_sample=True, max_new_tokens=60, top_k=0)
    plain = generate(model, inputs, do_sample=True, max_new_tokens=60, top_k=0)
    detector = WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=config)
    assert detector(marked[:, 6:]).tolist() == [True, True]
    assert detector(plain[:, 6:]).tolist() == [False, False]


@pytest.fixture(scope="module")
def books():
    return AutoModelForCausalLM.from_pretrained(BOOKS), AutoTokenizer.from_pretrained(BOOKS)


def test_generation_ends_with_a_string(books):
    model, tokenizer = books
    inputs = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    whole = generate(model, inputs, max_new_tokens=60)
    [text] = tokenizer.batch_decode(whole)
    stop = text[70:73]
    cut = generate(model, inputs, max_new_tokens=60, stop_strings=stop, tokenizer=tokenizer)
    assert cut.shape[1] < whole.shape[1]
    same(cut, whole[:, : cut.shape[1]])
    ended = tokenizer.decode(cut[0])
    assert stop in ended
    assert stop not in tokenizer.decode(cut[0, :-1])[len("It is a truth") :]


def test_generation_ends_in_time(books):
    model, tokenizer = books
    inputs = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    sequences = generate(model, inputs, max_new_tokens=100_000, max_time=0.5)
    assert inputs["input_ids"].shape[1] < sequences.shape[1] < 100_000


def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A decoding method of one's own, as `custom_generate` takes it."""
    past_key_values = model_kwargs["past_key_values"]
    tokens = input_ids
    for _ in range(generation_config.max_new_tokens):
        logits = model(tokens, past_key_values=past_key_values, use_cache=True).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], 1)
    return input_ids


def test_decoding_method_of_ones_own():
    model, inputs = tiny_model(), {"input_ids": tokens(2, 6)}
    same(generate(model, inputs, custom_generate=greedy), generate(model, inputs))


@pytest.mark.parametrize(
    "strategy",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 4, "force_words_ids": [[5]]},
    ],
    ids=["contrastive", "dola", "group_beams", "constrained_beams"],
)
def test_strategies_that_transformers_moved_to_the_hub_say_so(strategy):
    with pytest.raises(
        ValueError, match=r"requires `trust_remote_code=True`.* since it loads https://hf\.co/transformers-community/"
    ):
        generate(tiny_model(), {"input_ids": tokens(1, 5)}, **strategy)
