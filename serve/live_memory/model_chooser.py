"""The line that names the model, and the choice of another one."""

from typing import Any

import gradio as gr

from .models import LoadedModel, ModelShelf
from .packets import model_packet
from .text_tab import AT_ONCE, PRIVATE, said
from .visitors import Visitors

REMOTE_CODE = "I trust the author: run the Python code that comes with this model"


def add_model_chooser(
    visitors: Visitors,
    shelf: ModelShelf,
    defaults: dict[str, LoadedModel],
    text_view: gr.HTML,
    image_view: gr.HTML | None,
    tabs: gr.Tabs,
) -> None:
    """The line and the choice, with their events."""
    line = gr.Markdown(model_line(defaults["text"]), elem_id="model_line")
    with gr.Accordion("Choose another model", open=False):
        with gr.Row(equal_height=True):
            name = gr.Textbox(
                label="Model", info="Id on the Hugging Face Hub (user/name), or a checkpoint folder", scale=3, max_lines=1
            )
            revision = gr.Textbox(label="Revision", info="Branch, tag or commit on the Hub", placeholder="main", max_lines=1)
            load = gr.Button("Load", min_width=100)
        trust = gr.Checkbox(
            label=REMOTE_CODE,
            info=None if shelf.allow_remote_code else "Switched off on this server",
            interactive=shelf.allow_remote_code,
        )

    def choose(name: str, revision: str, trust: bool, request: gr.Request) -> list[Any]:
        session = visitors.session(request)
        loaded = said(shelf.get, said(shelf.check, name, revision, trust))
        packets = {reads: gr.skip() for reads in ("text", "image")}
        packets[loaded.reads] = said(session.choose, loaded)
        ...
