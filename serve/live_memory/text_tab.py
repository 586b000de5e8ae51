"""The tab for texts: prompt and controls on the left, text and memory on the right."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from .controls import format_slots, parse_slots
from .limits import MAX_SEED, Limits
from .memory_view import memory_view
from .models import LoadedModel, ModelShelf
from .packets import slots_packet
from .session import EMPTY, SHOWN, Session
from .visitors import Visitors

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False}
ANSWERED: dict[str, Any] = {**PRIVATE, "concurrency_limit": None}  # what is not queued cannot answer with a message
EXAMPLES = [
    "The river rises in the hills north of the town and",
    "The album was recorded in London in 1994.",
    "== Early life ==\n",
    "It is a truth universally acknowledged",
]
MEMORY_HELP = """
**Fork** keeps a copy here, to begin with again under *Begin with*. **Download** saves the memory to a file;
**load** it tomorrow and go on where it stopped.
"""


class TextTab(NamedTuple):
    """What changes when another model is chosen.

    Attributes:
        view: is sent a packet.
        beginning: offers no forks any more.
        slots: those switched off, none any more.
    """

    view: gr.HTML
    beginning: gr.Dropdown
    slots: gr.Textbox


def add_text_tab(visitors: Visitors, shelf: ModelShelf, limits: Limits) -> TextTab:
    """The tab, with its events."""
    with gr.Tab("Text", id="text"), gr.Row(elem_classes="tab-grid"):
        with gr.Column(elem_classes="tab-controls"):
            prompt = gr.Textbox(value=EXAMPLES[0], label="Prompt", info="Shift+Enter generates", lines=3)
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", min_width=100)
                stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
            queue = gr.Markdown(container=False, elem_id="queue")
            gr.Examples(EXAMPLES, prompt, cache_examples=False, api_visibility="private")
        with gr.Column(elem_classes="tab-settings"):
            with gr.Accordion("Interventions"):
                freeze = gr.Checkbox(
                    label="Freeze plasticity", info="The memory is read; nothing is written, nothing fades"
                )
                slots = gr.Textbox(
                    label="Slots switched off", info="Such as 3, 7-9; or Shift-click a row of a picture", max_lines=1
                )
                clear = gr.Button("Clear memory", size="sm")
                gr.Markdown(
                    "All three act on the next token, also while the model writes. To erase what one token "
                    "wrote, click it in the text."
                )
            with gr.Accordion("Memory"):
                beginning = gr.Dropdown([EMPTY, SHOWN], value=EMPTY, label="Begin with")
                with gr.Row():
                    fork = gr.Button("Fork", size="sm", min_width=80)
                    download = gr.Button("Download", size="sm", min_width=80)
                    upload = gr.UploadButton("Load file", file_types=[".safetensors"], size="sm", min_width=80)
                saved = gr.DownloadButton(visible="hidden", elem_id="saved")
                gr.Markdown(MEMORY_HELP)
            with gr.Accordion("Sampling"):
                controls = sampling_controls(limits)
        with gr.Column(elem_classes="tab-view"):
            view = memory_view(shelf.own["text"], "text", "memory")

    buttons = [generate, stop, fork, download, upload]

    def loaded_for(session: Session) -> LoadedModel:
        return shelf.watched(session.choices, "text")

    def begin(request: gr.Request) -> list[Any]:
        return [said(visitors.session(request).begin), *button_states(running=True)]

    def set_slots(text: str, request: gr.Request) -> str:
        session = visitors.session(request)
        session.controls.slots_off = said(parse_slots, text, said(loaded_for, session).model.config.memory_size)
        return session.feed.send(slots_packet(session.controls.slots_off))

    def run(request: gr.Request, text: str, begin_with: str, frozen: bool, off: str, *values: float) -> Iterator[str]:
        session = visitors.session(request)
        try:
            loaded = loaded_for(session)
            # What was typed may not have been sent on its own yet.
            session.controls.plastic = not frozen
            session.controls.slots_off = parse_slots(off, loaded.model.config.memory_size)
        except ValueError as error:
            yield session.refuse(str(error))
            return
        sampling = dict(zip(controls, values, strict=True))
        yield from session.generate(loaded, text, sampling, begin_with, limits)

    def begin_erasing(event: gr.EventData, request: gr.Request) -> list[Any]:
        visitors.session(request).to_erase = int(event.index)
        return begin(request)

    def erase(request: gr.Request) -> Iterator[str]:
        session = visitors.session(request)
        try:
            loaded = loaded_for(session)
        except ValueError as error:
            yield session.refuse(str(error))
            return
        yield from session.erase(loaded, session.to_erase, limits)

    def finish(request: gr.Request) -> list[Any]:
        session = visitors.session(request)
        return [session.finish() or gr.skip(), *button_states(running=False), gr.Dropdown(session.beginnings())]

    def follow(asked: gr.events.Dependency, fn: Callable, inputs: list[gr.components.Component]) -> None:
        # Stop sets a flag that the run looks at: Gradio's `cancels` drops packets that are on their way.
        asked.success(
            fn,
            inputs,
            view,
            concurrency_limit=limits.concurrent_runs,
            concurrency_id="model",
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=queue,
        ).then(finish, None, [view, *buttons, beginning], **AT_ONCE)

    asked = gr.on([generate.click, prompt.submit], begin, None, [view, *buttons], **ANSWERED)
    follow(asked, run, [prompt, beginning, freeze, slots, *controls.values()])
    follow(view.erase(begin_erasing, None, [view, *buttons], **ANSWERED), erase, [])

    def set_plastic(frozen: bool, request: gr.Request) -> None:
        visitors.session(request).controls.plastic = not frozen

    def switch_slots(event: gr.EventData, request: gr.Request) -> Any:
        session = visitors.session(request)
        if int(event.count) <= session.switches:
            return gr.skip()  # an older one that was overtaken
        session.switches = int(event.count)
        text = format_slots([int(slot) for slot in event.slots])
        session.controls.slots_off = said(parse_slots, text, said(loaded_for, session).model.config.memory_size)
        return text

    def stop_run(request: gr.Request) -> None:
        visitors.session(request).controls.stop = True

    stop.click(stop_run, None, None, **AT_ONCE)
    freeze.input(set_plastic, freeze, None, **AT_ONCE)
    gr.on([slots.submit, slots.blur], set_slots, slots, view, **ANSWERED)
    view.switch_slots(switch_slots, None, slots, trigger_mode="multiple", **ANSWERED)

    def clear_memory(request: gr.Request) -> Any:
        return visitors.session(request).clear() or gr.skip()

    def fork_memory(request: gr.Request) -> gr.Dropdown:
        session = visitors.session(request)
        name = said(session.fork, limits)
        gr.Info(f"Kept as “{name}”.")
        return gr.Dropdown(session.beginnings())

    def save(request: gr.Request) -> str:
        session = visitors.session(request)
        return str(said(session.download, said(loaded_for, session)))

    def load(path: str, request: gr.Request) -> tuple[str, gr.Dropdown]:
        session = visitors.session(request)
        packet = said(session.upload, said(loaded_for, session), Path(path))
        return packet, gr.Dropdown(session.beginnings(), value=SHOWN)

    clear.click(clear_memory, None, view, **AT_ONCE)
    fork.click(fork_memory, None, beginning, **ANSWERED)
    upload.upload(load, upload, [view, beginning], **ANSWERED)
    download.click(save, None, saved, **ANSWERED).success(
        None, js="() => document.querySelector('#saved').click()", api_visibility="private"
    )
    return TextTab(view, beginning, slots)


def said(fn: Callable, *args: Any) -> Any:
    """What `fn` returns; its `ValueError` as a message on the page."""
    try:
        return fn(*args)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def sampling_controls(limits: Limits) -> dict[str, gr.components.FormComponent]:
    """One control per field of `Sampling`."""
    return {
        "temperature": gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: the most likely token"),
        "top_p": gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p"),
        "max_new_tokens": gr.Slider(1, limits.new_tokens, 200, step=1, label="New tokens, at most"),
        "seed": gr.Number(
            0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", info="The same seed gives the same text"
        ),
    }


def button_states(running: bool) -> list[gr.Button]:
    """Generate, Stop, Fork, Download and Load file while a run is going on, or not."""
    idle = gr.Button(interactive=not running)
    return [idle, gr.Button(interactive=running), idle, idle, gr.UploadButton(interactive=not running)]
