"""The page: four tabs and the functions behind them."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from demo import experts_view, similarity_tab
from demo.api import add_api
from demo.chat_tab import build_chat_tab
from demo.compare_tab import build_compare_tab
from demo.components import write_examples
from demo.experts_tab import build_experts_tab
from demo.guard import GuardedBlocks
from demo.loading import Models
from demo.options import DemoOptions
from demo.similarity_tab import build_similarity_tab

CSS = (
    """
.gradio-container { max-width: 1160px !important; width: 100% !important;
  margin: 0 auto !important; }
.gradio-container main { width: 100%; max-width: none !important; }
.message img { max-height: 220px; width: auto; }
#chat .example { border: 1px solid var(--border-color-primary); }
#chat .placeholder, #chat .placeholder-content { text-align: center; }
/* Gradio would send what is shared to another host. */
button[aria-label="Share"], button[title="Share"] { display: none !important; }
#title h1 { margin: 0; font-size: 1.35rem; }
#title p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #title p { display: none; }
}
"""
    + experts_view.CSS
    + similarity_tab.CSS
)
# Escape stops the answer, wherever the focus is.
HEAD = """<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stops = [...document.querySelectorAll(".stop-button")];
  stops.find((button) => button.offsetParent)?.click();
});
</script>"""
# Fonts that every machine has: nothing is fetched.
THEME = gr.themes.Soft(
    primary_hue="blue",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def build_page(models: Models, options: DemoOptions, files: Path) -> gr.Blocks:
    """The page, ready to be launched.

    Args:
        models: What answers.
        options: Limits and the rest.
        files: Folder of the example pictures, below Gradio's own.
    """
    examples = write_examples(files)
    with GuardedBlocks(
        title=f"{models.chat_name} · mllm demo",
        analytics_enabled=False,
        delete_cache=(1800, 6 * 3600),
        fill_width=True,
    ) as page:
        gr.Markdown(
            f"# {_escape(models.chat_name)}\nA language model that sees. Ask about a picture, and"
            " watch which experts of its vision tower looked at what.",
            elem_id="title",
        )
        with gr.Tabs():
            with gr.Tab("Chat", id="chat-tab"):
                conversation = build_chat_tab(models.chat, options, examples)
            with gr.Tab("See the experts", id="experts-tab") as tab:
                build_experts_tab(tab, models.chat, options, conversation)
            with gr.Tab("Compare", id="compare-tab"):
                build_compare_tab(models, options)
            with gr.Tab("Zero-shot", id="similarity-tab"):
                build_similarity_tab(models.clips, options, examples)
        add_api(models, options)
    return page


def _escape(name: str) -> str:
    return name.replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")
