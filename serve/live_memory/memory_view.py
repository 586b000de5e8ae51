"""The part of the page that draws a text or an image, and the memory: one `gr.HTML` that is fed packets."""

import base64
from pathlib import Path

import gradio as gr
import numpy as np
from matplotlib import colormaps

from .models import LoadedModel
from .packets import model_packet, to_json

ASSETS = Path(__file__).parent / "view"
# One after the other they are the body of one function; each uses the ones before it.
SCRIPTS = ("memory.js", "replay.js", "panels.js", "text.js", "sentences.js", "view.js", "pointer.js")
IMAGE_SCRIPTS = (*SCRIPTS[:-1], "image.js", "pointer.js")
# Safe for colour-blind readers. The middle of a diverging map, zero, has to look empty on its background.
COLORMAPS = {"sequential": "cividis", "diverging_light": "PuOr_r", "diverging_dark": "berlin"}


def memory_view(loaded: LoadedModel | None, reads: str, elem_id: str, unit: str = "token") -> gr.HTML:
    """The view of a model's memory, empty at first; its value is the last packet (see `packets`).

    Args:
        loaded: `None` if a model is still to be chosen.
        reads: "text" or "image".
        unit: what one step of the model reads, in the view's sentences.
    """
    scripts = IMAGE_SCRIPTS if reads == "image" else SCRIPTS
    return gr.HTML(
        value="" if loaded is None else to_json(model_packet(loaded), number=0),
        html_template=(ASSETS / "memory_view.html").read_text("utf-8"),
        css_template=(ASSETS / "memory_view.css").read_text("utf-8"),
        js_on_load="\n".join((ASSETS / name).read_text("utf-8") for name in scripts),
        apply_default_css=False,
        elem_id=elem_id,
        reads=reads,
        unit=unit,
        colormaps={role: encode_colormap(name) for role, name in COLORMAPS.items()},
    )


def encode_colormap(name: str) -> str:
    """256 colours of a matplotlib colour map, RGBA bytes in base64."""
    return base64.b64encode(colormaps[name](np.arange(256), bytes=True).tobytes()).decode()
