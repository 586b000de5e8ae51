"""Somebody in front of the page."""

from pathlib import Path

import numpy as np
from playwright.sync_api import expect

SCREENSHOTS = Path(__file__).parents[1] / "screenshots"
TEXT, WITHOUT = "Prompt and continuation", "The same without one write"


class Visitor:
    """A browser on the page, with the eyes and hands that tests need."""

    def __init__(self, browser, url, **context):
        self.complaints = []
        self.page = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **context}).new_page()
        self.page.on("console", lambda message: self.complain(message.type == "error", message.text))
        self.page.on("pageerror", lambda error: self.complain(True, str(error)))
        self.page.on("response", lambda r: self.complain(r.status >= 400, f"{r.status} {r.url}"))
        local = (url, "data:", "blob:")
        self.page.on("request", lambda r: self.complain(not r.url.startswith(local), f"external {r.url}"))
        self.page.set_default_timeout(20_000)
        self.page.goto(url)
        self.wait_for_status("idle")

    def complain(self, is_bad, text):
        if is_bad:
            self.complaints.append(text)

    def leave(self):
        self.page.context.close()
        assert self.complaints == []

    # Controls

    def fill(self, prompt, temperature=0, max_new_tokens=30, seed=0):
        self.prompt().fill(prompt)
        self.page.get_by_role("spinbutton", name="Temperature").fill(str(temperature))
        self.page.get_by_role("spinbutton", name="New tokens").fill(str(max_new_tokens))
        self.page.get_by_role("spinbutton", name="Seed").fill(str(seed))
        self.page.keyboard.press("Tab")

    def prompt(self):
        return self.page.get_by_role("textbox", name="Prompt")

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def press(self, name):
        self.button(name).click()

    def begin_with(self, memory):
        self.page.get_by_label("Begin with").click()
        self.page.get_by_role("option", name=memory).click()

    def generate(self, prompt, **sampling):
        self.fill(prompt, **sampling)
        self.start()
        self.wait_for_end()
        return self.text()

    def start(self, button="Generate"):
        self.packets_before = self.packets()
        self.press(button)

    def wait_for_end(self):
        """Until the run started last has ended; a wait for the status alone could take the run before for it."""
        self.page.wait_for_function(
            "before => Number(document.querySelector('#memory [data-status=length]')?.dataset.packets) > before",
            arg=self.packets_before,
        )
        expect(self.button("Generate")).to_be_enabled()

    # What is shown

    def data(self, name):
        return self.page.locator("#memory [data-status]").get_attribute(f"data-{name}")

    def packets(self):
        return int(self.data("packets"))

    def tokens(self):
        return int(self.data("tokens"))

    def current(self):
        return int(self.data("current"))

    def wait_for_status(self, status, view="memory"):
        self.page.wait_for_selector(f"#{view} [data-status={status}]")

    def wait_for_tokens(self, at_least):
        self.page.wait_for_function(f"document.querySelector('#memory [data-tokens]').dataset.tokens >= {at_least}")

    def wait_for_current(self, index):
        self.page.wait_for_selector(f"#memory [data-current='{index}']")

    def text(self, label=TEXT):
        return self.page.get_by_label(label).text_content()

    def token(self, index, label=TEXT):
        return self.page.get_by_label(label).locator("span").nth(index)

    def status(self):
        return self.page.locator("#memory [role=status]").text_content()

    def sentence(self):
        return self.page.locator("#memory .now").text_content()

    def message(self, text):
        return expect(self.page.get_by_text(text)).to_be_visible()

    def ask(self, script, *args):
        """What a script finds in the view: `(view, ...args) => ...`."""
        call = f"(e, args) => ({script})(e.view, ...args)"
        return self.page.locator("#memory [data-status]").evaluate(call, list(args))

    def feed(self, strings):
        """Let the view receive packets, as the server sends them."""
        receive = "(e, strings) => strings.forEach((string) => e.receive(JSON.parse(string)))"
        self.page.locator("#memory [data-status]").evaluate(receive, list(strings))

    def trace(self, run=0):
        """The trace of all memories, which have the same width, after the newest token `[M, N, W]`."""
        traces = self.ask("(view, run) => view.runs[run].memories.map(({ trace }) => Array.from(trace))", run)
        slots = self.ask("({ model }) => model.slots")
        return np.array(traces, np.float32).reshape(len(traces), slots, -1)

    def picture(self, label):
        """Every pixel of a canvas."""
        return (
            self.page.locator("#memory")
            .get_by_role("img", name=label)
            .evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join()")
        )

    def pictures(self):
        """Every pixel of every panel, by its label."""
        labels = "recalls from each slot", "Hebbian trace", "norm of each slot", "shares of bank", "written by each"
        self.page.evaluate("new Promise(requestAnimationFrame)")
        return {label: self.picture(label) for label in labels}

    def screenshot(self, name):
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
