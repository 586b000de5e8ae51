"""The page in a real browser, and the command that serves it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import free_port, wait_for

from serve.live_memory.packets import traces

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
from serve.live_memory.page import open_page  # noqa: E402  gradio may be missing

REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = REPOSITORY / "tests" / "screenshots"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS_PER_STEP = 0.02  # slow enough to be watched and stopped


@pytest.fixture(scope="module")
def hosts():
    """Names of the hosts that this process looks up."""
    seen = set()
    look_up = socket.getaddrinfo

    def recording(host, *args, **kwargs):
        seen.add(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", recording)
        yield seen


@pytest.fixture(scope="module", params=[None], ids=["unclipped"])
def served_model(request, make_model):
    model = make_model(trace_clip=request.param)
    model.register_forward_pre_hook(lambda *_: time.sleep(SECONDS_PER_STEP))
    return model


@pytest.fixture(scope="module")
def url(served_model, tokenizer, hosts):
    page = open_page(
        served_model, tokenizer, "tiny", server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True
    )
    yield page.local_url
    page.close()
    assert hosts <= {"127.0.0.1", "localhost", None}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        if chromium is None:
            pytest.skip("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Visitor:
    """Somebody in front of the page, in a browser that knows nothing of others."""

    def __init__(self, browser, url, **context):
        self.complaints = []
        self.page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
        self.page.on("console", lambda message: self.complain(message.type == "error", message.text))
        self.page.on("pageerror", lambda error: self.complain(True, str(error)))
        self.page.on("response", lambda r: self.complain(r.status >= 400, f"{r.status} {r.url}"))
        local = (url, "data:", "blob:")
        self.page.on("request", lambda r: self.complain(not r.url.startswith(local), f"external {r.url}"))
        self.page.set_default_timeout(15_000)
        self.page.goto(url)
        self.wait_for_status("idle")

    def complain(self, is_bad, text):
        if is_bad:
            self.complaints.append(text)

    def leave(self):
        self.page.context.close()
        assert self.complaints == []

    def fill(self, prompt, temperature=0, max_new_tokens=30, seed=0):
        self.prompt().fill(prompt)
        self.page.get_by_role("spinbutton", name="Temperature").fill(str(temperature))
        self.page.get_by_role("spinbutton", name="New tokens").fill(str(max_new_tokens))
        self.page.get_by_role("spinbutton", name="Seed").fill(str(seed))
        self.page.keyboard.press("Tab")

    def prompt(self):
        return self.page.get_by_role("textbox", name="Prompt")

    def press(self, name):
        self.button(name).click()

    def generate(self, prompt, **sampling):
        self.fill(prompt, **sampling)
        self.start()
        self.wait_for_end()
        return self.text()

    def start(self):
        self.packets_before = self.packets()
        self.press("Generate")

    def wait_for_end(self):
        """Until the run started last has ended; a wait for the status alone could take the run before for it."""
        self.page.wait_for_function(
            "before => Number(document.querySelector('#memory [data-status=length]')?.dataset.packets) > before",
            arg=self.packets_before,
        )
        sync_api.expect(self.button("Generate")).to_be_enabled()

    def packets(self):
        return int(self.page.locator("#memory [data-status]").get_attribute("data-packets"))

    def button(self, name):
        return self.page.get_by_role("button", name=name)

    def wait_for_status(self, status):
        self.page.wait_for_selector(f"#memory [data-status={status}]", timeout=20_000)

    def wait_for_tokens(self, at_least):
        self.page.wait_for_function(f"document.querySelector('#memory [data-tokens]').dataset.tokens >= {at_least}")

    def tokens(self):
        return int(self.page.locator("#memory [data-tokens]").get_attribute("data-tokens"))

    def text(self):
        return self.page.get_by_label("Prompt and continuation").text_content()

    def status(self):
        return self.page.locator("#memory [role=status]").text_content()

    def trace(self):
        values, shape = self.page.locator("#memory [data-status]").evaluate(
            "e => [Array.from(e.memory().trace), [e.memory().layers, e.memory().slots, e.memory().width]]"
        )
        return np.array(values, np.float32).reshape(shape)

    def picture(self, label):
        """Every pixel of a canvas."""
        return self.page.get_by_role("img", name=label).evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join()"
        )

    def screenshot(self, name):
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.fixture
def visit(browser, url):
    visitors = []

    def visit(**context):
        visitors.append(Visitor(browser, url, **context))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def visitor(visit):
    return visit()


@torch.no_grad()
def read_by_the_model(model, tokenizer, *texts):
    """Greedy continuations of prompts, 30 tokens each, on one memory: the last text, and the traces after it."""
    memory = None
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model(ids, past_key_values=memory, use_cache=True)
        shown = ids[0].tolist()
        for _ in range(30):
            shown.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([shown[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        memory = output.past_key_values
    return tokenizer.decode(shown), traces(memory)


def assert_same_trace(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.browser
def test_text_streams_while_the_memory_changes_until_stop_is_pressed(visitor):
    visitor.fill("the memory of", temperature=1, max_new_tokens=1000)
    visitor.press("Generate")
    visitor.wait_for_tokens(5)
    tokens, text = visitor.tokens(), visitor.text()
    names = "recalls from each slot", "Hebbian trace", "norm of each slot"
    pictures = [visitor.picture(name) for name in names]
    visitor.wait_for_tokens(tokens + 10)
    assert visitor.text().startswith(text)
    assert len(visitor.text()) > len(text)
    assert all(visitor.picture(name) != before for name, before in zip(names, pictures, strict=True))
    visitor.screenshot("streaming")

    visitor.press("Stop")
    visitor.wait_for_status("stopped")
    tokens, text = visitor.tokens(), visitor.text()
    sync_api.expect(visitor.button("Generate")).to_be_enabled()
    visitor.page.wait_for_timeout(20 * 1000 * SECONDS_PER_STEP)
    assert (visitor.tokens(), visitor.text()) == (tokens, text)
    assert tokens < 1000


@pytest.mark.browser
@pytest.mark.parametrize("served_model", [None, 0.01], ids=["unclipped", "clipped"], indirect=True)
def test_text_and_trace_in_the_browser_are_those_of_the_model(visitor, served_model, tokenizer):
    text, expected = read_by_the_model(served_model, tokenizer, "the memory of a recurrent network")
    assert visitor.generate("the memory of a recurrent network") == text
    assert_same_trace(visitor.trace(), expected)
    clip = served_model.config.trace_clip
    assert clip is None or np.abs(expected).max() == pytest.approx(clip)


@pytest.mark.browser
def test_two_visitors_at_once_do_not_share_memory(visit, served_model, tokenizer):
    prompts = "the memory of", "it is read back"
    visitors = [visit(), visit()]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.fill(prompt)
    for visitor in visitors:
        visitor.start()
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.wait_for_end()
        text, expected = read_by_the_model(served_model, tokenizer, prompt)
        assert visitor.text() == text
        assert_same_trace(visitor.trace(), expected)

    # A kept memory comes from the server, where it must not have been touched by the other visitor.
    visitors[0].page.get_by_label("Keep memory").check()
    text, expected = read_by_the_model(served_model, tokenizer, prompts[0], "by attention")
    assert visitors[0].generate("by attention") == text
    assert_same_trace(visitors[0].trace(), expected)


@pytest.mark.browser
def test_memory_is_kept_if_asked_for_and_can_be_cleared(visitor, served_model, tokenizer):
    first, again = "the memory of", "it is read back"
    fresh = read_by_the_model(served_model, tokenizer, again)[1]
    visitor.generate(first)
    visitor.generate(again)
    assert_same_trace(visitor.trace(), fresh)

    visitor.page.get_by_label("Keep memory").check()
    visitor.generate(again)
    assert_same_trace(visitor.trace(), read_by_the_model(served_model, tokenizer, again, again)[1])

    visitor.press("Clear memory")
    visitor.wait_for_status("idle")
    assert not visitor.trace().any()
    assert visitor.text() == ""
    visitor.generate(again)
    assert_same_trace(visitor.trace(), fresh)


@pytest.mark.browser
def test_the_same_seed_gives_the_same_text(visitor):
    text = visitor.generate("the", temperature=1, seed=3)
    assert visitor.generate("the", temperature=1, seed=3) == text
    assert visitor.generate("the", temperature=1, seed=4) != text


@pytest.mark.browser
def test_markup_is_shown_and_not_run(visitor):
    markup = '<img src="x" onerror="window.ran = 1"><script>window.ran = 1</script> **bold** {{value}} ${value}'
    text = visitor.generate(markup, temperature=1, max_new_tokens=150)
    assert text.startswith(markup)
    assert re.search("[<>&]", text.removeprefix(markup)), "the continuation has no markup in it either"
    elements = visitor.page.get_by_label("Prompt and continuation").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].map((child) => child.tagName))]"
    )
    assert elements == ["SPAN"]
    assert visitor.page.evaluate("window.ran") is None


@pytest.mark.browser
def test_another_layer_shows_another_trace(visitor):
    visitor.generate("the memory of")
    pictures = [visitor.picture("Hebbian trace")]
    visitor.page.get_by_label("Layer").select_option("2 of 2")
    visitor.page.wait_for_function("before => before !== document.querySelector('#memory .now').textContent", arg="")
    visitor.page.evaluate("new Promise(requestAnimationFrame)")
    pictures.append(visitor.picture("Hebbian trace"))
    assert pictures[0] != pictures[1]


@pytest.mark.browser
def test_an_empty_prompt_is_answered_with_a_sentence(visitor):
    visitor.fill("")
    visitor.press("Generate")
    visitor.wait_for_status("error")
    assert "The prompt is empty" in visitor.status()
    visitor.generate("the memory of")


@pytest.mark.browser
def test_the_keyboard_starts_and_stops_a_run_and_does_not_start_two(visitor):
    visitor.fill("the memory of", max_new_tokens=1000)
    visitor.prompt().press("Shift+Enter")
    visitor.wait_for_tokens(5)
    visitor.prompt().press("Shift+Enter")
    sync_api.expect(visitor.page.get_by_text("The model is still writing: press Stop first.")).to_be_visible()
    visitor.wait_for_tokens(visitor.tokens() + 5)
    visitor.button("Stop").press("Enter")
    visitor.wait_for_status("stopped")


@pytest.mark.browser
def test_dark_mode(visit):
    visitor = visit(color_scheme="dark")
    visitor.generate("the memory of a recurrent network", temperature=1, max_new_tokens=60)
    luminance = "e => Math.max(...getComputedStyle(e).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number))"
    assert visitor.page.get_by_label("Prompt and continuation").evaluate(luminance) < 64
    visitor.screenshot("dark")


@pytest.mark.browser
def test_a_phone_shows_everything_without_scrolling_sideways(visit):
    visitor = visit(viewport={"width": 420, "height": 900})
    visitor.generate("the memory of a recurrent network", temperature=1, max_new_tokens=60)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    sync_api.expect(visitor.page.get_by_label("Prompt and continuation")).to_be_in_viewport()
    visitor.screenshot("phone")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("root") / "model_cards" / "enn-books"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_app(*args, script=None, cwd=REPOSITORY):
    command = ["-m", "serve.app"] if script is None else [script]
    return subprocess.Popen(
        [sys.executable, *command, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["repository", "space"])
def test_the_command_serves_a_checkpoint_folder(checkpoint, layout):
    port = str(free_port())
    if layout == "repository":
        app = run_app("--model", str(checkpoint), "--port", port)
    else:  # a Space: the contents of serve/ at the root, the checkpoint in its usual place
        root = checkpoint.parents[1]
        shutil.copytree(REPOSITORY / "serve", root, dirs_exist_ok=True)
        app = run_app("--port", port, script="app.py", cwd=root)
    try:
        config = json.loads(wait_for(f"http://127.0.0.1:{port}/config", app))
    finally:
        app.terminate()
        app.wait()
    assert config["title"] == "Engram memory"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--help"], "--trust-remote-code"),
        (["--model", "model_cards/no-such-model"], "There is no checkpoint folder 'model_cards/no-such-model'"),
        (["--port", "x"], "invalid int value: 'x'"),
    ],
)
def test_the_command_explains_itself(args, says):
    app = run_app(*args)
    output, _ = app.communicate(timeout=60)
    assert says in output
    assert "Traceback" not in output
    assert app.returncode == (0 if args == ["--help"] else app.returncode)
