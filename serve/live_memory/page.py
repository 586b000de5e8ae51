"""The Gradio page: a tab for texts, one for images, and the choice of the model above them."""

from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .api import add_api
from .gate import LocalBlocks, LocalOnly
from .image_tab import add_image_tab
from .limits import Limits
from .model_chooser import add_model_chooser
from .models import ModelShelf
from .text_tab import add_text_tab
from .theme import CSS, THEME
from .visitors import Visitors


class Page(LocalBlocks):
    """The page, and who is on it.

    Attributes:
        visitors: a session for every open page.
    """

    visitors: Visitors


def open_page(shelf: ModelShelf, limits: Limits | None = None, **launch_options: Any) -> Page:
    """Build the page and serve it.

    Args:
        shelf: the models that are watched at first, and where others are loaded. Without a model for images, their
            tab is hidden until one is chosen.
        launch_options: further arguments of `gr.Blocks.launch`.
    """
    limits = limits or Limits()
    page = build_page(shelf, limits)
    page.launch(
        theme=THEME,
        css=CSS,
        run_history=False,
        share=False,  # if not said, GRADIO_SHARE decides, and a tunnel lets in whom `--host` keeps out
        footer_links=["api", "gradio", "settings"],
        max_file_size=limits.upload_bytes,
        app_kwargs={"middleware": [Middleware(LocalOnly)]},
        **launch_options,
    )
    return page


def build_page(shelf: ModelShelf, limits: Limits) -> Page:
    """The page; every browser gets a session of its own."""
    visitors = Visitors(limits.visitors, limits.choices)
    with Page(title="Engram memory", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Engram memory, live")
        place_of_chooser = gr.Column()
        with gr.Tabs() as tabs:
            text_tab = add_text_tab(visitors, shelf, limits)
            image_view, image_tab = add_image_tab(visitors, shelf, limits)
        with place_of_chooser:
            add_model_chooser(visitors, shelf, text_tab, image_view, tabs, image_tab)
        add_api(shelf.own["text"], limits)
        page.unload(visitors.leave)
    page.visitors = visitors
    page.queue(max_size=limits.queued_runs)
    return page
