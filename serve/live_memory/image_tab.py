"""The tab for images: a pad to draw on, and the model reading it step by step."""

import base64
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .image_reading import ImageStep, like_mnist, read_image
from .limits import Limits
from .memory_view import ASSETS, memory_view
from .models import LoadedModel, ModelShelf
from .packets import encode_array, run_packet
from .text_tab import PRIVATE, said
from .visitors import Visitors

MOST_SIDE = 512  # of a drawing, in pixels


def add_image_tab(visitors: Visitors, shelf: ModelShelf, limits: Limits) -> tuple[gr.HTML, gr.Tab]:
    """The tab, with its events.

    Returns:
        the view, for a packet when another model is chosen, and the tab, to be shown when there is a model.
    """
    loaded = shelf.own.get("image")
    with gr.Tab("Image", id="image", visible=loaded is not None) as tab, gr.Row(elem_classes="tab-grid"):
        with gr.Column(elem_classes="tab-controls"):
            pad = gr.HTML(
                html_template=(ASSETS / "pad.html").read_text("utf-8"),
                css_template=(ASSETS / "pad.css").read_text("utf-8"),
                js_on_load=(ASSETS / "pad.js").read_text("utf-8"),
                apply_default_css=False,
                elem_id="pad",
            )
            centre = gr.Checkbox(
                True,
                label="Centre and scale, as in MNIST",
                info="White on black, for models that read one channel",
            )
        with gr.Column(elem_classes="tab-view"):
            view = memory_view(loaded, "image", "image_memory", unit="step")

    def read(event: gr.EventData, centred: bool, request: gr.Request) -> Any:
        session = visitors.session(request)
        count, choice = int(event.count), session.choices.get("image")
        if count <= session.drawings:
            return gr.skip()  # an older one that was overtaken
        session.drawings = count
        watched = said(shelf.watched, session.choices, "image")
        image = said(decode_drawing, event.pixels, event.side)
        if centred and watched.model.config.num_channels == 1:
            image = like_mnist(image)
        pixels, steps = read_image(watched, image)
        if (session.drawings, session.choices.get("image")) != (count, choice):
            return gr.skip()  # by now another drawing is read, or another model is watched
        return session.image_feed.send(image_packet(watched, pixels, steps))

    def refuse(event: gr.EventData) -> None:
        raise gr.Error(f"{event.name!r} is not an image that this browser can open.", print_exception=False)

    pad.drawn(
        read,
        centre,
        view,
        trigger_mode="multiple",
        concurrency_limit=limits.concurrent_runs,
        concurrency_id="model",
        **PRIVATE,
    )
    pad.refused(refuse, None, None, **PRIVATE)
    return view, tab


def decode_drawing(pixels: str, side: int) -> Image.Image:
    """A square of RGB bytes in base64, as the pad sends it.

    Raises:
        ValueError: it is something else.
    """
    side = int(side)
    values = base64.b64decode(pixels) if 0 < side <= MOST_SIDE and len(pixels) <= 4 * MOST_SIDE**2 else b""
    if len(values) != 3 * side * side or not values:
        raise ValueError(f"A drawing is a square of up to {MOST_SIDE} RGB pixels a side.")
    return Image.fromarray(np.frombuffer(values, np.uint8).reshape(side, side, 3))


def image_packet(loaded: LoadedModel, pixels: np.ndarray, steps: list[ImageStep]) -> dict[str, Any]:
    """A whole image: what was read, in bytes `[C, S, S]`, and every step, to be played back in the browser."""
    config = loaded.model.config
    low, high = float(pixels.min()), float(pixels.max())
    grey = ((pixels - low) / (high - low or 1) * 255).astype(np.uint8)
    last = steps[-1].chances
    best = int(np.argmax(last))
    tokens = [
        {
            "text": f"{index + 1}",
            "is_prompt": True,
            "memories": encode_array(step.memories),
            "chances": [] if step.chances is None else [round(float(chance), 5) for chance in step.chances],
        }
        for index, step in enumerate(steps)
    ]
    verdict = f"Read as “{config.id2label[best]}” ({last[best]:.0%}) after {len(steps)} steps."
    return {
        **run_packet(None, "read"),
        "message": verdict,
        "tokens": tokens,
        "image": {
            "size": config.image_size,
            "channels": config.num_channels,
            "pixels": base64.b64encode(grey.tobytes()).decode(),
            "boxes": [step.box for step in steps],
        },
    }
