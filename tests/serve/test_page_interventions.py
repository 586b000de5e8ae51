"""Interventions, memory files and the choice of a model, in a real browser."""

import re

import numpy as np
import pytest
from replays import trace_values

from hf_engram import load_memory
from serve.live_memory.limits import Limits
from serve.live_memory.models import LoadedModel, ModelChoice, ModelShelf
from serve.live_memory.packets import Feed, slots_packet
from serve.live_memory.session import EMPTY, Session

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

PROMPT = "the memory of a recurrent network"


def test_erasing_what_a_token_wrote_shows_both_texts_side_by_side(visitor):
    text = visitor.generate(PROMPT, temperature=1)
    visitor.token(2).click()
    word = visitor.token(2).text_content().strip()
    visitor.start("Erase what it wrote")
    visitor.wait_for_end()
    assert visitor.text() == text
    without = visitor.page.get_by_label("The same without one write")
    expect(without).to_contain_text(PROMPT)
    expect(visitor.token(2)).to_have_class(re.compile("erased"))
    assert without.locator("span").count() == visitor.tokens()
    assert re.search(rf"Without what “{word}” wrote, (none|\d+) of the \d+ tokens after it came out", visitor.status())
    rows = visitor.page.locator("#memory .changes tbody tr")
    expect(rows).to_have_count(8)
    expect(rows.first).to_contain_text("%")
    visitor.screenshot("erased")

    # The two memories differ, and the pointer chooses which is shown.
    assert np.abs(visitor.trace(0) - visitor.trace(1)).max() > 0
    visitor.token(6).hover()
    visitor.wait_for_current(6)
    original = visitor.pictures()
    without.locator("span").nth(6).hover()
    visitor.page.wait_for_function("document.querySelector('#memory [data-current]').view.active === 1")
    assert visitor.pictures()["Hebbian trace"] != original["Hebbian trace"]
    rows.nth(1).click()
    visitor.wait_for_current(int(rows.nth(1).get_attribute("data-index")))

    visitor.generate(PROMPT)
    expect(without).to_be_hidden()


def test_plasticity_can_be_frozen_and_thawed_while_the_model_writes(visitor):
    visitor.fill(PROMPT, max_new_tokens=1000)
    visitor.press("Generate")
    visitor.wait_for_tokens(10)
    visitor.page.get_by_label("Freeze plasticity").check()
    visitor.page.wait_for_selector("#memory .text .frozen")
    frozen = visitor.trace()
    visitor.wait_for_tokens(visitor.tokens() + 5)
    np.testing.assert_array_equal(visitor.trace(), frozen)
    expect(visitor.page.locator("#memory .now")).to_contain_text("Plasticity was frozen")
    visitor.page.get_by_label("Freeze plasticity").uncheck()
    visitor.page.wait_for_selector("#memory .text .frozen + span:not(.frozen)")
    assert np.abs(visitor.trace() - frozen).max() > 0
    visitor.press("Stop")
    visitor.wait_for_status("stopped")


def test_slots_can_be_switched_off_by_text_and_by_shift_click(visitor):
    slots = visitor.page.get_by_label("Slots switched off")
    slots.fill("3, 7-8")
    visitor.generate(PROMPT)  # what was typed counts, though it was not sent on its own
    trace = visitor.trace()
    assert not trace[:, [3, 7, 8]].any()
    assert trace[:, 4].any()

    plot = visitor.page.locator("#memory .trace .plot")
    height = plot.bounding_box()["height"]
    for slot in (8, 12):
        plot.click(position={"x": 40, "y": height * (slot + 0.5) / 16}, modifiers=["Shift"])
    expect(slots).to_have_value("3, 7, 12")
    visitor.generate(PROMPT)
    assert not visitor.trace()[:, [3, 7, 12]].any()
    assert visitor.trace()[:, 8].any()

    slots.fill("99")
    slots.press("Enter")
    visitor.message(re.compile("'99' is out of range; this model has slots 0 to 15"))
    visitor.press("Generate")
    visitor.wait_for_status("error")
    assert visitor.status() == "Slots switched off: '99' is out of range; this model has slots 0 to 15."
    slots.fill("")
    slots.press("Enter")
    expect(slots).to_have_value("")


def test_the_memory_can_be_cleared_between_runs_and_during_one(visitor):
    visitor.generate(PROMPT)
    visitor.press("Clear memory")
    visitor.wait_for_status("idle")
    assert not visitor.trace().any()
    assert visitor.text() == ""

    visitor.fill(PROMPT, max_new_tokens=1000)
    visitor.press("Generate")
    visitor.wait_for_tokens(15)
    visitor.press("Clear memory")
    visitor.page.wait_for_selector("#memory .text .cleared")
    visitor.press("Stop")
    visitor.wait_for_status("stopped")
    cleared = visitor.ask("(view) => view.runs[0].tokens.findIndex(({ cleared }) => cleared)")
    origins, writers = visitor.ask(
        "({ runs: [{ memories }] }, t) => [memories.map(({ reads }) => reads[t].origins.bank), memories[0].writers(t)]",
        cleared,
    )
    np.testing.assert_allclose(origins, 1, atol=1e-6)
    assert writers == []


def test_a_memory_can_be_downloaded_and_loaded_tomorrow(visit, model, tmp_path):
    today = visit()
    today.generate(PROMPT)
    with today.page.expect_download() as download:
        today.press("Download")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"memory-after-\d+-tokens.safetensors", path.name)
    saved = trace_values(load_memory(path, model.config))
    np.testing.assert_allclose(today.trace(), saved, atol=1e-5 * np.abs(saved).max())
    today.begin_with("the memory shown")
    expected = today.generate("it is read")

    tomorrow = visit()
    with tomorrow.page.expect_file_chooser() as chooser:
        tomorrow.press("Load file")
    chooser.value.set_files(path)
    expect(tomorrow.page.locator("#memory [role=status]")).to_contain_text("A memory of")
    np.testing.assert_array_equal(tomorrow.trace(), saved)
    assert tomorrow.generate("it is read") == expected
    expect(tomorrow.page.locator("#memory .carried-share")).not_to_have_text("0.0 %")


def test_anything_else_than_a_memory_file_is_refused_with_a_sentence(visitor, tmp_path):
    visitor.generate(PROMPT)
    trace = visitor.trace()
    path = tmp_path / "memory.safetensors"
    path.write_bytes(b"not a memory")
    with visitor.page.expect_file_chooser() as chooser:
        visitor.press("Load file")
    chooser.value.set_files(path)
    visitor.message(re.compile("This memory was not loaded. 'memory.safetensors' is not a readable memory file"))
    np.testing.assert_array_equal(visitor.trace(), trace)


def test_a_fork_can_be_begun_with_again(visitor):
    visitor.generate(PROMPT)
    visitor.press("Fork")
    visitor.message(re.compile("Kept as “fork 1, after"))
    visitor.begin_with(re.compile("fork 1"))
    first = visitor.generate("it is")
    assert visitor.generate("it is") == first
    visitor.begin_with("an empty memory")
    assert visitor.generate("it is") != first


def test_another_checkpoint_can_be_chosen(visitor, text_folder, model):
    visitor.generate(PROMPT)
    visitor.page.get_by_role("button", name="Choose another model").click()
    name = visitor.page.get_by_role("textbox", name="Model")
    name.fill("/etc")
    visitor.press("Load this model")
    visitor.message("'/etc' is outside the folders that this page may read checkpoints from.")

    name.fill(str(text_folder))
    visitor.press("Load this model")
    line = visitor.page.locator("#model_line")
    expect(line).to_have_text(
        f"{text_folder}: {model.num_parameters():,} parameters, 2 layers, 16 slots of 24 features"
    )
    visitor.wait_for_status("idle")
    assert visitor.text() == ""
    visitor.generate(PROMPT)

    tick = visitor.page.get_by_label("I trust the author")
    expect(tick).not_to_be_checked()


@pytest.fixture
def stream(loaded):
    """The packets of a run, a token in each but the first."""
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 10, "seed": 0}
    return list(Session().generate(loaded, PROMPT, sampling, EMPTY, Limits(packets_per_second=10**6)))


def test_what_another_event_sends_does_not_disturb_a_text(visitor, loaded, stream):
    """Packets of two events arrive in whichever order."""
    feed = Feed()
    feed.sent = len(stream)
    visitor.feed([*stream[:4], feed.send(slots_packet([3])), *stream[4:]])
    visitor.wait_for_status("length")
    assert visitor.status() == "Done after 10 new tokens."
    ids = loaded.processor(PROMPT, return_tensors="pt")["input_ids"]
    written = loaded.model.generate(ids, do_sample=False, max_new_tokens=10)
    assert visitor.text() == loaded.processor.decode(written[0])


def test_after_a_gap_the_text_ends_with_a_sentence(visitor, stream):
    visitor.feed(stream[:4])
    visitor.wait_for_tokens(1)
    text = visitor.ask("({ runs }) => runs[0].tokens.map(({ text }) => text).join('')")
    visitor.feed(stream[5:])
    visitor.wait_for_status("error")
    assert visitor.status() == "Part of the stream was lost. The next run shows the memory again."
    assert visitor.text() == text
    expect(visitor.button("Erase what it wrote")).to_be_disabled()
    visitor.generate(PROMPT)
    expect(visitor.button("Erase what it wrote")).to_be_enabled()


def choose(visitor, folder):
    visitor.page.get_by_role("button", name="Choose another model").click()
    visitor.page.get_by_role("textbox", name="Model").fill(str(folder))
    visitor.press("Load this model")
    expect(visitor.page.locator("#model_line")).to_contain_text(str(folder))


def test_another_model_leaves_no_fork_and_no_slot_behind_in_the_controls(visitor, text_folder):
    visitor.generate(PROMPT)
    visitor.press("Fork")
    visitor.message(re.compile("Kept as “fork 1, after"))
    visitor.begin_with(re.compile("fork 1"))
    slots = visitor.page.get_by_label("Slots switched off")
    slots.fill("3")
    slots.press("Enter")
    choose(visitor, text_folder)
    expect(visitor.page.get_by_label("Begin with")).to_have_value("an empty memory")
    expect(slots).to_have_value("")
    visitor.generate(PROMPT)
    assert visitor.trace()[:, 3].any()


def test_whoever_had_to_give_up_their_memory_keeps_the_model_they_chose(
    serve, visit, make_model, tokenizer, model, text_folder
):
    """Its sizes are what their page shows."""
    small = LoadedModel(ModelChoice("tiny"), make_model(memory_size=8), tokenizer, "text")
    page = serve(small, limits=Limits(visitors=1))
    visitor, other = visit(page.local_url), visit(page.local_url)
    choose(visitor, text_folder)
    visitor.generate(PROMPT)
    (session,) = page.visitors.sessions()
    other.generate(PROMPT)
    assert session not in page.visitors.sessions()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    memory = model.generate(ids, do_sample=False, max_new_tokens=31, return_dict_in_generate=True).past_key_values
    visitor.generate(PROMPT, max_new_tokens=30)
    expected = trace_values(memory)
    np.testing.assert_allclose(visitor.trace(), expected, atol=1e-5 * np.abs(expected).max())


def test_a_model_that_is_no_longer_there_is_told_with_a_sentence(visitor, text_folder, monkeypatch):
    choose(visitor, text_folder)
    visitor.generate(PROMPT)

    def fail(shelf, choice):
        raise ValueError(f"{choice.name!r} was not loaded: it is gone.")

    monkeypatch.setattr(ModelShelf, "get", fail)
    sentence = f"{str(text_folder)!r} was not loaded: it is gone."
    visitor.press("Download")
    visitor.message(sentence)
    visitor.press("Erase what it wrote")
    visitor.wait_for_status("error")
    assert visitor.status() == sentence
