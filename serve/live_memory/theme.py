"""Fonts and colours of the page; all of them come with Gradio."""

import gradio as gr

# The theme's semi-bold file lacks most Latin letters (Gradio 6.31), its bold one has them.
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

# On a narrow screen, the view comes between the prompt and the settings.
CSS = """
#memory .html-container, #image_memory .html-container, #pad .html-container { padding: 0 }
#model_line p { margin: 0 }
#queue { min-height: 20px; margin: -8px 0; }
.tab-grid {
  display: grid;
  grid-template: "controls view" auto "settings view" 1fr / minmax(280px, 1fr) minmax(0, 3fr);
}
.tab-controls { grid-area: controls; }
.tab-settings { grid-area: settings; }
.tab-view { grid-area: view; }
.tab-grid > * { min-width: 0 !important; }
@media (max-width: 760px) {
  .tab-grid { grid-template: "controls" auto "view" auto "settings" auto / minmax(0, 1fr); }
}
"""
