"""The line that names the model, and the choice of another one."""

from typing import Any

import gradio as gr

from .models import LoadedModel, ModelShelf
from .session import EMPTY
from .text_tab import ANSWERED, TextTab, said
from .visitors import Visitors

REMOTE_CODE = "I trust the author: run the Python code that comes with this model"


def add_model_chooser(
    visitors: Visitors,
    shelf: ModelShelf,
    text_tab: TextTab,
    image_view: gr.HTML,
    tabs: gr.Tabs,
    image_tab: gr.Tab,
) -> None:
    """The line and the choice, with their events.

    Args:
        text_tab: parts of the tab for texts.
        image_view: the view in the tab for images.
        tabs: with a tab for each kind, whose id is what it reads.
    """
    line = gr.Markdown(model_line(shelf.own["text"]), elem_id="model_line")
    with gr.Accordion("Choose another model", open=False):
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Model", info="Id on the Hugging Face Hub, or a checkpoint folder", max_lines=1)
            revision = gr.Textbox(label="Revision", info="Branch, tag or commit; empty for main", max_lines=1)
        trust = gr.Checkbox(
            label=REMOTE_CODE,
            info=None if shelf.allow_remote_code else "Switched off on this server.",
            interactive=shelf.allow_remote_code,
        )
        load = gr.Button("Load this model")

    def choose(name: str, revision: str, trust: bool, request: gr.Request) -> list[Any]:
        session = visitors.session(request)
        loaded = said(shelf.get, said(shelf.check, name, revision, trust))
        packet = said(session.choose, loaded)
        line_and_tabs = [model_line(loaded), gr.Tabs(selected=loaded.reads)]
        if loaded.reads == "image":
            return [*line_and_tabs, gr.Tab(visible=True), packet, gr.skip(), gr.skip(), gr.skip()]
        beginning = gr.Dropdown(session.beginnings(), value=EMPTY)
        return [*line_and_tabs, gr.skip(), gr.skip(), packet, beginning, ""]

    gr.on(
        [load.click, name.submit, revision.submit],
        choose,
        [name, revision, trust],
        [line, tabs, image_tab, image_view, *text_tab],
        api_visibility="private",
        concurrency_limit=1,
        show_progress_on=line,
    )

    def name_watched(event: gr.SelectData, request: gr.Request) -> str:
        reads = ("text", "image")[event.index]
        return model_line(said(shelf.watched, visitors.session(request).choices, reads))

    tabs.select(name_watched, None, line, **ANSWERED)


def model_line(loaded: LoadedModel) -> str:
    """Name and sizes of a model, in Markdown."""
    return f"`{loaded.choice.name.replace('`', '')}`: {loaded.describe()}"
