"""The Gradio page: prompt and controls on the left, text and memory on the right."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from transformers import PreTrainedTokenizerBase

from hf_engram import EnnForCausalLM

from .memory_view import memory_view
from .session import Session
from .streaming import MAX_SEED

CONCURRENT_RUNS = 2
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

# The theme's semi-bold file lacks most Latin letters (Gradio 6.31), its bold one has them; both come with Gradio.
# Colours are set where the theme's own leave text with a contrast below 4.5 : 1.
FONT: list[gr.themes.Font | str] = [
    gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)),
    "system-ui",
    "sans-serif",
]
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover_dark="#991b1b",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
)

CSS = "#memory .html-container { padding: 0 }"


def open_page(model: EnnForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, **launch_options: Any) -> gr.Blocks:
    """Build the page and serve it.

    Args:
        name: what to call the model on the page.
        launch_options: further arguments of `gr.Blocks.launch`.
    """
    page = build_page(model, tokenizer, name)
    page.launch(
        theme=THEME,
        css=CSS,
        run_history=False,
        footer_links=["gradio", "settings"],
        state_session_capacity=100,
        **launch_options,
    )
    return page


def build_page(model: EnnForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> gr.Blocks:
    """The page; every browser gets a session of its own."""
    config = model.config
    layers = "1 layer" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} layers"
    with gr.Blocks(title="Engram memory", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session())
        gr.Markdown(
            f"# Engram memory, live\n`{name}`: {model.num_parameters():,} parameters, {layers}, "
            f"{config.memory_size} slots of {config.hidden_size} features"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(value="Once upon a time", label="Prompt", info="Shift+Enter generates", lines=3)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=100)
                    stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
                keep = gr.Checkbox(label="Keep memory", info="Read the next prompt with the memory of the last run")
                clear = gr.Button("Clear memory")
                with gr.Accordion("Sampling"):
                    controls = sampling_controls()
            with gr.Column(scale=3, min_width=360):
                view = memory_view(config)

        buttons = [generate, stop, clear]

        def begin(session: Session) -> list[str | gr.Button]:
            try:
                return [session.begin(), *button_states(running=True)]
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error

        def run(session: Session, prompt: str, keep: bool, *values: float) -> Iterator[str]:
            sampling = dict(zip(controls, values, strict=True))
            yield from session.generate(model, tokenizer, prompt, sampling, keep)

        def finish(session: Session) -> list[Session | gr.Button]:
            session.finish()
            return [session, *button_states(running=False)]

        # The session is an output of `finish` because Gradio forgets only what has been one, an hour after a page is
        # closed. Stop sets a flag that the run looks at: Gradio's `cancels` drops packets that are on their way.
        asked = gr.on([generate.click, prompt.submit], begin, session, [view, *buttons], **PRIVATE)
        asked.success(
            run,
            [session, prompt, keep, *controls.values()],
            view,
            concurrency_limit=CONCURRENT_RUNS,
            concurrency_id="model",
            **PRIVATE,
        ).then(finish, session, [session, *buttons], queue=False, **PRIVATE)
        stop.click(lambda session: session.stop(), session, None, queue=False, **PRIVATE)
        clear.click(lambda session: session.clear(model), session, view, queue=False, **PRIVATE)
    return page.queue(max_size=32)


def sampling_controls() -> dict[str, gr.components.FormComponent]:
    """One control per field of `Sampling`."""
    return {
        "temperature": gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: the most likely token"),
        "top_p": gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p"),
        "max_new_tokens": gr.Slider(1, 1000, 200, step=1, label="New tokens, at most"),
        "seed": gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed"),
    }


def button_states(running: bool) -> list[gr.Button]:
    """Generate, Stop and Clear while a run is going on, or not."""
    return [gr.Button(interactive=interactive) for interactive in (not running, running, not running)]
