"""Times the page on the shipped checkpoint, in headless Chromium: `python -m benchmarks.app`.

Tokens per second of plain `generate`, of the page's stream on its own, and of the page with a browser watching, on the
same machine, one after the other in every round; CPU time is the server's, without the browser's. Frames are drawings
of the memory. A long session is watched for the time of a drawing and for memory; then several visitors generate at
once. A visitor's browser is usually on another machine: --apart gives it a core of its own, and the server one.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from playwright.sync_api import Browser, Page, sync_playwright

from serve.app import MODEL
from serve.live_memory.limits import Limits
from serve.live_memory.models import LoadedModel, ModelChoice, ModelShelf, load_model
from serve.live_memory.page import open_page
from serve.live_memory.session import EMPTY, Session

PROMPT = "It is a truth universally acknowledged"
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DATA = "document.querySelector('#memory [data-status]').dataset"
# Notes every drawing: when it was, after how many tokens, and how long it took.
WATCH = """() => {
  const view = document.querySelector("#memory [data-status]").view;
  window.drawings = [];
  let seen = view.drawings;
  const look = () => {
    const { drawings, milliseconds } = view;
    if (drawings !== seen) window.drawings.push([performance.now(), view.runs.at(-1).tokens.length, milliseconds]);
    seen = drawings;
    requestAnimationFrame(look);
  };
  look();
}"""
HEAP = "() => { window.gc?.(); return performance.memory.usedJSHeapSize / 1e6; }"


def main() -> None:
    """Print the tables."""
    args = parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed; its path can be given in the variable CHROMIUM.")
    torch.set_num_threads(args.threads)
    server_core, browser_core = sorted(os.sched_getaffinity(0))[:2] if args.apart else (None, None)
    move_to(server_core)  # and with it all threads of the server, which are yet to come
    loaded = load_model(ModelChoice(args.model))
    loaded.model.generation_config.eos_token_id = None  # texts of one length
    limits = Limits()
    page = open_page(ModelShelf([loaded], 1), limits, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    print(f"{args.model}, torch threads: {torch.get_num_threads()}, torch {torch.__version__}")
    move_to(browser_core)  # the browser is started there
    with sync_playwright() as playwright:
        flags = [*FLAGS, "--enable-precise-memory-info", "--js-flags=--expose-gc"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        move_to(server_core)
        compare_rates(loaded, limits, browser, page.local_url, args)
        watch_long_session(browser, page.local_url, args.long)
        watch_visitors(browser, page.local_url, args)
        browser.close()
    page.close()


def move_to(core: int | None) -> None:
    """Let this thread, and what it starts from now on, run on one core; `None` changes nothing."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help="checkpoint of a language model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="texts per way of writing them (default: %(default)s)")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long session (default: %(default)s)")
    parser.add_argument("--visitors", type=int, default=4, help="visitors at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--apart", action="store_true", help="one core for the server, another for the browser (Linux)")
    args = parser.parse_args()
    if args.apart and len(os.sched_getaffinity(0)) < 2:
        parser.error("--apart needs two cores; this process may use one.")
    return args


def compare_rates(loaded: LoadedModel, limits: Limits, browser: Browser, url: str, args: argparse.Namespace) -> None:
    """Tokens per second in three ways, and what the browser drew meanwhile."""
    tab = open_tab(browser, url)
    drawn: list[Any] = []

    def watched() -> None:
        drawn.append(write_text(tab, args.tokens))

    ways: dict[str, Callable[[], object]] = {
        "generate": lambda: generate(loaded, args.tokens),
        "stream": lambda: stream(loaded, limits, args.tokens),
        "page in a browser": watched,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):  # the first one warms up
        for name, way in ways.items():
            begin, begin_work = time.perf_counter(), time.process_time()
            way()
            seconds[name].append(time.perf_counter() - begin)
            work[name].append(time.process_time() - begin_work)
    plain = seconds["generate"][1:]
    print(f"\n{args.tokens} tokens, median of {args.rounds}{'tokens/s':>14}{'of generate':>13}{'CPU ms/token':>14}")
    for name, times in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(plain, times[1:], strict=True))
        milliseconds = 1000 * statistics.median(work[name][1:]) / args.tokens
        print(f"{name:24}{args.tokens / statistics.median(times[1:]):14.0f}{100 * ratio:11.0f} %{milliseconds:14.2f}")
    written = statistics.median(tokens_per_second(drawings) for drawings in drawn[1:])
    plain_rate = args.tokens / statistics.median(plain)
    print(
        f"the page, from its first to its last new token: {written:.0f} tokens/s, "
        f"{100 * written / plain_rate:.0f} % of generate"
    )
    rates = [frames_per_second(drawings) for drawings in drawn[1:]]
    print(f"frames drawn per second while writing: {statistics.median(rates):.1f} (lowest of a text: {min(rates):.1f})")
    tab.context.close()


@torch.inference_mode()
def generate(loaded: LoadedModel, tokens: int) -> None:
    """A text by `generate`."""
    inputs = loaded.processor(PROMPT, return_tensors="pt")
    torch.manual_seed(SAMPLING["seed"])
    options = {"temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "top_k": 0}
    loaded.model.generate(**inputs, do_sample=True, max_new_tokens=tokens, **options)


def stream(loaded: LoadedModel, limits: Limits, tokens: int) -> None:
    """The same text with its memory, as packets that nobody reads."""
    for _ in Session().generate(loaded, PROMPT, {**SAMPLING, "max_new_tokens": tokens}, EMPTY, limits):
        pass


def open_tab(browser: Browser, url: str) -> Page:
    """The page, ready to write."""
    tab = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    tab.goto(url)
    tab.wait_for_selector("#memory [data-status=idle]")
    tab.evaluate(WATCH)
    return tab


def begin_text(tab: Page, tokens: int) -> int:
    """Press Generate; how many packets had arrived before."""
    packets = tab.evaluate(f"Number({DATA}.packets)")
    tab.get_by_role("spinbutton", name="New tokens").fill(str(tokens))
    tab.keyboard.press("Tab")
    tab.evaluate("window.drawings = []")
    tab.get_by_role("button", name="Generate", exact=True).click()
    return packets


def finish_text(tab: Page, packets_before: int) -> list[list[float]]:
    """Wait for the end of a text; its drawings."""
    ended = f"({{ status, packets }}) => status === 'length' && packets > {packets_before}"
    tab.wait_for_function(f"({ended})({DATA})", timeout=600_000)
    tab.wait_for_function("!document.querySelector('.tab-controls button.primary').disabled")
    return tab.evaluate("window.drawings")


def write_text(tab: Page, tokens: int) -> list[list[float]]:
    """A text on the page; its drawings."""
    return finish_text(tab, begin_text(tab, tokens))


def frames_per_second(drawings: list[list[float]]) -> float:
    """Drawings between the first and the last that showed another number of tokens than the one before."""
    fresh = [now for (now, tokens, _), (_, before, _) in zip(drawings[1:], drawings, strict=False) if tokens > before]
    return (len(fresh) - 1) / (fresh[-1] - fresh[0]) * 1000 if len(fresh) > 1 else 0.0


def tokens_per_second(drawings: list[list[float]]) -> float:
    """Tokens that arrived between the first drawing that shows any and the last, without what starts and ends a run."""
    restart = max((i for i in range(1, len(drawings)) if drawings[i][1] < drawings[i - 1][1]), default=0)
    shown = [(now, tokens) for now, tokens, _ in drawings[restart:] if tokens]
    (first, before), (last, after) = shown[0], next(entry for entry in shown if entry[1] == shown[-1][1])
    return (after - before) / (last - first) * 1000 if last > first else float("inf")


def watch_long_session(browser: Browser, url: str, tokens: int) -> None:
    """Does the page stay responsive, and do browser and server stay small?"""
    tab = open_tab(browser, url)
    write_text(tab, 10)
    heap, server = tab.evaluate(HEAP), server_megabytes()
    drawings = write_text(tab, tokens)
    quarter = max(len(drawings) // 4, 1)
    # The first drawing of a text clears what was there before; a short text may have no other.
    first, last = ([ms for *_, ms in part] for part in (drawings[1 : quarter + 1] or drawings, drawings[-quarter:]))
    print(f"\n{tokens} tokens at a stretch{'first quarter':>20}{'last quarter':>15}")
    print(f"{'median drawing, ms':24}{statistics.median(first):16.2f}{statistics.median(last):15.2f}")
    print(f"{'slowest drawing, ms':24}{max(first):16.2f}{max(last):15.2f}")
    rates = [frames_per_second(part) for part in (drawings[: quarter + 1], drawings[-quarter:])]
    print(f"{'frames per second':24}{rates[0]:16.1f}{rates[1]:15.1f}")
    print(
        f"browser heap: {heap:.0f} MB before, {tab.evaluate(HEAP):.0f} MB after; a second text of that length:", end=" "
    )
    write_text(tab, tokens)
    print(f"{tab.evaluate(HEAP):.0f} MB")
    print(f"server, most memory ever held: {server:.0f} MB before, {server_megabytes():.0f} MB after both")
    tab.context.close()


def watch_visitors(browser: Browser, url: str, args: argparse.Namespace) -> None:
    """Do all who come at the same time make progress?"""
    tabs = [open_tab(browser, url) for _ in range(args.visitors)]
    begin = time.perf_counter()
    packets = [begin_text(tab, args.tokens) for tab in tabs]
    drawings = [finish_text(tab, before) for tab, before in zip(tabs, packets, strict=True)]
    seconds = time.perf_counter() - begin
    rate = args.visitors * args.tokens / seconds
    print(f"\n{args.visitors} visitors at once, {args.tokens} tokens each: {rate:.0f} tokens/s in all")
    rates = [frames_per_second(drawn) for drawn in drawings]
    print(f"frames per second of each: {json.dumps([round(rate, 1) for rate in rates])}")
    for tab in tabs:
        tab.context.close()


def server_megabytes() -> float:
    """The largest memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
