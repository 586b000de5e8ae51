"""What a visitor can do between and during runs: erase a write, keep memories as files and forks."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from replays import trace_values
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_engram import load_memory, save_memory
from hf_engram.traces import counterfactual
from serve.live_memory.controls import Controls, format_slots, parse_slots
from serve.live_memory.limits import Limits
from serve.live_memory.models import ModelChoice, load_model
from serve.live_memory.session import EMPTY, SHOWN, Session

PROMPT = "the memory of a recurrent"
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 20, "seed": 3}
LIMITS = Limits()


@pytest.fixture
def session():
    return Session()


def packets_of(strings):
    return [json.loads(string) for string in strings]


def generate(session, loaded, prompt=PROMPT, sampling=GREEDY, begin_with=EMPTY, limits=LIMITS):
    return packets_of(session.generate(loaded, prompt, sampling, begin_with, limits))


def erase(session, loaded, index):
    return packets_of(session.erase(loaded, index, LIMITS))


def tokens_in(packets):
    return [token for packet in packets if packet["kind"] == "tokens" for token in packet["tokens"]]


def text_in(packets):
    return "".join(token["text"] for token in tokens_in(packets))


def ids_of(loaded, packets):
    return loaded.processor(text_in(packets))["input_ids"]


def test_packets_are_numbered_without_a_gap(session, loaded):
    session.begin()
    packets = generate(session, loaded)
    assert [packet["number"] for packet in packets] == list(range(2, len(packets) + 2))
    assert packets[-1] == {"number": packets[-1]["number"], "kind": "status", "status": "length", "message": ""}
    parts = [packet["part"] for packet in packets if packet["kind"] == "tokens"]
    assert parts == list(range(1, len(parts) + 1))


def test_a_packet_holds_no_markup_that_gradio_would_warn_of(session, loaded):
    strings = list(session.generate(loaded, "<script>run()</script>", GREEDY, EMPTY, LIMITS))
    assert not any("<" in string for string in strings)
    assert text_in(packets_of(strings)).startswith("<script>run()</script>")


def test_erasing_nothing_that_matters_changes_nothing(session, make_model, loaded):
    """With a trace that is never read, the write of a token cannot matter."""
    deaf = loaded._replace(model=make_model(trace_scale=0.0))
    original = generate(session, deaf, sampling=SAMPLED)
    again = erase(session, deaf, 2)
    assert text_in(again) == text_in(original)
    changes = next(packet["changes"] for packet in again if packet["kind"] == "changes")
    assert all(before == after for *_, before, after in changes)


@pytest.mark.parametrize("erased", [2, 12])
def test_a_text_without_one_write_is_what_the_model_writes_without_it(session, make_model, loaded, erased):
    strong = loaded._replace(model=make_model(trace_scale=30.0, hebbian_lr=0.5, initializer_range=0.3))
    original = generate(session, strong)
    without = erase(session, strong, erased)
    tokens = tokens_in(without)
    assert [index for index, token in enumerate(tokens) if not token.get("writes", True)] == [erased]
    kept = max(erased + 1, sum(token["is_prompt"] for token in tokens))
    assert text_in(without) != text_in(original)
    assert [t["text"] for t in tokens[:kept]] == [t["text"] for t in tokens_in(original)[:kept]]

    given = torch.tensor([session.run.ids[:kept]])
    write_mask = torch.ones_like(given, dtype=torch.bool)
    write_mask[0, erased] = False
    memory = strong.model(given[:, :-1], write_mask=write_mask[:, :-1], use_cache=True).past_key_values
    if erased == kept - 1:  # the last given token is read by generate, which has no mask for it
        first = strong.model(given[:, -1:], write_mask=write_mask[:, -1:], past_key_values=memory, use_cache=True)
        given = torch.cat([given, first.logits[:, -1].argmax(-1)[None]], -1)
    out = strong.model.generate(given, past_key_values=memory, do_sample=False, max_length=len(tokens))
    assert text_in(without) == loaded.processor.decode(out[0])


def test_the_changes_shown_are_the_largest_ones(session, make_model, loaded):
    strong = loaded._replace(model=make_model(trace_scale=30.0, hebbian_lr=0.5, initializer_range=0.3))
    generate(session, strong)
    shown = next(packet["changes"] for packet in erase(session, strong, 3) if packet["kind"] == "changes")
    ids = torch.tensor([session.run.ids])
    reference = counterfactual(strong.model, ids, erase=3, tokenizer=loaded.processor)
    before, after = (logits.softmax(-1) for logits in (reference.original_logits, reference.logits_without))
    largest, tokens = (after - before).abs().max(-1)
    places = largest.argsort(descending=True)[: len(shown)].tolist()
    expected = [
        [place, loaded.processor.decode(tokens[place]), before[place, tokens[place]], after[place, tokens[place]]]
        for place in places
    ]
    assert [(place, token) for place, token, *_ in shown] == [(place, token) for place, token, *_ in expected]
    np.testing.assert_allclose([row[2:] for row in shown], [row[2:] for row in expected], atol=1e-5)
    assert shown[0][3] != shown[0][2]


def test_a_sampled_text_without_a_write_uses_the_same_draws(session, loaded):
    """The draws of the tokens kept are skipped, so that what follows differs only because of the write."""
    original = generate(session, loaded, sampling=SAMPLED)
    index = len(tokens_in(original)) - 2
    assert text_in(erase(session, loaded, index)) == text_in(original)


def test_interventions_of_a_run_are_repeated_when_a_write_is_erased(session, loaded):
    packets = []
    session.controls.slots_off = (1, 2)
    for string in session.generate(loaded, PROMPT, GREEDY, EMPTY, Limits(packets_per_second=10**6)):
        packets.append(json.loads(string))
        read = len(tokens_in(packets))
        session.controls.plastic = read < 10
        session.controls.clear = session.controls.clear or read == 15
    settings = [[token.get(name) for name in ("plastic", "slots_off", "cleared")] for token in tokens_in(packets)]
    assert settings[0] == [None, [1, 2], None]
    assert [None, [1, 2], True] != settings[15] != settings[14]
    again = [
        [t.get(name) for name in ("plastic", "slots_off", "cleared")] for t in tokens_in(erase(session, loaded, 3))
    ]
    assert again == settings


@pytest.mark.parametrize("index", [-1, 10**6])
def test_erasing_a_token_that_is_not_there_is_answered_with_a_sentence(session, loaded, index):
    generate(session, loaded)
    (packet,) = erase(session, loaded, index)
    assert packet["status"] == "error"
    assert "choose one of its tokens" in packet["message"]


def test_a_memory_file_goes_on_where_the_memory_stopped(session, loaded, tmp_path):
    generate(session, loaded)
    path = session.download(loaded)
    assert path.name == f"memory-after-{session.memory.layers[0].tokens_seen}-tokens.safetensors"
    saved = load_memory(path, loaded.model.config)
    np.testing.assert_array_equal(trace_values(saved), trace_values(session.memory))
    expected = text_in(generate(session, loaded, "it is", begin_with=SHOWN))

    tomorrow = Session()
    uploaded = path.rename(tmp_path / "upload.safetensors")
    packet = json.loads(tomorrow.upload(loaded, uploaded))
    assert packet["tokens_seen"] > 20
    assert not uploaded.exists()
    assert text_in(generate(tomorrow, loaded, "it is", begin_with=SHOWN)) == expected


def test_a_fork_is_not_touched_by_what_follows(session, loaded):
    generate(session, loaded)
    name = session.fork(LIMITS)
    first = text_in(generate(session, loaded, "it is", begin_with=name))
    generate(session, loaded, "by attention", begin_with=SHOWN)
    assert text_in(generate(session, loaded, "it is", begin_with=name)) == first
    assert first != text_in(generate(session, loaded, "it is", begin_with=EMPTY))


def test_no_more_forks_are_kept_than_allowed(session, loaded):
    generate(session, loaded)
    names = [session.fork(Limits(forks=2)) for _ in range(3)]
    assert session.beginnings() == [EMPTY, SHOWN, *names[1:]]


@pytest.fixture
def memory_file(session, loaded, tmp_path):
    generate(session, loaded)
    path = tmp_path / "memory.safetensors"
    save_memory(session.memory, path, loaded.model.config)
    return path


def damaged(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


DAMAGES = {
    "not a number": (lambda t, m: t["layers.0.trace"].fill_(float("nan")), "not finite numbers"),
    "two texts": (lambda t, m: t.update({k: v.repeat_interleave(2, 0) for k, v in t.items()}), "not the memory of one"),
    "no count": (lambda t, m: m.update(tokens_seen='"many"'), "not a readable memory file"),
    "no tokens": (lambda t, m: m.update(tokens_seen="0"), "how many tokens"),
    "no architecture": (lambda t, m: m.pop("architecture"), "not a readable memory file"),
    "another format": (lambda t, m: m.update(format="weights"), "not a memory file"),
    "a tensor missing": (lambda t, m: t.pop("layers.1.trace"), "not a readable memory file"),
}


@pytest.mark.parametrize(("change", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_memory_file_is_refused_with_a_sentence(session, loaded, memory_file, change, sentence):
    shown = session.memory
    damaged(memory_file, change)
    with pytest.raises(ValueError, match=f"This memory was not loaded. .*{sentence}") as refusal:
        session.upload(loaded, memory_file)
    assert str(memory_file.parent) not in str(refusal.value)
    assert session.memory is shown
    assert not memory_file.exists()


def test_a_memory_of_another_architecture_is_refused_and_the_difference_named(session, loaded, memory_file, make_model):
    other = loaded._replace(model=make_model(memory_size=8))
    with pytest.raises(ValueError, match="memory_size is 16 in the file, 8 here"):
        session.upload(other, memory_file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04cos\nsystem\n", b"\xff" * 1000])
def test_what_is_no_safetensors_file_is_refused(session, loaded, tmp_path, content):
    path = tmp_path / "memory.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'memory\.safetensors' is not a readable memory file"):
        session.upload(loaded, path)


def test_without_a_memory_there_is_nothing_to_keep(session, loaded):
    for action in (lambda: session.fork(LIMITS), lambda: session.download(loaded)):
        with pytest.raises(ValueError, match="The memory is empty"):
            action()


@pytest.mark.parametrize("fields", [{}, {"layer_types": ["full_attention", "engram"]}], ids=["engram", "hybrid"])
def test_a_run_stopped_before_its_first_token_leaves_nothing_to_keep(session, make_model, loaded, fields):
    """It can be stopped while it waits for the model."""
    own = loaded._replace(model=make_model(**fields))
    session.begin()
    session.controls.stop = True
    assert generate(session, own)[-1]["status"] == "stopped"
    session.finish()
    for action in (lambda: session.fork(LIMITS), lambda: session.download(own)):
        with pytest.raises(ValueError, match="The memory is empty"):
            action()
    assert generate(session, own, begin_with=SHOWN)[0]["tokens_seen"] == 0


@pytest.mark.parametrize("erasing", [False, True], ids=["after the last token", "while a write is erased"])
def test_a_memory_that_no_token_found_cleared_is_cleared_at_the_end(session, loaded, erasing):
    generate(session, loaded)
    session.begin()
    strings = session.erase(loaded, 2, LIMITS) if erasing else session.generate(loaded, PROMPT, GREEDY, EMPTY, LIMITS)
    for string in strings:
        if erasing or json.loads(string).get("status") == "length":
            assert session.clear() is None
    packet = json.loads(session.finish())
    assert (packet["kind"], packet["status"], packet["traces"]) == ("run", "idle", None)
    assert session.memory is None
    session.begin()
    assert session.finish() is not None  # it never began
    session.begin()
    generate(session, loaded)
    assert session.finish() is None
    assert session.memory is not None


def test_an_impossible_run_is_refused_and_leaves_the_memory_alone(session, loaded):
    generate(session, loaded)
    memory = session.memory
    for arguments, sentence in [
        ({"prompt": ""}, "empty"),
        ({"prompt": "a " * 200, "limits": Limits(prompt_tokens=100)}, "at most 100"),
        ({"sampling": {**GREEDY, "max_new_tokens": 101}, "limits": Limits(new_tokens=100)}, "allowed: 1 to 100"),
        ({"sampling": {**GREEDY, "temperature": -1}}, "`temperature` is -1"),
        ({"begin_with": "fork 9"}, "no memory called 'fork 9'"),
    ]:
        (packet,) = generate(session, loaded, **arguments)
        assert packet["status"] == "error"
        assert sentence in packet["message"]
    assert session.memory is memory


def test_only_one_run_at_a_time(session):
    session.begin()
    with pytest.raises(ValueError, match="press Stop first"):
        session.begin()
    assert "Too many visitors" in session.finish()  # it never began
    session.begin()


def test_a_failing_model_ends_the_run_with_a_sentence_that_does_not_repeat_the_prompt(
    session, loaded, monkeypatch, caplog
):
    def fail(**kwargs):
        raise RuntimeError(PROMPT)

    monkeypatch.setattr(loaded.model, "forward", fail)
    last = generate(session, loaded)[-1]
    assert "The model failed (RuntimeError)" in last["message"]
    assert session.memory is None
    assert PROMPT not in str(last) + caplog.text
    assert re.search(r"RuntimeError at .*test_session.py:\d+", caplog.text)


def test_prompts_and_texts_are_not_logged(session, loaded, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        text = text_in(generate(session, loaded))
        erase(session, loaded, 3)
    captured = capfd.readouterr()
    for shown in (PROMPT, text[-20:]):
        assert shown not in caplog.text + captured.out + captured.err


def test_a_visitor_who_leaves_gives_up_everything(session, loaded):
    generate(session, loaded)
    session.fork(LIMITS)
    folder = session.download(loaded).parent
    assert folder.exists()
    run = session.generate(loaded, PROMPT, {**GREEDY, "max_new_tokens": 1000}, EMPTY, LIMITS)
    next(run)
    next(run)
    session.close()
    assert json.loads([*run][-1])["status"] == "stopped"
    assert session.memory is None
    assert session.beginnings() == [EMPTY, SHOWN]
    assert not folder.exists()


@pytest.mark.parametrize(("text", "slots"), [("", ()), ("3", (3,)), ("7-9, 3", (3, 7, 8, 9)), ("0-1,1", (0, 1))])
def test_slots_are_written_as_numbers_and_ranges(text, slots):
    assert parse_slots(text, 16) == slots
    assert parse_slots(format_slots(slots), 16) == slots


@pytest.mark.parametrize("text", ["x", "3-", "16", "9-7", "-1", "0-15"])
def test_impossible_slots_are_refused_with_a_sentence(text):
    with pytest.raises(ValueError, match=r"^Slots switched off: "):
        parse_slots(text, 16)


def test_controls_clear_once():
    controls = Controls(clear=True)
    assert [controls.next(0, 1)[0].cleared for _ in range(2)] == [True, False]


def test_another_model_means_another_memory(session, loaded, text_folder):
    generate(session, loaded)
    session.fork(LIMITS)
    packet = json.loads(session.choose(load_model(ModelChoice(str(text_folder)))))
    assert packet["kind"] == "model"
    assert session.memory is None
    assert session.beginnings() == [EMPTY, SHOWN]
