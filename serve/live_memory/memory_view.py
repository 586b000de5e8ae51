"""The part of the page that draws text and memory: one `gr.HTML` that is fed packets."""

import base64
from pathlib import Path

import gradio as gr
import numpy as np
from matplotlib import colormaps

from hf_engram import EnnConfig

from .packets import reset_packet, to_json

ASSETS = Path(__file__).parent
# Safe for colour-blind readers. The middle of a diverging map, zero, has to look empty on its background.
COLORMAPS = {"sequential": "cividis", "diverging_light": "PuOr_r", "diverging_dark": "berlin"}


def memory_view(config: EnnConfig) -> gr.HTML:
    """The view of a model's memory, empty at first; its value is the last packet (see `packets`)."""
    return gr.HTML(
        value=to_json(reset_packet(config, None, "idle"), number=0),
        html_template=(ASSETS / "memory_view.html").read_text("utf-8"),
        css_template=(ASSETS / "memory_view.css").read_text("utf-8"),
        js_on_load=(ASSETS / "memory_view.js").read_text("utf-8"),
        apply_default_css=False,
        elem_id="memory",
        colormaps={role: encode_colormap(name) for role, name in COLORMAPS.items()},
    )


def encode_colormap(name: str) -> str:
    """256 colours of a matplotlib colour map, RGBA bytes in base64."""
    return base64.b64encode(colormaps[name](np.arange(256), bytes=True).tobytes()).decode()
