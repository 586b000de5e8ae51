"""Texts on the page, in a real browser: streaming, looking back, keyboard, screen readers, dark and narrow screens."""

import re

import numpy as np
import pytest
import torch
from replays import trace_values

from hf_engram.traces import record
from serve.live_memory.models import LoadedModel, ModelChoice

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

PROMPT = "the memory of a recurrent network"


@torch.no_grad()
def read_by_the_model(model, tokenizer, *texts):
    """Greedy continuations of prompts, 30 tokens each, on one memory: ids of the last, and the traces after it."""
    memory = None
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model(ids, past_key_values=memory, use_cache=True)
        shown = ids[0].tolist()
        for _ in range(30):
            shown.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([shown[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        memory = output.past_key_values
    return shown, trace_values(memory)


def value_columns(model):
    """What the page shows of a recorded trace: all of a cell's, and the values of a mixer's."""
    width = model.config.head_dim
    return slice(width, 2 * width) if "engram_mixer" in model.config.layer_types else slice(None)


def assert_same_trace(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_text_streams_while_the_memory_changes_until_stop_is_pressed(visitor):
    visitor.fill("the memory of", temperature=1, max_new_tokens=1000)
    visitor.press("Generate")
    visitor.wait_for_tokens(10)
    tokens, text, pictures = visitor.tokens(), visitor.text(), visitor.pictures()
    visitor.wait_for_tokens(tokens + 10)
    assert visitor.text().startswith(text)
    assert len(visitor.text()) > len(text)
    changed = {label for label, picture in visitor.pictures().items() if picture != pictures[label]}
    assert changed == set(pictures)
    visitor.screenshot("streaming")

    visitor.press("Stop")
    visitor.wait_for_status("stopped")
    tokens, text = visitor.tokens(), visitor.text()
    expect(visitor.button("Generate")).to_be_enabled()
    visitor.page.wait_for_timeout(400)
    assert (visitor.tokens(), visitor.text()) == (tokens, text)
    assert tokens < 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"trace_scale": 2.0, "hebbian_lr": 0.2},
        {"trace_scale": 2.0, "hebbian_lr": 0.2, "trace_clip": 0.01},
        {"layer_types": ["engram_mixer", "full_attention", "engram_mixer"], "num_hidden_layers": 3},
    ],
    ids=["unclipped", "clipped", "hybrid"],
)
def test_what_the_browser_shows_is_what_the_model_did(serve, visit, make_model, tokenizer, fields):
    """Text, trace, slot norms, and every part of every attribution, against the library."""
    model, clip = make_model(**fields), fields.get("trace_clip")
    visitor = visit(serve(LoadedModel(ModelChoice("tiny"), model, tokenizer, "text")).local_url)
    ids, expected = read_by_the_model(model, tokenizer, "it is read back", PROMPT)
    visitor.generate("it is read back")
    visitor.begin_with("the memory shown")
    assert visitor.generate(PROMPT) == tokenizer.decode(ids)
    assert_same_trace(visitor.trace(), expected)
    assert clip is None or np.abs(expected).max() == pytest.approx(clip)

    memory = None
    with torch.no_grad():
        before, _ = read_by_the_model(model, tokenizer, "it is read back")
        memory = model(torch.tensor([before]), use_cache=True).past_key_values
    (recording,) = record(model, torch.tensor([ids]), tokenizer=tokenizer, past_key_values=memory)
    memories = [memory for layer in recording.layers for memory in layer.heads or (layer,)]
    for number, recorded in enumerate(memories):
        parts = recorded.attribution.contribution
        shown = visitor.ask(
            "(view, m) => view.runs[0].memories[m].reads.map(({ origins: o }) => [o.bank, o.carried, o.clip])", number
        )
        np.testing.assert_allclose(shown, torch.stack([parts.bank, parts.carried, parts.clip], -1), atol=2e-4)
        writers = visitor.ask(
            "({ runs: [{ memories }] }, m) => memories[m].reads.map((_, t) => memories[m].writers(t))", number
        )
        shares = np.zeros((len(ids), len(ids)))
        for reader, row in enumerate(writers):
            for entry in row:
                shares[reader, entry["index"]] = entry["share"]
        np.testing.assert_allclose(shares, parts.tokens, atol=2e-4)
        norms = visitor.ask("(view, m) => view.runs[0].memories[m].reads.map(({ norms }) => Array.from(norms))", number)
        values = torch.stack([recorded.trace(t)[:, value_columns(model)] for t in range(len(ids))])
        np.testing.assert_allclose(norms, values.norm(dim=-1), rtol=1e-3, atol=1e-5)
    legend = visitor.page.locator("#memory .exactness")
    expect(legend).to_contain_text("Exact: the parts add up" if clip is None else "Approximate: the trace was clipped")


def test_two_visitors_at_once_do_not_share_memory(visit, slow_model, tokenizer):
    prompts = "the memory of", "it is read back"
    visitors = [visit(), visit()]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.fill(prompt)
    for visitor in visitors:
        visitor.start()
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.wait_for_end()
        ids, expected = read_by_the_model(slow_model, tokenizer, prompt)
        assert visitor.text() == tokenizer.decode(ids)
        assert_same_trace(visitor.trace(), expected)

    # A kept memory comes from the server, where it must not have been touched by the other visitor.
    visitors[0].begin_with("the memory shown")
    ids, expected = read_by_the_model(slow_model, tokenizer, prompts[0], "by attention")
    assert visitors[0].generate("by attention") == tokenizer.decode(ids)
    assert_same_trace(visitors[0].trace(), expected)


def test_the_same_seed_gives_the_same_text(visitor):
    text = visitor.generate("the", temperature=1, seed=3)
    assert visitor.generate("the", temperature=1, seed=3) == text
    assert visitor.generate("the", temperature=1, seed=4) != text


def test_markup_is_shown_and_not_run(visitor):
    markup = '<img src="x" onerror="window.ran = 1"><script>window.ran = 1</script> **bold** {{value}} ${value}'
    text = visitor.generate(markup, temperature=1, max_new_tokens=100)
    assert text.startswith(markup)
    assert re.search("[<>&]", text.removeprefix(markup)), "the continuation has no markup in it either"
    visitor.token(2).click()
    visitor.press("Erase what it wrote")
    visitor.page.wait_for_selector("#memory .changes tr[data-index]")
    inside = visitor.page.locator("#memory").locator(".text *, .changes td *, .now *, .candidates li *")
    assert set(inside.evaluate_all("nodes => nodes.map((node) => node.tagName)")) == {"SPAN"}
    assert visitor.page.evaluate("window.ran") is None


def test_every_panel_follows_the_token_under_the_pointer(visitor):
    visitor.generate(PROMPT)
    newest = visitor.pictures()
    token = visitor.token(12)
    token.hover()
    visitor.wait_for_current(12)
    then = visitor.pictures()
    assert all(then[label] != newest[label] for label in ("recalls from each slot", "Hebbian trace"))
    assert visitor.sentence().startswith(
        f"Token 13 of {visitor.tokens()} “{token.text_content().strip()}” recalls slot"
    )
    shaded = "e => [...e.querySelectorAll('span')].filter((s) => s.style.backgroundColor).map((s) => +s.dataset.index)"
    indices = visitor.page.get_by_label("Prompt and continuation").evaluate(shaded)
    assert indices
    assert max(indices) < 12
    marks = visitor.page.locator("#memory .timed .column-mark")
    assert marks.evaluate_all("marks => marks.map((m) => m.hidden)") == [False] * 3
    places = set(marks.evaluate_all("marks => marks.map((m) => m.style.left)"))
    assert len(places) == 1

    # From a picture over time to the text, and back to the newest token when the pointer leaves.
    plot = visitor.page.locator("#memory .norms .plot")
    columns = visitor.ask("(view) => view.columns")
    width = plot.bounding_box()["width"]
    plot.hover(position={"x": width * 5.5 / columns, "y": 100})
    visitor.wait_for_current(5)
    expect(visitor.token(5)).to_have_class(re.compile("current"))
    visitor.page.mouse.move(0, 0)
    visitor.wait_for_current(visitor.tokens() - 1)


def test_the_trace_of_a_token_in_the_past_is_the_trace_of_then(visitor, slow_model):
    visitor.generate(PROMPT * 8)
    assert visitor.tokens() > 72
    shown = visitor.ask("(view) => view.runs[0].memories.map((memory) => [...memory.traceAfter(70)])")
    pair = "({ recall, content }) => [[...recall], [...content]]"
    reads = visitor.ask(f"(view) => view.runs[0].memories.map(({{ reads }}) => reads.slice(0, 71).map({pair}))")
    rate = slow_model.config.hebbian_lr
    for then, writes in zip(shown, reads, strict=True):
        trace = 0.0
        for recall, content in writes:
            trace = (1 - rate) * trace + rate * np.outer(recall, content)
        np.testing.assert_allclose(then, trace.ravel(), atol=1e-5)


def test_a_slot_under_the_pointer_shows_who_wrote_it(visitor):
    visitor.generate(PROMPT)
    plot = visitor.page.locator("#memory .trace .plot")
    height = plot.bounding_box()["height"]
    plot.hover(position={"x": 50, "y": height * 7.5 / 16})
    expect(visitor.page.locator("#memory .now")).to_contain_text("slot 7 has")
    expect(visitor.page.locator("#memory .now")).to_contain_text("what it holds was written by “")
    marks = visitor.page.locator("#memory .slotted .row-mark").evaluate_all("marks => marks.map((m) => m.style.top)")
    assert set(marks) == {"43.75%"}

    # What was there before is not theirs.
    visitor.begin_with("the memory shown")
    visitor.generate(PROMPT)
    plot.hover(position={"x": 50, "y": height * 7.5 / 16})
    expect(visitor.page.locator("#memory .now")).to_contain_text(
        re.compile("; it holds memory from before this text, and what this text wrote into it is by “")
    )


def test_keyboard_and_scrubber_go_back_and_forth(visitor):
    visitor.generate(PROMPT)
    text = visitor.page.get_by_label("Prompt and continuation")
    text.focus()
    last = visitor.tokens() - 1
    for key, expected in [("ArrowLeft", last - 1), ("Home", 0), ("ArrowRight", 1), ("End", last), ("Home", 0)]:
        text.press(key)
        visitor.wait_for_current(expected)
    expect(visitor.token(0)).to_have_class(re.compile("pinned"))

    scrubber = visitor.page.get_by_role("slider", name="Token shown")
    scrubber.focus()
    scrubber.press("ArrowRight")
    visitor.wait_for_current(1)
    expect(scrubber).to_have_attribute("aria-valuetext", re.compile(r"^Token 2 of \d+ “.*” recalls slot"))
    scrubber.press("Escape")
    visitor.wait_for_current(last)
    expect(visitor.button("Latest")).to_have_attribute("aria-pressed", "true")


def test_a_pinned_token_stays_while_the_model_writes_on(visitor):
    visitor.fill(PROMPT, max_new_tokens=1000)
    visitor.press("Generate")
    visitor.wait_for_tokens(12)
    visitor.token(3).click()
    visitor.page.mouse.move(0, 0)
    visitor.wait_for_tokens(visitor.tokens() + 5)
    assert visitor.current() == 3
    visitor.press("Latest")
    visitor.page.wait_for_function("document.querySelector('#memory [data-current]').dataset.current > 12")
    visitor.press("Stop")
    visitor.wait_for_status("stopped")


def test_another_layer_shows_another_trace(visitor):
    visitor.generate(PROMPT)
    before = visitor.pictures()
    visitor.page.get_by_label("Layer").select_option("2 of 2")
    after = visitor.pictures()
    assert all(before[label] != after[label] for label in before)


def test_the_most_likely_tokens_are_named_beside_the_one_that_was_chosen(visitor):
    visitor.generate(PROMPT)
    rows = visitor.page.locator("#memory .candidates li")
    expect(rows).to_have_count(5)
    expect(rows.first).to_have_class("chosen")  # without sampling
    expect(visitor.page.locator("#memory .candidates .title")).to_contain_text("most likely were")


def test_what_the_token_memory_added_to_a_choice_is_told(serve, visit, make_model, tokenizer):
    model = make_model(token_memory_size=8)
    with torch.no_grad():
        model.token_memory.scale.bias.fill_(4.0)  # what it recalls outweighs the network's own prediction
    visitor = visit(serve(LoadedModel(ModelChoice("tiny"), model, tokenizer, "text")).local_url)
    visitor.generate(PROMPT)
    title = visitor.page.locator("#memory .candidates .title")
    expect(title).to_have_text(re.compile(r"had [\d.]+ %, [\d.]+ % of it remembered, by token \d+ \([\d.]+ %\)"))


def test_an_empty_prompt_is_answered_with_a_sentence(visitor):
    visitor.fill("")
    visitor.press("Generate")
    visitor.wait_for_status("error")
    assert "The prompt is empty" in visitor.status()
    visitor.generate("the memory of")


def test_the_keyboard_starts_and_stops_a_run_and_does_not_start_two(visitor):
    visitor.fill("the memory of", max_new_tokens=1000)
    visitor.prompt().press("Shift+Enter")
    visitor.wait_for_tokens(5)
    visitor.prompt().press("Shift+Enter")
    visitor.message("The model is still writing: press Stop first.")
    visitor.wait_for_tokens(visitor.tokens() + 5)
    visitor.button("Stop").press("Enter")
    visitor.wait_for_status("stopped")


def test_an_example_is_a_prompt(visitor):
    visitor.page.get_by_text("The album was recorded").click()
    expect(visitor.prompt()).to_have_value(re.compile("The album was recorded"))


def test_dark_mode(visit):
    visitor = visit(color_scheme="dark")
    visitor.generate(PROMPT, temperature=1, max_new_tokens=60)
    luminance = "e => Math.max(...getComputedStyle(e).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number))"
    assert visitor.page.get_by_label("Prompt and continuation").evaluate(luminance) < 64
    visitor.screenshot("dark")


def test_a_phone_shows_everything_without_scrolling_sideways(visit):
    visitor = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    visitor.generate(PROMPT, temperature=1, max_new_tokens=60)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    expect(visitor.page.get_by_label("Prompt and continuation")).to_be_in_viewport()
    visitor.token(1).tap()
    visitor.wait_for_current(1)
    visitor.screenshot("phone")


def test_everything_that_can_be_used_has_a_name(visitor):
    """For screen readers: no control, picture or region without one."""
    visitor.generate(PROMPT)
    snapshot = visitor.page.locator("body").aria_snapshot()
    nameless = re.findall(
        r"^\s*- (?:button|textbox|slider|spinbutton|checkbox|combobox|region)(?::| \[.*|$)", snapshot, re.M
    )
    assert nameless == []
    for name in ("recalls from each slot", "Hebbian trace", "norm of each slot", "shares of bank", "written by each"):
        assert re.search(rf'img ".*{name}.*"', snapshot)
